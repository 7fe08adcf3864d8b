"""Every name of torch, diffusers and transformers that wan_dist reaches into is still there, and means what it did."""

import inspect

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.models.activations import GELU
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed
from diffusers.video_processor import VideoProcessor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import UMT5EncoderModel

from wan_dist.models.text_encoder import MAX_TEXT_TOKENS
from wan_dist.models.wan_attention import rotate


@pytest.fixture(scope="module")
def transformer() -> WanTransformer3DModel:
    with torch.device("meta"):
        return WanTransformer3DModel(num_attention_heads=2, attention_head_dim=24, num_layers=1, ffn_dim=8, text_dim=8)


def test_the_transformers_parts(transformer):
    assert type(transformer.rope) is WanRotaryPosEmbed
    assert type(transformer.condition_embedder.text_embedder) is PixArtAlphaTextProjection
    assert isinstance(transformer.proj_out, torch.nn.Linear)
    for name in ("attention_head_dim", "patch_size", "max_seq_len"):
        assert hasattr(transformer.rope, name)
        assert name in inspect.signature(WanRotaryPosEmbed.__init__).parameters
    assert set(dict(transformer.rope.named_buffers())) == {"freqs_cos", "freqs_sin"}
    assert transformer.rope._non_persistent_buffers_set == {"freqs_cos", "freqs_sin"}


def test_the_blocks_parts(transformer):
    block = transformer.blocks[0]
    for attention in (block.attn1, block.attn2):
        assert isinstance(attention, WanAttention)
        assert attention.heads == 2
        assert attention.add_k_proj is None
        for name in ("to_q", "to_k", "to_v", "norm_q", "norm_k"):
            assert isinstance(getattr(attention, name), torch.nn.Module)
        linear, dropout = attention.to_out
        assert isinstance(linear, torch.nn.Linear)
        assert isinstance(dropout, torch.nn.Dropout)
        assert dropout.p == 0.0
    names = list(inspect.signature(WanAttnProcessor.__call__).parameters)
    assert names == ["self", "attn", "hidden_states", "encoder_hidden_states", "attention_mask", "rotary_emb"]


def test_what_tensor_parallelism_splits():
    with torch.device("meta"):
        block = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, num_layers=1, ffn_dim=8, text_dim=8, added_kv_proj_dim=48
        ).blocks[0]
    for attention in (block.attn1, block.attn2):
        assert attention.inner_dim == 48 == attention.to_q.out_features == attention.to_out[0].in_features
        assert all(isinstance(getattr(attention, name), torch.nn.Linear) for name in ("to_q", "to_k", "to_v"))
        for norm in (attention.norm_q, attention.norm_k):
            assert type(norm) is torch.nn.RMSNorm
            assert norm.normalized_shape == (48,)
            assert norm.eps is not None
    assert block.attn1.add_k_proj is None
    assert isinstance(block.attn2.add_k_proj, torch.nn.Linear)
    assert isinstance(block.attn2.add_v_proj, torch.nn.Linear)
    assert type(block.attn2.norm_added_k) is torch.nn.RMSNorm
    assert block.attn2.norm_added_k.normalized_shape == (48,)
    assert not getattr(block.attn2, "norm_added_q", None)
    assert not block.attn2.fused_projections
    activation, dropout, linear_out = block.ffn.net
    assert type(activation) is GELU
    assert isinstance(activation.proj, torch.nn.Linear)
    assert (activation.proj.out_features, linear_out.in_features) == (8, 8)
    assert isinstance(linear_out, torch.nn.Linear)
    assert isinstance(dropout, torch.nn.Dropout)


def test_the_fp32_norm():
    norm = FP32LayerNorm(4).to(torch.bfloat16)
    assert list(inspect.signature(FP32LayerNorm.forward).parameters) == ["self", "inputs"]
    x = torch.randn(2, 4).to(torch.bfloat16)
    by_hand = torch.nn.functional.layer_norm(x.float(), (4,), norm.weight.float(), norm.bias.float(), norm.eps)
    assert torch.equal(norm(x), by_hand.to(torch.bfloat16))


def test_declared_blocks(transformer):
    assert WanTransformer3DModel._repeated_blocks == ["WanTransformerBlock"]
    assert type(transformer.blocks[0]).__name__ == "WanTransformerBlock"
    assert set(UMT5EncoderModel._no_split_modules) == {"UMT5Block"}
    assert not getattr(UMT5EncoderModel, "_repeated_blocks", None)


# The arguments that wan_dist passes by place, and the results it takes: the first two.
ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": ("query", "key", "value"),
    "_scaled_dot_product_flash_attention": ("query", "key", "value"),
    "_scaled_dot_product_efficient_attention": ("query", "key", "value", "attn_bias", "compute_log_sumexp"),
    "_scaled_dot_product_cudnn_attention": ("query", "key", "value", "attn_bias", "compute_log_sumexp"),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_the_operators_under_scaled_dot_product_attention(name):
    schema = getattr(torch.ops.aten, name).default._schema
    names = [argument.name for argument in schema.arguments]
    assert tuple(names[: len(ATTENTION[name])]) == ATTENTION[name]
    left_out = schema.arguments[len(ATTENTION[name]) :]
    assert all(argument.has_default_value() for argument in left_out)
    defaults = {argument.name: argument.default_value for argument in left_out}
    assert (defaults["dropout_p"], defaults["is_causal"], defaults["scale"]) == (0.0, False, None)
    assert schema.returns[0].name == "output"
    assert schema.returns[1].name in ("logsumexp", "log_sumexp")


