"""The layers of tensor parallelism by themselves: a norm over the heads of all ranks, a row bias added once, widths
that do not divide; and the bytes that a whole forward sends."""

import pytest
import torch

from support.ranks import generate, run_cases
from support.sharded import mesh_of
from wan_dist.layers.sequence import split_range
from wan_dist.layers.tensor_parallel import split_column, split_rms_norm, split_row

FEATURES, HIDDEN, EPS = 96, 100, 1e-6


def parameter(*shape: int, seed: int) -> torch.nn.Parameter:
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.Parameter(1 + 0.2 * noise if seed == 0 else noise, requires_grad=False)


def whole_layers() -> tuple[torch.nn.RMSNorm, torch.nn.Linear, torch.nn.Linear]:
    norm = torch.nn.RMSNorm(FEATURES, eps=EPS)
    column, row = torch.nn.Linear(FEATURES, HIDDEN), torch.nn.Linear(HIDDEN, FEATURES)
    norm.weight = parameter(FEATURES, seed=0)
    for number, linear in enumerate((column, row)):
        linear.weight = parameter(*linear.weight.shape, seed=1 + number)
        linear.bias = parameter(*linear.bias.shape, seed=3 + number)
    return norm, column, row


def take_my_part(module: torch.nn.Module, of: torch.nn.Module) -> None:
    for name, tensor in of.named_parameters():
        loader = getattr(getattr(module, name), "weight_loader", lambda whole: whole)
        setattr(module, name, torch.nn.Parameter(loader(tensor), requires_grad=False))


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(2, 5, FEATURES, generator=torch.Generator().manual_seed(9))
    x[:, :, : FEATURES // 4] *= 30  # one rank's heads outweigh the others: no rank can guess the mean from its own
    x[0, 0] *= 1e-4  # so small that eps matters
    return x.to(dtype)


@torch.no_grad()
def parallel(env, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, dict[str, int]]:
    """`(this rank's features of the norm, the result of column and row, bytes sent)`"""
    with torch.device("meta"):
        norm, column, row = (
            torch.nn.RMSNorm(FEATURES, eps=EPS),
            torch.nn.Linear(FEATURES, HIDDEN),
            torch.nn.Linear(HIDDEN, FEATURES),
        )
    with mesh_of(env, tp=env.world_size) as mesh:
        axis = mesh["tp"]
        begin, end = split_range(FEATURES, axis.size, axis.rank)
        split_rms_norm(norm, axis, begin, end)
        mine = split_range(HIDDEN, axis.size, axis.rank)
        split_column(column, *mine)
        split_row(row, axis, *mine)
        for module, whole in zip((norm, column, row), whole_layers(), strict=True):
            take_my_part(module, whole)
            module.to(dtype)
        normed = norm(inputs(dtype)[..., begin:end])
        assert normed.dtype == dtype
        assert "weight_loader" not in vars(row.bias)  # whole on every rank
        return normed, row(column(inputs(dtype))), dict(mesh.traffic)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@torch.no_grad()
def test_layers_equal_whole_ones(ranks):
    norm, column, row = whole_layers()
    single, half = run_cases(ranks, parallel, [(torch.float32,), (torch.bfloat16,)])
    expected = row(column(inputs()))
    assert (torch.cat([normed for normed, _, _ in single], dim=-1) - norm(inputs())).abs().max() <= 1e-6
    for _, out, _ in single:
        assert torch.equal(out, single[0][1])
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-3)
    normed = torch.cat([normed for normed, _, _ in half], dim=-1)
    torch.testing.assert_close(normed.float(), norm(inputs(torch.bfloat16).float()), rtol=2**-7, atol=1e-4)
    as_a_ring_sends = [2 * (ranks - 1) * 2 * 5 * width * 4 // ranks for width in (1, FEATURES)]  # norm and row
    assert [sent for _, _, sent in single] == [{"all_reduce": sum(as_a_ring_sends)}] * ranks


def test_bytes_of_a_forward(tmp_path, checkpoints):
    """A block sums three outputs of width d for every token, and squares for q and k of both attentions: one number a
    token, and k of the text once a prompt."""
    path, blocks, width, tokens, text, steps = checkpoints(heads=4, layers=2), 2, 96, 32, 512, 3
    request = {"video.height": 64, "video.width": 64, "video.num_frames": 5}
    record = generate(tmp_path, path, **request, **{"parallelism.tp": 2, "sampler.guidance_scale": 1.0})["record"]
    numbers = blocks * (steps * tokens * (3 * width + 3) + text)
    for rank in record["ranks"]:
        assert rank["bytes_sent"]["all_reduce"] == numbers * 4  # 2 (P-1)/P of them, for P = 2
