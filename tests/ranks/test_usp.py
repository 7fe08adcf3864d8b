"""Attention over a split sequence by itself: Ulysses, ring and their product equal attention over everything, for
batches, uneven parts, views and logits of any size; partial results are merged in fp32; bytes sent are the formulas."""

import pytest
import torch

from support.ranks import run_cases
from wan_dist.distributed.collectives import gather_dim
from wan_dist.distributed.process_group import process_group
from wan_dist.layers.attention import usp_attention
from wan_dist.layers.attention_kernels import attention_kernel
from wan_dist.layers.sequence import split_sizes

MESHES = [(1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 2)]  # ring x ulysses
# batch, tokens, heads: even; uneven tokens and heads; a token for some ranks only; one token in all
SHAPES = [(1, 12, 4), (2, 13, 5), (3, 7, 5), (2, 2, 4), (2, 1, 4)]
DTYPES = [torch.float32, torch.bfloat16]


def qkv(batch: int, tokens: int, heads: int, dtype: torch.dtype, logits: float = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(batch + tokens)
    q, k, v = (torch.randn(batch, tokens, heads, 8, generator=generator).to(dtype) for _ in range(3))
    return [q * logits, k, v]


def exact(q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor) -> torch.Tensor:
    """The softmax written out, fp64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2)


def sharded(env, ring: int, ulysses: int, kernel: str, requests: list[tuple]) -> list[tuple[torch.Tensor, dict]]:
    """For each request to `qkv`: attention from this rank's part of it, gathered, and the bytes that it sent."""
    degrees = {"dp": 1, "cfg": 1, "ring": ring, "ulysses": ulysses, "tp": 1}
    answers = []
    with process_group(env, degrees, torch.device("cpu"), 20) as mesh:
        sp = mesh["sp"]
        for request in requests:
            tokens = request[1]
            sizes = split_sizes(tokens, sp.size)
            mine = [x.split(sizes, dim=1)[sp.rank] for x in qkv(*request)]
            mesh.traffic.clear()
            out = usp_attention(*mine, mesh["ring"], mesh["ulysses"], tokens, attention_kernel(kernel))
            assert out.dtype == request[3]
            sent = dict(mesh.traffic)
            answers.append((gather_dim(sp, out, 1, sizes), sent))
    return answers


def on_meshes(meshes: list[tuple[int, int]], requests: list[tuple], kernel: str = "auto"):
    """`(mesh, request, the results of its ranks)` for every pair, with one start of the workers per number of ranks."""
    for ranks in sorted({ring * ulysses for ring, ulysses in meshes}):
        these = [mesh for mesh in meshes if mesh[0] * mesh[1] == ranks]
        results = run_cases(ranks, sharded, [(*mesh, kernel, requests) for mesh in these])
        for mesh, by_rank in zip(these, results, strict=True):
            for number, request in enumerate(requests):
                yield mesh, request, [answers[number] for answers in by_rank]


@pytest.mark.parametrize("kernel", ["auto", "math"])
def test_equals_attention_over_all_tokens(kernel):
    requests = [(*shape, dtype) for shape in SHAPES for dtype in DTYPES]
    for mesh, request, by_rank in on_meshes(MESHES, requests, kernel):
        expected = attention_kernel(kernel).whole(*qkv(*request))
        parts_are_rounded = mesh[0] > 1 and request[3] is torch.bfloat16
        limits = {"rtol": 2**-7, "atol": 8e-3} if parts_are_rounded else {}
        for out, _ in by_rank:
            torch.testing.assert_close(out, expected, **limits, msg=lambda text, at=(mesh, request): f"{at}: {text}")


@pytest.mark.parametrize("logits", [1, 1000])
def test_no_further_from_exact_than_one_kernel_is(logits):
    """Also where softmax is all but one-hot and a plain exponential would overflow. The merge is in fp32, so that all
    it adds is the rounding of its parts."""
    requests = [(2, 203, 5, dtype, logits) for dtype in DTYPES]
    for mesh, request, by_rank in on_meshes([(2, 1), (3, 1), (4, 1), (2, 2)], requests):
        expected = exact(*qkv(*request))
        alone = (attention_kernel("auto").whole(*qkv(*request)) - expected).square().mean().sqrt()
        for out, _ in by_rank:
            assert out.isfinite().all()
            error = (out - expected).square().mean().sqrt()
            assert error <= 1.4 * alone, (mesh, request, error / alone)


def test_bytes_sent_are_the_formulas():
    """L tokens of width d over P ranks, in elements a rank: Ulysses 4 (L/P) d (P-1)/P, ring 2 (L/P) d (P-1)."""
    tokens, heads, dim = 24, 4, 8
    request = (1, tokens, heads, torch.float32)
    for (ring, ulysses), _, by_rank in on_meshes(MESHES, [request]):
        group, width = tokens // ring, heads * dim  # what one Ulysses group shares
        for rank, (_, sent) in enumerate(by_rank):
            mine = width // ulysses if heads % ulysses == 0 else split_sizes(heads, ulysses)[rank] * dim
            assert sent.get("p2p", 0) == 2 * group * mine * (ring - 1) * 4
            if heads % ulysses == 0:
                assert sent.get("all_to_all", 0) == 4 * (group // ulysses) * width * (ulysses - 1) // ulysses * 4
