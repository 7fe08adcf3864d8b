"""Each rule that a configuration must obey, and that all broken ones are told at once."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from wan_dist.config.schema import Config, FsdpConfig, SamplerConfig, leaves
from wan_dist.distributed.shard_conditions import CONDITIONS
from wan_dist.loading.checkpoint import Checkpoint
from wan_dist.planning import refusals as rules
from wan_dist.planning.refusal import Refusal, RefusedError

LEAVES = {key: (default, rule) for key, default, rule in leaves(Config())}
BAD_VALUES = {
    "sampler.steps": [0, -1], "sampler.guidance_scale": [float("inf"), float("nan")], "sampler.flow_shift": [0.0, -1.0],
    "sampler.solver": ["ddim"], "video.height": [0], "video.fps": [0.0, float("inf")], "parallelism.cfg": [0],
    "parallelism.fsdp.enabled": ["maybe"], "output.formats": [["mp4", "gif"]], "output.checkpoint_every": [-1],
    "runtime.dtype": ["float16"], "runtime.timeout_s": [0.0, float("nan")], "runtime.ranks": [0], "task": ["draw"],
    "parallelism.ring": [0], "parallelism.tp": [0], "parallelism.fsdp.replicate": [0, -1],
    "bench.head_dim": [7], "sampler.boundary_ratio": [float("-inf")], "model.recipe.steps": [0],
}  # fmt: skip
NOT_YET = {
    "task": "verify", "parallelism.dp": 2, "runtime.compile": True,
    "runtime.profile": True, "runtime.deterministic": True,
}  # fmt: skip


def config(**settings) -> Config:
    made = Config(prompt="a cat")
    for key, value in settings.items():
        *path, leaf = key.split(".")
        node = made
        for part in path:
            node = getattr(node, part)
        setattr(node, leaf, value)
    return made


def test_the_defaults_are_refused_nothing_but_the_missing_prompt():
    assert rules.value_refusals(Config()) == []
    assert [r.key for r in rules.request_refusals(Config())] == ["prompt"]
    assert rules.request_refusals(config()) == []
    assert rules.request_refusals(Config(task="bench")) == []
    assert rules.request_refusals(config(prompt="")) == []


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD_VALUES.items() for value in values])
def test_values_outside_choices_and_limits(key, value):
    (refusal,) = rules.value_refusals(config(**{key: value}))
    assert refusal.key == key
    assert refusal.why in ("not one of its values", "outside its limits")
    for choice in LEAVES[key][1].get("choices", ()):
        assert choice in refusal.remedy


def test_values_that_are_not_built_yet_are_all_known_here():
    assert set(NOT_YET) == set(rules._AVAILABLE)
    assert set(rules._AVAILABLE) <= set(LEAVES)


@pytest.mark.parametrize(("key", "value"), NOT_YET.items())
def test_values_that_are_not_built_yet_are_refused_once_and_never_ignored(key, value):
    (refusal,) = rules.value_refusals(config(**{key: value}))
    assert (refusal.key, refusal.value) == (key, value)
    assert "not yet available" in refusal.why
    for able in rules._AVAILABLE[key]:
        assert rules.value_refusals(config(**{key: able})) == []


@pytest.mark.parametrize("able", [v for values in rules._AVAILABLE.values() for v in values if isinstance(v, str)])
def test_every_available_text_is_among_a_fields_choices(able):
    assert any(able in rule.get("choices", ()) or able == default for default, rule in LEAVES.values())


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "a\0b", "n" * 232, "猫" * 78])
def test_names_that_no_file_can_have(name):
    assert [r.key for r in rules.request_refusals(config(**{"output.name": name}))] == ["output.name"]


@pytest.mark.parametrize("name", ["n" * 231, "猫" * 77, 'it\'s a "clip"', "new\nline", "...", "caf\udce9"])
def test_names_that_a_file_can_have(name):
    assert rules.request_refusals(config(**{"output.name": name})) == []


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
def test_seeds_beyond_64_bits(seed):
    assert [r.key for r in rules.request_refusals(config(**{"sampler.seed": seed}))] == ["sampler.seed"]
    for inside in rules._SEED_RANGE:
        assert rules.request_refusals(config(**{"sampler.seed": inside})) == []


def test_text_that_is_not_utf8_and_an_empty_list_of_formats():
    found = rules.request_refusals(config(**{"prompt": "caf\udce9", "negative_prompt": "\udcff", "output.formats": []}))
    assert [r.key for r in found] == ["prompt", "negative_prompt", "output.formats"]
    str(RefusedError(found)).encode()


def test_prompts_files(tmp_path):
    empty, full, binary = tmp_path / "empty.txt", tmp_path / "full.txt", tmp_path / "binary"
    empty.write_text("\n \n")
    full.write_text("one\n\ntwo\n")
    binary.write_bytes(b"\xff\xfe\x00")
    words = {empty: "an empty list", full: "it holds 2", binary: "cannot be read", tmp_path / "none": "cannot be read"}
    for path, why in words.items():
        (refusal,) = rules.request_refusals(Config(prompts_file=str(path)))
        assert refusal.key == "prompts_file"
        assert why in refusal.why


WAN_TRANSFORMER = {"_class_name": "WanTransformer3DModel"}
IMAGE_TRANSFORMER = {**WAN_TRANSFORMER, "in_channels": 36}
ENCODED_IMAGE = {"transformer": {**IMAGE_TRANSFORMER, "image_dim": 1280}, "image_encoder": {}}
WAN = Checkpoint(
    Path("x"),
    {"_class_name": "WanPipeline", "text_encoder": ["transformers", "UMT5EncoderModel"]},
    {
        "transformer": WAN_TRANSFORMER,
        "vae": {"_class_name": "AutoencoderKLWan"},
        "text_encoder": {},
    },
    {"_class_name": "UniPCMultistepScheduler"},
)


@pytest.mark.parametrize(
    ("index", "configs", "why"),
    [
        ({"_class_name": "WanVACEPipeline"}, {}, "pipeline is WanVACEPipeline"),
        ({"_class_name": None}, {}, "pipeline is None"),
        ({}, {"transformer": {"_class_name": "WanVACETransformer3DModel"}}, "transformer is a WanVACE"),
        ({}, {"transformer_2": {"_class_name": "Other"}}, "transformer_2 is a Other"),
        ({}, {"vae": {"_class_name": "AutoencoderKL"}}, "vae is a AutoencoderKL"),
        ({"text_encoder": ["transformers", "CLIPTextModel"]}, {}, "text encoder is a CLIPTextModel"),
        ({"image_encoder": ["transformers", "SiglipVisionModel"]}, ENCODED_IMAGE, "image encoder is a Siglip"),
        ({"image_encoder": [None, None]}, ENCODED_IMAGE, "image encoder is a None"),
        ({}, {"transformer": {**WAN_TRANSFORMER, "in_channels": 33}}, "takes 33 channels: neither text-to-video"),
        ({"expand_timesteps": True}, {"transformer": IMAGE_TRANSFORMER}, "takes 36 channels, with expand_timesteps"),
        ({}, {"transformer_2": IMAGE_TRANSFORMER}, "its two transformers take different images"),
    ],
)
def test_checkpoints_of_another_kind(index, configs, why):
    assert rules.checkpoint_refusals(WAN, "model.path", "x") == []
    other = replace(WAN, index={**WAN.index, **index}, configs={**WAN.configs, **configs})
    (refusal,) = rules.checkpoint_refusals(other, "model.path", "x")
    assert why in refusal.why


@pytest.mark.parametrize(
    ("index", "configs"),
    [
        ({"expand_timesteps": True}, {}),
        ({}, {"image_encoder": {}}),  # which no transformer asks
        ({"_class_name": "WanImageToVideoPipeline"}, {"transformer": IMAGE_TRANSFORMER}),
        ({}, {"transformer": IMAGE_TRANSFORMER, "transformer_2": IMAGE_TRANSFORMER}),
        ({"image_encoder": ["transformers", "CLIPVisionModel"]}, ENCODED_IMAGE),
        ({"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}, ENCODED_IMAGE),
    ],
)
def test_checkpoints_that_take_images(index, configs):
    other = replace(WAN, index={**WAN.index, **index}, configs={**WAN.configs, **configs})
    assert rules.checkpoint_refusals(other, "model.path", "x") == []


def test_sampler_rules():
    sampler = SamplerConfig(solver="unipc")
    assert rules.sampler_refusals(config(), sampler, WAN) == []
    (refusal,) = rules.sampler_refusals(config(), SamplerConfig(), WAN)
    assert (refusal.key, "UniPCMultistepScheduler" in refusal.why) == ("sampler.solver", True)
    two_scales = config(**{"sampler.guidance_scale_2": 3.0})
    assert [r.key for r in rules.sampler_refusals(two_scales, sampler, WAN)] == ["sampler.guidance_scale_2"]
    assert rules.sampler_refusals(two_scales, replace(sampler, boundary_ratio=0.9), WAN) == []
    low_only = replace(WAN, configs={"transformer_2": WAN.configs["transformer"]})
    assert [r.key for r in rules.sampler_refusals(config(), sampler, low_only)] == ["sampler.boundary_ratio"]


def degrees(cfg: int = 1, ring: int = 1, ulysses: int = 1, tp: int = 1) -> dict[str, int]:
    return {"dp": 1, "cfg": cfg, "ring": ring, "ulysses": ulysses, "tp": tp}


@pytest.mark.parametrize(
    ("mesh", "guided", "names"),
    [
        ({"ulysses": 12}, False, []), ({"cfg": 2, "ulysses": 12}, True, []), ({"ulysses": 5}, True, []),
        ({"ring": 1000}, True, []), ({"tp": 12}, True, []), ({"tp": 4, "ulysses": 3, "ring": 7}, True, []),
        ({"cfg": 2}, False, ["cfg"]), ({"cfg": 3}, True, ["cfg"]), ({"ulysses": 13}, True, ["ulysses"]),
        ({"cfg": 4, "ulysses": 16}, False, ["cfg", "ulysses"]), ({"tp": 4, "ulysses": 4}, True, ["ulysses"]),
        ({"tp": 8}, True, ["tp"]), ({"tp": 24}, True, ["tp"]), ({"tp": 5, "ulysses": 9}, True, ["tp"]),
        ({"cfg": 2, "tp": 7}, False, ["cfg", "tp"]),
    ],
)  # fmt: skip
def test_mesh_rules(mesh, guided, names):
    found = rules.mesh_refusals(degrees(**mesh), heads=12, guided=guided)
    assert [r.key for r in found] == [f"parallelism.{name}" for name in names]
    assert [r.value for r in found] == [mesh[name] for name in names]


def test_tensor_parallelism_that_splits_a_head_names_the_degrees_that_do_not():
    (refusal,) = rules.mesh_refusals(degrees(tp=5), heads=12, guided=True)
    assert "12 attention heads do not divide" in refusal.why
    assert "12 = 2 x 5 + 2" in refusal.why
    assert refusal.remedy == "use one of 1, 2, 3, 4, 6, 12"


def test_ulysses_shares_the_heads_that_tensor_parallelism_leaves():
    (refusal,) = rules.mesh_refusals(degrees(tp=4, ulysses=4), heads=12, guided=True)
    assert "12 over tp 4 leaves 3 a rank" in refusal.why
    assert refusal.remedy == "use 1 to 3, and ring for the rest"
    (refusal,) = rules.mesh_refusals(degrees(ulysses=13), heads=12, guided=True)
    assert "the model has 12" in refusal.why
    assert "1 to 12" in refusal.remedy


@pytest.mark.parametrize("enabled", ["on", "off", "auto"])
@pytest.mark.parametrize(
    ("replicate", "divides"), [(1, True), (2, True), (3, True), (12, True), (5, False), (24, False)]
)
def test_replicas_must_divide_the_fsdp_axis_where_fsdp_is_on(enabled, replicate, divides):
    """cfg 2 x ring 3 x ulysses 2 = 12; tp is no part of it."""
    mesh = degrees(cfg=2, ring=3, ulysses=2, tp=5)
    found = rules.fsdp_refusals(FsdpConfig(enabled=enabled, replicate=replicate), mesh)
    if divides or enabled != "on":
        assert found == []
        return
    (refusal,) = found
    assert (refusal.key, refusal.value) == ("parallelism.fsdp.replicate", replicate)
    assert "cfg 2 x ring 3 x ulysses 2 = 12" in refusal.why
    assert refusal.remedy == "use one of 1, 2, 3, 4, 6, 12"


@pytest.mark.parametrize("enabled", ["on", "off"])
def test_every_shard_condition_that_does_not_exist_is_refused_with_those_that_do(enabled):
    fsdp = FsdpConfig(enabled=enabled, shard_conditions=["is_block", "is_bloc", "", "has_class_in"])
    found = rules.fsdp_refusals(fsdp, degrees())
    assert [(r.key, r.value) for r in found] == [
        ("parallelism.fsdp.shard_conditions", name) for name in ("is_bloc", "", "has_class_in")
    ]
    assert all(name in r.remedy for name in CONDITIONS for r in found)
    assert rules.fsdp_refusals(FsdpConfig(enabled=enabled, shard_conditions=list(CONDITIONS)), degrees()) == []


@pytest.mark.parametrize(
    ("device", "gpus", "ranks", "attention", "keys"),
    [
        ("cpu", 0, 64, "auto", []), ("cpu", 0, 1, "flash", []), ("cpu", 0, 1, "cudnn", ["runtime.attention"]),
        ("cuda", 8, 8, "cudnn", []), ("cuda", 0, 1, "auto", ["runtime.device"]),
        ("cuda", 2, 4, "auto", ["parallelism"]),
    ],
)  # fmt: skip
def test_device_rules(device, gpus, ranks, attention, keys):
    made = config(**{"runtime.attention": attention})
    assert [r.key for r in rules.device_refusals(made, device=device, gpus=gpus, local_ranks=ranks)] == keys


def test_one_error_carries_and_shows_every_reason_also_through_pickle():
    reasons = [Refusal("a", None, "is wrong", "mend it"), Refusal("b.c", 3, "is worse", "drop it")]
    error = pickle.loads(pickle.dumps(RefusedError(reasons)))
    assert error.refusals == reasons
    assert "(2 reasons)" in str(error)
    assert "  a=null: is wrong; mend it\n  b.c=3: is worse; drop it" in str(error)
    assert "(1 reason)" in str(RefusedError(reasons[:1]))