def test_fsdps_signatures():
    parameters = inspect.signature(AllGather.__call__).parameters
    assert list(parameters) == ["self", "output_tensor", "input_tensor", "group", "async_op"]
    assert parameters["async_op"].default is False
    assert list(inspect.signature(AllGather.allocate).parameters) == ["self", "size", "dtype", "device"]
    assert AllGather.__abstractmethods__ == {"allocate", "__call__"}
    assert list(inspect.signature(FSDPModule.set_custom_all_gather).parameters) == ["self", "comm"]
    assert list(inspect.signature(FSDPModule.reshard).parameters) == ["self"]
    assert {"mesh", "reshard_after_forward"} <= set(inspect.signature(fully_shard).parameters)
    wanted = {"run_check", "shape", "stride"}
    assert wanted <= set(inspect.signature(DTensor.from_local).parameters)
    assert list(inspect.signature(DeviceMesh._flatten).parameters)[:2] == ["self", "mesh_dim_name"]
    names = list(inspect.signature(DeviceMesh._unflatten).parameters)
    assert names[:4] == ["self", "dim", "mesh_sizes", "mesh_dim_names"]


@pytest.fixture
def one_of_four():
    dist.init_process_group("fake", rank=2, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_meshes_flatten_and_unflatten(one_of_four):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    flat = mesh["a", "b"]._flatten("both")
    assert (flat.size(), flat.get_local_rank()) == (4, 2)
    both = flat._unflatten(0, (2, 2), ("outer", "inner"))
    assert both.mesh_dim_names == ("outer", "inner")
    assert dist.get_process_group_ranks(both.get_group("inner")) == [2, 3]
    assert dist.get_process_group_ranks(both.get_group("outer")) == [0, 2]


def test_fsdp_divides_rows_as_chunks_and_changes_the_class_in_place(one_of_four):
    """Meta parameters become DTensors of this rank's rows of dim 0, the rest of the module is as it was."""
    mesh = init_device_mesh("cpu", (4,))
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(3, 5, bias=False))
    linear = model[0]
    fully_shard(linear, mesh=mesh, reshard_after_forward=True)
    assert model[0] is linear
    assert isinstance(linear, FSDPModule)
    assert isinstance(linear, torch.nn.Linear)
    assert isinstance(linear.weight, DTensor)
    assert linear.weight.shape == (5, 3)
    assert linear.weight.to_local().shape == (1, 3)  # rows 4 to 5: chunks of 2, 2, 1 and 0
    assert linear.weight.is_meta


def test_signatures():
    names = list(inspect.signature(WanTransformer3DModel.forward).parameters)
    assert {"hidden_states", "timestep", "encoder_hidden_states", "return_dict"} <= set(names)
    assert list(inspect.signature(PixArtAlphaTextProjection.forward).parameters) == ["self", "caption"]
    assert list(inspect.signature(WanRotaryPosEmbed.forward).parameters) == ["self", "hidden_states"]
    encode = inspect.signature(WanPipeline.encode_prompt).parameters
    assert {"prompt", "negative_prompt", "do_classifier_free_guidance", "max_sequence_length", "device"} <= set(encode)
    assert inspect.signature(WanPipeline.__call__).parameters["max_sequence_length"].default == MAX_TEXT_TOKENS
    assert "output_type" in inspect.signature(VideoProcessor.postprocess_video).parameters
    assert "return_dict" in inspect.signature(AutoencoderKLWan.decode).parameters


def test_class_attributes():
    islands = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}
    assert islands <= set(WanTransformer3DModel._keep_in_fp32_modules)
    assert hasattr(WanTransformer3DModel, "_keys_to_ignore_on_load_unexpected")
    assert hasattr(UMT5EncoderModel, "_keys_to_ignore_on_load_unexpected")
    assert not AutoencoderKLWan._keep_in_fp32_modules


def test_the_vaes_config():
    with torch.device("meta"):
        config = AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).config
    assert len(config.latents_mean) == len(config.latents_std) == config.z_dim
    assert (config.scale_factor_spatial, config.scale_factor_temporal) == (8, 4)


def diffusers_rotary(hidden_states, freqs_cos, freqs_sin):
    x1, x2 = hidden_states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = freqs_cos[..., 0::2], freqs_sin[..., 1::2]
    out = torch.empty_like(hidden_states)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(hidden_states)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_rotate_equals_diffusers_rotary_embedding(dtype, tolerance):
    rope = WanRotaryPosEmbed(24, (1, 2, 2), 64)
    cos, sin = rope(torch.empty(1, 16, 3, 8, 10))
    assert torch.equal(cos[..., 0::2], cos[..., 1::2])
    assert torch.equal(sin[..., 0::2], sin[..., 1::2])
    table = torch.complex(cos[..., 0::2].contiguous(), sin[..., 1::2].contiguous())
    x = torch.randn(2, cos.shape[1], 3, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = diffusers_rotary(x, cos, sin)
    found = rotate(x.clone(), table)
    assert found.dtype == dtype
    error = (found.float() - expected.float()).abs() / expected.float().abs().clamp(min=1)
    assert error.max() <= tolerance
    assert (found == expected).float().mean() > (0.5 if dtype == torch.float32 else 0.999)
    assert not torch.allclose(found.float(), x.float(), atol=0.1)


def test_the_rotary_formula_above_is_still_diffusers_own():
    source = inspect.getsource(WanAttnProcessor.__call__)
    for line in inspect.getsource(diffusers_rotary).splitlines()[3:]:
        assert line.strip() in source
