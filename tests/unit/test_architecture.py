"""What the tables of names and shapes say is what the classes themselves have, in the same order."""

import json

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from support.checkpoints import _VAE_2_2, KINDS, TINY, WAN_SHAPES
from wan_dist.distributed.mesh import Axis
from wan_dist.distributed.shard_conditions import shard_units
from wan_dist.loading.published import _PUBLISHED, published
from wan_dist.models.architecture import (
    BLOCK_LISTS,
    IMAGE_ENCODER_PREFIX,
    KEEP_FP32,
    image_encoder_tensors,
    tensor_parallel_dim,
    text_encoder_tensors,
    transformer_tensors,
    vae_tensors,
)
from wan_dist.models.image_encoder import WEIGHTS_PREFIX
from wan_dist.models.wan_transformer import _split_features
from wan_dist.models.wan_vae import meta_vae


def on_meta(build) -> torch.nn.Module:
    with torch.device("meta"):
        return build()


def shapes(module: torch.nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """What a checkpoint holds of a module: a tied tensor once."""
    found = [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]
    names, kept = {name for name, _ in found}, module.state_dict()
    tied = {"encoder.embed_tokens.weight"}
    assert set(kept) - names <= tied, "a persistent buffer"
    return found


def asset(folder, component: str) -> dict:
    return json.loads((folder / component / "config.json").read_text())


TRANSFORMERS = {
    **{hub_id: published(hub_id).configs["transformer"] for hub_id in _PUBLISHED},
    **{f"tiny {kind}": {**asset(TINY, "transformer"), **told["transformer"]} for kind, told in KINDS.items()},
    "tiny": asset(TINY, "transformer"),
    "wan_shapes": asset(WAN_SHAPES, "transformer"),
    "class defaults": {"num_layers": 2},
    "few words": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 24},
    "no norm, no out": {
        "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 24, "cross_attn_norm": False,
        "out_channels": None, "in_channels": 6, "patch_size": [2, 1, 3], "freq_dim": 20, "text_dim": 7, "ffn_dim": 9,
    },
    "image branches apart": {
        "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 24, "image_dim": 10, "pos_embed_seq_len": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer(name):
    config = {**TRANSFORMERS[name], "num_layers": min(TRANSFORMERS[name].get("num_layers", 40), 3)}
    model = on_meta(lambda: WanTransformer3DModel.from_config(config))
    assert list(transformer_tensors(config).items()) == shapes(model)


def test_all_blocks_and_the_size_of_the_14b():
    table = transformer_tensors({})
    elements = {name: torch.Size(shape).numel() for name, shape in table.items()}
    assert sum(elements.values()) == 14_288_491_584  # 28.6 GB in bf16
    blocks = {name.split(".")[1] for name in table if name.startswith("blocks.")}
    assert blocks == {str(block) for block in range(40)}
    of_one = sum(size for name, size in elements.items() if name.startswith("blocks.7."))
    assert 702e6 < 2 * of_one < 704e6


TEXT_ENCODERS = {
    "umt5-xxl": (UMT5EncoderModel, UMT5Config, published("Wan-AI/Wan2.1-T2V-14B-Diffusers").configs["text_encoder"]),
    "tiny": (UMT5EncoderModel, UMT5Config, asset(TINY, "text_encoder")),
    "wan_shapes": (UMT5EncoderModel, UMT5Config, asset(WAN_SHAPES, "text_encoder")),
    "umt5 defaults": (UMT5EncoderModel, UMT5Config, {"model_type": "umt5"}),
    "t5 defaults": (T5EncoderModel, T5Config, {"model_type": "t5"}),
    "t5 gated": (T5EncoderModel, T5Config, {"model_type": "t5", "feed_forward_proj": "gated-gelu", "num_layers": 3}),
    "umt5 plain": (UMT5EncoderModel, UMT5Config, {"model_type": "umt5", "feed_forward_proj": "relu", "d_kv": 9}),
}


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_text_encoder(name):
    kind, config_class, config = TEXT_ENCODERS[name]
    model = on_meta(lambda: kind(config_class(**config)))
    assert list(text_encoder_tensors(config).items()) == shapes(model)


def test_the_size_of_umt5_xxl():
    table = text_encoder_tensors(TEXT_ENCODERS["umt5-xxl"][2])
    assert 11.3e9 < 2 * sum(torch.Size(shape).numel() for shape in table.values()) < 11.4e9


IMAGE_ENCODERS = {
    "ViT-H/14": published("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers").configs["image_encoder"],
    "defaults": {},
    "as in tests": {"hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
                    "image_size": 28, "patch_size": 14},
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGE_ENCODERS)
def test_image_encoder(name):
    config = IMAGE_ENCODERS[name]
    plain = on_meta(lambda: CLIPVisionModel(CLIPVisionConfig(**config)))
    projecting = on_meta(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**config)))
    assert list(image_encoder_tensors(config).items()) == shapes(plain)
    assert list(image_encoder_tensors(config, projection=True).items()) == shapes(projecting)
    assert image_encoder_tensors({"model_type": "clip", "vision_config": config}) == image_encoder_tensors(config)


