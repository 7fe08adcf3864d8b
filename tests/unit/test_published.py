"""What is known of the published checkpoints without their files is enough to plan and refuse by, and right."""

from pathlib import Path

import pytest
import yaml

from wan_dist.config.schema import Config, RecipeConfig
from wan_dist.loading.published import _PUBLISHED, file_dtypes, published
from wan_dist.planning.defaults import resolve
from wan_dist.planning.image_input import MAY, MUST, NO, image_input, image_refusals
from wan_dist.planning.refusals import checkpoint_refusals, sampler_refusals, video_refusals
from wan_dist.planning.video_shape import ModelShape
from wan_dist.planning.weights import component_weights


def recipes(repo: Path) -> dict[str, dict]:
    told = [yaml.safe_load(file.read_text()).get("recipe", {}) for file in sorted((repo / "conf/model").glob("*.yaml"))]
    return {recipe["path"]: recipe for recipe in told if "/" in recipe.get("path", "")}


def test_every_recipe_of_the_hub_is_published(repo):
    assert recipes(repo).keys() == _PUBLISHED.keys()


@pytest.mark.parametrize("hub_id", _PUBLISHED)
def test_it_is_accepted(repo, hub_id):
    checkpoint = published(hub_id)
    assert checkpoint_refusals(checkpoint, "model", hub_id) == []
    config = Config()
    config.model.recipe = RecipeConfig(**recipes(repo)[hub_id])
    takes = image_input(
        checkpoint.transformer_config, checkpoint.configs["vae"], expand_timesteps=checkpoint.expand_timesteps
    )
    config.image = "first.png" if takes.first == MUST else None
    config.last_image = "last.png" if takes.last == MUST else None
    resolved = resolve(config, checkpoint, recipe_applies=True)
    assert sampler_refusals(config, resolved.sampler, checkpoint) == []
    assert image_refusals(resolved, checkpoint) == []
    shape = ModelShape.from_configs(checkpoint.transformer_config, checkpoint.configs["vae"])
    assert video_refusals(resolved.video, shape) == []
    assert resolved.sampler.solver == "unipc"
    assert resolved.sampler.boundary_ratio == checkpoint.boundary_ratio


@pytest.mark.parametrize(
    ("name", "heads", "blocks", "images"),
    [
        ("Wan2.1-T2V-1.3B-Diffusers", 12, 30, (NO, NO)),
        ("Wan2.1-T2V-14B-Diffusers", 40, 40, (NO, NO)),
        ("Wan2.1-I2V-14B-480P-Diffusers", 40, 40, (MUST, NO)),
        ("Wan2.1-FLF2V-14B-720P-diffusers", 40, 40, (MUST, MUST)),
        ("Wan2.2-T2V-A14B-Diffusers", 40, 40, (NO, NO)),
        ("Wan2.2-I2V-A14B-Diffusers", 40, 40, (MUST, MAY)),
        ("Wan2.2-TI2V-5B-Diffusers", 24, 30, (MAY, NO)),
    ],
)
def test_what_it_is(name, heads, blocks, images):
    checkpoint = published(f"Wan-AI/{name}")
    for expert in checkpoint.experts:
        assert checkpoint.configs[expert]["num_attention_heads"] == heads
        assert checkpoint.configs[expert]["num_layers"] == blocks
    takes = image_input(
        checkpoint.transformer_config, checkpoint.configs["vae"], expand_timesteps=checkpoint.expand_timesteps
    )
    assert (takes.first, takes.last) == images
    assert (len(checkpoint.experts) == 2) == ("A14B" in name)
    assert checkpoint.has_image_tokens == ("image_encoder" in checkpoint.configs) == takes.encoder
    assert all(checkpoint.class_name(component) for component in checkpoint.configs)


@pytest.mark.parametrize("hub_id", _PUBLISHED)
def test_every_component_can_be_sized(hub_id):
    checkpoint, dtypes = published(hub_id), file_dtypes(hub_id)
    assert dtypes.keys() == checkpoint.configs.keys()
    for name in checkpoint.configs:
        weights = component_weights(checkpoint, name, dtype_bytes=2)
        in_fp32 = component_weights(checkpoint, name, dtype_bytes=4).total
        assert weights.file_bytes == in_fp32 // (1 if dtypes[name] == "F32" else 2)


def test_the_whole_a14b_is_126_gigabytes():
    checkpoint = published("Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    sizes = [component_weights(checkpoint, name, dtype_bytes=2).file_bytes for name in checkpoint.configs]
    assert round(sum(sizes) / 1e9) == 126


def test_what_is_not_in_the_table_is_none():
    assert published("Wan-AI/Wan2.1-VACE-14B-diffusers") is None
    assert file_dtypes("somebody/else") == {}


def test_a_caller_may_change_what_it_got():
    one = published("Wan-AI/Wan2.1-T2V-14B-Diffusers")
    one.configs["transformer"]["num_layers"] = 1
    one.index["vae"].clear()
    other = published("Wan-AI/Wan2.1-T2V-14B-Diffusers")
    assert other.configs["transformer"]["num_layers"] == 40
    assert other.class_name("vae") == "AutoencoderKLWan"
