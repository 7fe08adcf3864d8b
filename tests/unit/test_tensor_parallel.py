"""Tensor-parallel layers in one process: shapes, slices, and that the ranks' parts are the whole."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

from wan_dist.distributed.mesh import AXES, COMBINED_AXES, Axis, Mesh
from wan_dist.layers.attention_kernels import attention_kernel
from wan_dist.layers.sequence import split_range
from wan_dist.layers.tensor_parallel import split_column, split_rms_norm, split_row
from wan_dist.models.wan_transformer import meta_transformer, parallelize_wan_transformer

IN, OUT = 7, 12
DEGREES = [1, 2, 3, 5]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def meta(module: torch.nn.Module) -> torch.nn.Module:
    return module.to("meta")


def load(module: torch.nn.Module, whole: torch.nn.Module) -> torch.nn.Module:
    """Give a taught meta module this rank's part of the whole module's parameters, through its loaders."""
    for name, parameter in list(module.named_parameters()):
        tensor = getattr(whole, name)
        part = parameter.weight_loader(tensor) if hasattr(parameter, "weight_loader") else tensor
        assert part.shape == parameter.shape
        setattr(module, name, torch.nn.Parameter(part.clone(), requires_grad=False))
    return module


@pytest.mark.parametrize("tp", DEGREES)
@pytest.mark.parametrize("bias", [True, False])
def test_column_parts_are_the_whole_linears_features(tp, bias):
    whole = torch.nn.Linear(IN, OUT, bias=bias)
    x, parts = noise(2, 3, IN), []
    for rank in range(tp):
        begin, end = split_range(OUT, tp, rank)
        linear = meta(torch.nn.Linear(IN, OUT, bias=bias))
        split_column(linear, begin, end)
        assert (linear.in_features, linear.out_features) == (IN, end - begin)
        assert linear.weight.shape == (end - begin, IN)
        assert linear.weight.weight_loader.ranges() == ((begin, end), (0, IN))
        assert (linear.bias is None) is not bias
        if bias:
            assert linear.bias.shape == (end - begin,)
            assert linear.bias.weight_loader.ranges() == ((begin, end),)
        parts.append(load(linear, whole)(x))
    torch.testing.assert_close(torch.cat(parts, -1), whole(x))


@pytest.mark.parametrize("tp", DEGREES)
@pytest.mark.parametrize("bias", [True, False])
def test_row_parts_sum_to_the_whole_and_each_holds_the_whole_bias(tp, bias):
    """Alone on its axis a rank gives its own part and the bias; over the axis the bias comes once (tests/ranks)."""
    whole = torch.nn.Linear(OUT, IN, bias=bias)
    x, total = noise(2, 3, OUT), torch.zeros(2, 3, IN)
    for rank in range(tp):
        begin, end = split_range(OUT, tp, rank)
        linear = meta(torch.nn.Linear(OUT, IN, bias=bias))
        split_row(linear, Axis("tp"), begin, end)
        assert (linear.in_features, linear.out_features) == (end - begin, IN)
        assert linear.weight.weight_loader.ranges() == ((0, IN), (begin, end))
        if bias:
            assert linear.bias.shape == (IN,)
            assert not hasattr(linear.bias, "weight_loader")  # whole: the default
        load(linear, whole)
        given = x[..., begin:end].clone()
        part = linear(given)
        torch.testing.assert_close(part, F.linear(given, whole.weight[:, begin:end], whole.bias))
        assert torch.equal(given, x[..., begin:end])
        total += part - (whole.bias if bias else 0)
    torch.testing.assert_close(total + (whole.bias if bias else 0), whole(x))


@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_norm_parts_know_all_features_and_their_own_weight(tp, affine):
    for rank in range(tp):
        begin, end = split_range(OUT, tp, rank)
        norm = meta(torch.nn.RMSNorm(OUT, eps=1e-6, elementwise_affine=affine))
        axis = Axis("tp", rank, tp)
        split_rms_norm(norm, axis, begin, end)
        assert (norm.normalized_shape, norm.all_features, norm.axis) == ((end - begin,), OUT, axis)
        assert (norm.weight is None) is not affine
        if affine:
            assert norm.weight.shape == (end - begin,)
            assert norm.weight.weight_loader.ranges() == ((begin, end),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_the_norm_on_an_axis_of_one_is_torchs(dtype, affine):
    whole = torch.nn.RMSNorm(OUT, eps=1e-6, elementwise_affine=affine).to(dtype)
    if affine:
        whole.weight.data = (1 + 0.2 * noise(OUT)).to(dtype)
    norm = meta(torch.nn.RMSNorm(OUT, eps=1e-6, elementwise_affine=affine))
    split_rms_norm(norm, Axis("tp"), 0, OUT)
    x = noise(2, 3, OUT, seed=1).to(dtype)
    found = load(norm, whole)(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, whole(x))


def test_a_module_whose_weights_are_there_is_refused():
    axis = Axis("tp")
    for split in (
        lambda: split_column(torch.nn.Linear(IN, OUT), 0, 6),
        lambda: split_row(torch.nn.Linear(IN, OUT), axis, 0, 3),
        lambda: split_rms_norm(torch.nn.RMSNorm(OUT, eps=1e-6), axis, 0, 6),
    ):
        with pytest.raises(AssertionError, match="before weights are there"):
            split()
    with pytest.raises(AssertionError, match="say theirs"):
        split_rms_norm(meta(torch.nn.RMSNorm(OUT)), axis, 0, 6)


CONFIG = {"num_attention_heads": 6, "attention_head_dim": 8, "num_layers": 1, "ffn_dim": 20, "text_dim": 16}
IMAGE = {"added_kv_proj_dim": 48, "image_dim": 16}


def taught(tp: int, rank: int, **config) -> WanTransformer3DModel:
    axes = {name: Axis(name) for name in (*AXES, *COMBINED_AXES)}
    mesh = Mesh({**axes, "tp": Axis("tp", rank, tp)}, Axis("world"), axes["tp"].traffic)
    model = meta_transformer({**CONFIG, **config})
    parallelize_wan_transformer(model, mesh, attention_kernel("auto"))
    return model


@pytest.mark.parametrize("tp", [1, 2, 3, 6])
@pytest.mark.parametrize("config", [{}, IMAGE], ids=["text", "image"])
def test_the_ranks_parts_of_a_transformer_are_the_whole_each_element_once(tp, config):
    """Every tensor of the model is either whole on all ranks or cut into parts that tile it."""
    whole = {name: tensor.shape for name, tensor in meta_transformer({**CONFIG, **config}).named_parameters()}
    covered: dict[str, list[tuple[int, int]]] = {}
    sizes: dict[str, int] = {}
    for rank in range(tp):
        model = taught(tp, rank, **config)
        assert model.blocks[0].attn1.heads == model.blocks[0].attn2.heads == 6 // tp
        found = dict(model.named_parameters())
        assert found.keys() == whole.keys()
        for name, parameter in found.items():
            loader = getattr(parameter, "weight_loader", None)
            if loader is None:
                assert parameter.shape == whole[name], name
                continue
            assert loader.whole == whole[name]
            assert parameter.shape == torch.Size(end - begin for begin, end in loader.ranges())
            covered.setdefault(name, []).append((loader.begin, loader.end))
            assert sizes.setdefault(name, whole[name][loader.dim]) == whole[name][loader.dim]
    for name, parts in covered.items():
        assert [begin for begin, _ in parts] == [0, *(end for _, end in parts[:-1])], name
        assert parts[-1][1] == sizes[name], name
    cut = {name.removeprefix("blocks.0.") for name in covered}
    image = {"attn2.add_k_proj.weight", "attn2.add_k_proj.bias", "attn2.add_v_proj.weight", "attn2.add_v_proj.bias",
             "attn2.norm_added_k.weight"} if config else set()  # fmt: skip
    per_attention = {"to_q.weight", "to_q.bias", "to_k.weight", "to_k.bias", "to_v.weight", "to_v.bias",
                     "norm_q.weight", "norm_k.weight", "to_out.0.weight"}  # fmt: skip
    both = {f"{attention}.{name}" for attention in ("attn1", "attn2") for name in per_attention}
    ffn = {"ffn.net.0.proj.weight", "ffn.net.0.proj.bias", "ffn.net.2.weight"}
    assert cut == (both | image | ffn if tp > 1 else set())


def test_heads_that_do_not_divide_are_an_error():
    with pytest.raises(AssertionError, match="6 heads over 4 ranks"):
        taught(4, 0)