VAES = {
    "Wan2.1": published("Wan-AI/Wan2.1-T2V-14B-Diffusers").configs["vae"],
    "Wan2.2": published("Wan-AI/Wan2.2-TI2V-5B-Diffusers").configs["vae"],
    "tiny": asset(TINY, "vae"),
    "tiny 2.2": {**asset(TINY, "vae"), **_VAE_2_2},
    "wan_shapes": asset(WAN_SHAPES, "vae"),
    "defaults": {},
    "attention on the way down": {"base_dim": 4, "attn_scales": [1.0, 0.25], "z_dim": 3, "num_res_blocks": 2},
    "three levels": {"base_dim": 4, "dim_mult": [1, 3, 2], "temperal_downsample": [True, False], "z_dim": 3},
    "another decoder": {"base_dim": 4, "decoder_base_dim": 6, "is_residual": True, "num_res_blocks": 1},
}


@pytest.mark.parametrize("name", VAES)
def test_vae(name):
    model = on_meta(lambda: AutoencoderKLWan.from_config(VAES[name]))
    assert list(vae_tensors(VAES[name]).items()) == shapes(model)
    model.encoder = model.quant_conv = None
    assert list(vae_tensors(VAES[name], encoder=False).items()) == shapes(model)


def test_what_decodes_is_what_meta_vae_leaves():
    config = asset(TINY, "vae")
    assert list(vae_tensors(config, encoder=False).items()) == shapes(meta_vae(config, encoder=False))


def test_islands_and_prefix_are_the_libraries():
    assert set(KEEP_FP32) == set(WanTransformer3DModel._keep_in_fp32_modules)
    assert IMAGE_ENCODER_PREFIX == WEIGHTS_PREFIX


def test_block_lists_are_the_fsdp_units():
    models = {
        "transformer": WanTransformer3DModel.from_config,
        "text_encoder": lambda config: UMT5EncoderModel(UMT5Config(**config)),
    }
    for component, build in models.items():
        model = on_meta(lambda build=build, component=component: build(asset(TINY, component)))
        count = len(model.get_submodule(BLOCK_LISTS[component]))
        assert shard_units(model).names == tuple(f"{BLOCK_LISTS[component]}.{n}" for n in range(count))
    assert len(on_meta(lambda: CLIPVisionModel(CLIPVisionConfig())).get_submodule(BLOCK_LISTS["image_encoder"])) == 12


@pytest.mark.parametrize("name", ["tiny", "tiny wan2.1 first and last"])
def test_tensor_parallelism_divides_these_dims_and_no_others(name):
    whole = transformer_tensors(TRANSFORMERS[name])
    model = on_meta(lambda: WanTransformer3DModel.from_config(TRANSFORMERS[name]))
    _split_features(model, Axis("tp", 1, 4))
    for tensor, parameter in model.named_parameters():
        divided = [dim for dim, size in enumerate(parameter.shape) if size != whole[tensor][dim]]
        dim = tensor_parallel_dim(tensor)
        assert divided == ([] if dim is None else [dim]), tensor


def test_names_outside_the_blocks_are_whole():
    for name in ("condition_embedder.ffn.net.2.weight", "refiner.blocks.0.attn1.to_q.weight", "proj_out.weight"):
        assert tensor_parallel_dim(name) is None
    assert tensor_parallel_dim("blocks.3.attn2.to_out.0.bias") is None


@pytest.mark.parametrize("change", [{"num_layers": "3"}, {"num_layers": None}, {"patch_size": 2}, {"ffn_dim": 0}])
def test_a_config_that_is_none_is_a_value_error(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        transformer_tensors({**TRANSFORMERS["tiny"], **change})


def test_a_vae_without_enough_flags_is_a_value_error():
    with pytest.raises(ValueError, match="temperal_downsample"):
        vae_tensors({"temperal_downsample": [True]})
