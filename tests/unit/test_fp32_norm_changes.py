"""However the parameters of a remembering fp32 layer norm change, the next call is diffusers' for the new ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.models.normalization import FP32LayerNorm as DiffusersFP32LayerNorm

from wan_dist.layers.fp32_norm import FP32LayerNorm

WIDTH = 24
BF16 = torch.bfloat16


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = noise(2, 5, WIDTH, seed=9).to(BF16)


def norm(dtype: torch.dtype = BF16) -> FP32LayerNorm:
    module = FP32LayerNorm(WIDTH, eps=1e-6)
    module.weight.data, module.bias.data = 1 + 0.3 * noise(WIDTH), 0.3 * noise(WIDTH, seed=1)
    return module.to(dtype).requires_grad_(False)


def diffusers(module: FP32LayerNorm) -> torch.Tensor:
    return DiffusersFP32LayerNorm.forward(module, X)


@torch.no_grad()
def right(module: FP32LayerNorm) -> None:
    """Called twice, so that the second call is served from what the first one kept."""
    for _ in range(2):
        assert torch.equal(module(X), diffusers(module))


def doubled(module) -> dict[str, torch.Tensor]:
    return {name: 2 * tensor + 1 for name, tensor in module.state_dict().items()}


def another_part_of_one_storage(module) -> None:
    pool = torch.cat([module.weight.data, module.weight.data + 1])
    module.weight.data = pool[:WIDTH]
    right(module)
    module.weight.data = pool[WIDTH:]


def write_through_data_and_put_it_back(module) -> None:
    module.weight.data.mul_(3)
    module.weight.data = module.weight.data


CHANGES = {
    "in place": lambda m: m.weight.add_(1),
    "in place through a view": lambda m: m.weight.view(2, -1)[1].fill_(5),
    "loaded": lambda m: m.load_state_dict(doubled(m)),
    "loaded by assignment": lambda m: m.load_state_dict(doubled(m), assign=True),
    "there and back": lambda m: [m.to(torch.float32), m.weight.mul_(1.7), m.to(BF16)],
    "other data": lambda m: setattr(m.weight, "data", noise(WIDTH, seed=4).to(BF16)),
    "another stride": lambda m: setattr(m.weight, "data", m.weight.data[:1].expand(WIDTH)),
    "another part of one storage": another_part_of_one_storage,
    "written through data": lambda m: m.weight.data.mul_(3),
    "written through data, put back": write_through_data_and_put_it_back,
    "written past every counter": lambda m: m.weight.data.view(torch.int16).numpy().fill(0x4040),  # 3.0
    "another parameter": lambda m: setattr(m, "weight", torch.nn.Parameter(noise(WIDTH, seed=5).to(BF16))),
    "exchanged": lambda m: [setattr(m, "weight", m.bias), setattr(m, "bias", None)],
}


WRITES_THAT_NOTHING_COUNTS = {"written through data", "written through data, put back", "written past every counter"}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change):
    module = norm()
    before = module(X)
    assert module._casts
    CHANGES[change](module)
    assert not torch.equal(module(X), before)
    right(module)


@torch.no_grad()
@pytest.mark.parametrize("change", sorted(CHANGES.keys() - WRITES_THAT_NOTHING_COUNTS))
def test_a_change_is_seen_without_comparing_values(change):
    """As on a GPU: by the parameter, its place and its version alone."""
    module = norm()
    module(X)
    cast = replace(module._casts["weight"], values=None)
    assert cast.is_of(module.weight)
    CHANGES[change](module)
    assert not cast.is_of(module.weight)


@torch.no_grad()
def test_other_data_at_the_same_address_is_seen():
    """Two tensors over one array, which is written in between: same address, no version counts it."""
    array = np.ones(WIDTH, dtype=np.float16)
    module = norm(torch.float16)
    module.weight.data = torch.from_numpy(array)
    address = module.weight.data_ptr()
    ones = module(X)
    array[:] = 3
    module.weight.data = torch.from_numpy(array)
    assert module.weight.data_ptr() == address
    assert torch.equal(module(X), diffusers(module))
    assert not torch.equal(module(X), ones)
    array[:] = 7  # and not even the tensor is another one
    right(module)


def test_parameters_made_under_inference_mode():
    with torch.inference_mode():
        module = norm()
        module(X)
    right(module)
    with torch.inference_mode():
        module.weight.mul_(2)
        assert torch.equal(module(X), diffusers(module))
    right(module)
    cast = module._casts["weight"]
    assert cast.version is None  # such a tensor has no version to go by
    assert not replace(cast, values=None).is_of(module.weight)


def test_a_copy_kept_under_inference_mode_serves_no_grad_and_the_reverse():
    module = norm()
    with torch.inference_mode():
        module(X)
    right(module)
    with torch.inference_mode():
        assert torch.equal(module(X), diffusers(module))
    module.requires_grad_(True)
    assert module(X).requires_grad
