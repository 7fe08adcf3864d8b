"""The fp32 layer norm that remembers its parameters' casts: diffusers' bits, and nothing of it is seen from outside."""

import copy
import io
import pickle

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.normalization import FP32LayerNorm as DiffusersFP32LayerNorm

from wan_dist.layers.fp32_norm import FP32LayerNorm, keep_fp32_parameters

WIDTH = 24
BF16 = torch.bfloat16


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm(dtype: torch.dtype = BF16, **options) -> FP32LayerNorm:
    made = FP32LayerNorm(WIDTH, eps=1e-6, **options)
    for n, parameter in enumerate(made.parameters()):
        parameter.data = 1 - n + 0.3 * noise(WIDTH, seed=n)
    return made.to(dtype).requires_grad_(False)


X = noise(2, 5, WIDTH, seed=9).to(BF16)


def diffusers(module: FP32LayerNorm, x: torch.Tensor = X) -> torch.Tensor:
    """What diffusers' class gives with the parameters of this moment."""
    return DiffusersFP32LayerNorm.forward(module, x)


@torch.no_grad()
def right(module: FP32LayerNorm, x: torch.Tensor = X) -> None:
    """Called twice, so that the second call is served from what the first one kept."""
    for _ in range(2):
        out = module(x)
        assert out.dtype == x.dtype
        assert torch.equal(out, diffusers(module, x))


@torch.no_grad()
def warm(**options) -> FP32LayerNorm:
    module = norm(**options)
    module(X)
    assert module._casts
    return module


def kept(module: FP32LayerNorm) -> dict[str, torch.Tensor]:
    return {name: cast.copy for name, cast in getattr(module, "_casts", {}).items()}


@pytest.mark.parametrize("parameters", [BF16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("inputs", [BF16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
def test_diffusers_own_bits(parameters, inputs, options):
    right(norm(parameters, **options), X.to(inputs))
    right(norm(parameters, **options), X.to(inputs).transpose(0, 1))
    right(norm(parameters, **options), X.to(inputs)[:, :0])


@torch.no_grad()
def test_the_cast_is_made_once():
    module = norm()
    module(X)
    first = kept(module)
    module(X + 1)
    assert set(first) == {"weight", "bias"}
    assert all(copy.dtype == torch.float32 for copy in first.values())
    assert all(kept(module)[name] is first[name] for name in first)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"dtype": torch.float32}, {"elementwise_affine": False}], ids=str)
def test_nothing_is_kept_where_nothing_is_cast(options):
    module = norm(**options)
    module(X)
    assert not kept(module)


def test_with_gradients_nothing_is_kept_and_gradients_flow():
    module = norm().requires_grad_(True)
    assert torch.equal(module(X), diffusers(module))
    module(X).float().sum().backward()
    assert module.weight.grad is not None
    assert not kept(module)
    warmed = warm()
    with torch.enable_grad():
        copies = kept(warmed)
        copies["weight"].zero_()
        assert torch.equal(warmed(X), diffusers(warmed))


def test_it_is_neither_state_nor_parameter_nor_buffer():
    module = warm()
    assert set(module.state_dict()) == set(dict(module.named_parameters())) == {"weight", "bias"}
    assert not dict(module.named_buffers())
    assert list(module.children()) == []
    assert "_casts" not in repr(module)


def test_another_dtype():
    for dtype in (torch.float16, torch.float32, torch.float64):
        right(warm().to(dtype))


def test_a_move_leaves_no_copy_behind():
    for move in (lambda module: module.cpu(), lambda module: module.to("meta"), lambda module: module.to(BF16)):
        module = warm()
        parent = torch.nn.Sequential(module)
        move(parent)
        assert not kept(module)


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


CLONES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved_and_loaded}


@pytest.mark.parametrize("clone", CLONES)
def test_clones_share_nothing_and_work(clone):
    module = warm()
    other = CLONES[clone](module)
    assert type(other) is FP32LayerNorm
    assert not kept(other)
    assert kept(module)
    right(other)
    with torch.no_grad():
        other.weight.add_(1)
        expected = module(X)
    right(other)
    right(module)
    assert torch.equal(expected, diffusers(module))


def test_a_clone_is_no_larger_than_its_parameters():
    assert len(pickle.dumps(warm())) == len(pickle.dumps(norm()))


def test_all_norms_of_a_model_are_taught_and_nothing_else():
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, num_layers=2, ffn_dim=8, text_dim=8, image_dim=8
        )
    theirs = {name for name, module in model.named_modules() if type(module) is DiffusersFP32LayerNorm}
    classes = {name: type(module) for name, module in model.named_modules()}
    names = list(model.state_dict())
    keep_fp32_parameters(model)
    keep_fp32_parameters(model)
    assert theirs >= {f"blocks.{n}.norm{m}" for n in range(2) for m in (1, 2, 3)} | {"norm_out"}
    for name, module in model.named_modules():
        assert type(module) is (FP32LayerNorm if name in theirs else classes[name]), name
    assert list(model.state_dict()) == names
