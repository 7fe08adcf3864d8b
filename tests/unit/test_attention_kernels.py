"""Attention kernels on a CPU: `whole` is torch's, `part` is the softmax over its keys with their log-sum-exp."""

import pytest
import torch
import torch.nn.functional as F

from wan_dist.layers.attention import _Merged
from wan_dist.layers.attention_kernels import attention_kernel

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
LSE_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-5}  # torch's flash kernel takes a shorter exp for bf16
SHAPES = [  # B, L, S, H, D
    (1, 1, 1, 1, 1), (1, 5, 3, 2, 8), (2, 33, 70, 3, 24), (1, 4, 129, 1, 7), (3, 65, 2, 5, 13), (1, 130, 40, 2, 128),
]  # fmt: skip


def qkv(shape, dtype: torch.dtype, scale: float = 1.0) -> list[torch.Tensor]:
    batch, queries, keys, heads, dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    return [
        (scale * torch.randn(batch, length, heads, dim, generator=generator)).to(dtype)
        for length in (queries, keys, keys)
    ]


def by_hand(q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
    """o_BLHD and lse_BLH in fp64."""
    scores = torch.einsum("blhd,bshd->blhs", q.double(), k.double()) / q.shape[-1] ** 0.5
    return torch.einsum("blhs,bshd->blhd", scores.softmax(-1), v.double()), scores.logsumexp(-1)


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    error = (found.double() - expected).abs() / expected.abs().clamp(min=1)
    assert error.max() <= tolerance


@pytest.mark.parametrize("name", ["auto", "math", "flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_part_is_softmax_and_log_sum_exp(name, dtype, shape):
    q, k, v = qkv(shape, dtype)
    out, lse = attention_kernel(name).part(q, k, v)
    expected, expected_lse = by_hand(q, k, v)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    near(out, expected, TOLERANCE[dtype])
    near(lse, expected_lse, LSE_TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["math", "flash"])
def test_large_scores_overflow_nothing(name):
    q, k, v = qkv((1, 9, 17, 2, 16), torch.float32, scale=30.0)
    out, lse = attention_kernel(name).part(q, k, v)
    expected, expected_lse = by_hand(q, k, v)
    assert expected_lse.abs().max() > 1000
    near(out, expected, 1e-3)
    near(lse, expected_lse, LSE_TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["math", "flash"])
def test_views_as_the_collectives_leave_them(name):
    """q, k and v of one buffer, token-major, transposed."""
    q, k, v = torch.randn(11, 2, 3, 5, 8, generator=torch.Generator().manual_seed(0)).transpose(0, 1).unbind(2)
    kernel = attention_kernel(name)
    out, lse = kernel.part(q, k, v)
    near(out, by_hand(q, k, v)[0], TOLERANCE[torch.float32])
    near(lse, by_hand(q, k, v)[1], LSE_TOLERANCE[torch.float32])
    near(kernel.whole(q, k, v), by_hand(q, k, v)[0], TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["auto", "math", "flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_whole_is_torchs_own(name, dtype, shape):
    q, k, v = qkv(shape, dtype)
    out = attention_kernel(name).whole(q, k, v)
    assert out.dtype == dtype
    near(out, by_hand(q, k, v)[0], TOLERANCE[dtype])
    if name == "auto":
        theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        torch.testing.assert_close(out, theirs)


@pytest.mark.parametrize("name", ["math", "flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [[70], [1, 69], [30, 0, 40], [5, 5, 50, 10]], ids=str)
def test_parts_merged_by_their_log_sum_exp_are_the_whole(name, dtype, cuts):
    q, k, v = qkv((2, 33, 70, 3, 24), dtype)
    merged = _Merged(q)
    for k_part, v_part in zip(k.split(cuts, dim=1), v.split(cuts, dim=1), strict=True):
        if k_part.shape[1]:
            merged.add(*attention_kernel(name).part(q, k_part, v_part))
    near(merged.out_BGhD, by_hand(q, k, v)[0], TOLERANCE[dtype])
    assert merged.out_BGhD.dtype == torch.float32


@pytest.mark.parametrize("gap", [-3e4, -200.0, 200.0, 3e4])
def test_a_part_that_outweighs_the_others_by_any_size_breaks_nothing(gap):
    merged = _Merged(torch.empty(1, 2, 1, 4))
    merged.add(torch.full((1, 2, 1, 4), 1.0), torch.zeros(1, 2, 1))
    merged.add(torch.full((1, 2, 1, 4), 5.0), torch.full((1, 2, 1), gap))
    assert torch.equal(merged.out_BGhD, torch.full((1, 2, 1, 4), 5.0 if gap > 0 else 1.0))


def test_an_unknown_kernel_is_an_error():
    q, k, v = qkv(SHAPES[1], LSE_TOLERANCE[torch.float32])
    with pytest.raises(KeyError, match="fast"):
        attention_kernel("fast").whole(q, k, v)
