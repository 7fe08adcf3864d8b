"""Ulysses attention by itself: equal to attention over everything, for batches, uneven parts and views."""

import pytest
import torch

from support.ranks import run_ranks
from wan_dist.distributed.collectives import gather_dim
from wan_dist.distributed.process_group import process_group
from wan_dist.layers.attention import attention_kernel, ulysses_attention
from wan_dist.layers.sequence import split_sizes


def qkv(batch: int, tokens: int, heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, tokens, heads, 8, generator=generator).to(dtype) for _ in range(3)]


def sharded(env, batch: int, tokens: int, heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    degrees = {"dp": 1, "cfg": 1, "ring": 1, "ulysses": env.world_size, "tp": 1}
    with process_group(env, degrees, torch.device("cpu"), 60) as mesh:
        axis = mesh["ulysses"]
        sizes = split_sizes(tokens, axis.size)
        mine = [x.split(sizes, dim=1)[axis.rank] for x in qkv(batch, tokens, heads, dtype)]
        out = ulysses_attention(*mine, axis, tokens, attention_kernel("auto"))
        sent = axis.traffic["all_to_all"]
        return gather_dim(axis, out, 1, sizes), sent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "ranks"), [(1, 12, 4, 2), (2, 13, 5, 3), (3, 7, 5, 4), (2, 2, 4, 4)]
)
def test_equals_attention_over_all_tokens(batch, tokens, heads, ranks, dtype):
    expected = attention_kernel("auto")(*qkv(batch, tokens, heads, dtype))
    for out, _ in run_ranks(ranks, sharded, batch, tokens, heads, dtype):
        torch.testing.assert_close(out, expected)


def test_bytes_sent_are_the_formula():
    """Ulysses sends 4 (L/P) d (P-1)/P elements a layer."""
    tokens, heads, ranks = 16, 4, 4
    formula = 4 * (tokens // ranks) * (heads * 8) * (ranks - 1) // ranks * 4
    assert [sent for _, sent in run_ranks(ranks, sharded, 1, tokens, heads, torch.float32)] == [formula] * ranks
