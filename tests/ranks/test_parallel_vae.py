"""A VAE whose rows are split over ranks: decoding and encoding equal diffusers' own for both VAEs, for row counts that
divide and that do not, for fewer rows than ranks, in every memory format, after another size and after a failure; and
what is sent has the format of what is received.

Starting workers is what costs: those of one world size do all of their work in one start (`world_of`).
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from support.messages import Log, logged
from support.ranks import run_cases
from support.sharded import mesh_of
from support.tiers import in_all
from support.vae import KINDS, Clip, decoded, encoded, laid_out, latents, random_vae, stride_of, video
from wan_dist.distributed.mesh import AXES, Axis, Mesh, build_mesh
from wan_dist.layers.halo import RowSplit, gather_rows, halo_rows, rows_to_first, surrounded
from wan_dist.layers.sequence import split_sizes
from wan_dist.models.wan_vae import ParallelVae, parallelize_vae

LIMIT = 2e-5
WORLDS = (1, 2, 3, *in_all(4, 8))
ENCODING_WORLDS = (3, *in_all(4, 8))
FORMAT_WORLDS = (2, *in_all(1, 4))
OTHER_WORLDS = (3,)  # for all the rest: an odd number of ranks, more than some clips have rows
ROWS_AND_FRAMES = ((60, 1), (7, 17), (44, 9), (2, 5), (90, 5), (5, 9), (45, 1), (1, 17))


@dataclass(frozen=True)
class Job:
    """work: `decode` or `encode`. layout: of what goes in, see `laid_out`."""

    work: str
    clip: Clip
    channels_last: bool = False
    layout: str = "plain"
    dtype: torch.dtype = torch.float32


def decodes_of(world_size: int) -> list[Job]:
    """Every number of rows, and each VAE with every number of frames; the other VAE on the next world size."""
    shift = WORLDS.index(world_size)
    return [
        Job("decode", Clip(KINDS[(number // 2 + shift) % 2], *sizes)) for number, sizes in enumerate(ROWS_AND_FRAMES)
    ]


ENCODED = [
    Job("encode", clip)
    for clip in (
        *(Clip("wan2.1", 480 // 8, frames) for frames in (5, 9)),
        Clip("wan2.1", 720 // 8, 5),
        Clip("wan2.2", 480 // 16, 9),
        *(Clip("wan2.2", 720 // 16, frames) for frames in (5, 9)),
        Clip("wan2.1", 2, 9),  # fewer rows than ranks
        Clip("wan2.2", 1, 5),
        Clip("wan2.2", 7, 1),
    )
]
FORMATS = [
    Job(work, Clip(kind, 5), channels_last, layout)
    for work in ("decode", "encode")
    for kind in KINDS
    for channels_last in (False, True)
    for layout in ("plain", "channels last", "permuted")
]
SMOOTH = [Job("decode", Clip(kind, 9, content=content)) for kind in KINDS for content in ("constant", "ramp")]
ODD_CHANNELS = [
    Job(work, Clip(kind, 7, batch=2), channels_last)
    for work in ("decode", "encode")
    for kind, channels_last in (("wan2.1 of 5 channels", False), ("wan2.2 of 3 channels", True))
]
HALF = [Job(work, Clip(kind, 7), dtype=torch.bfloat16) for work in ("decode", "encode") for kind in KINDS]


def jobs_of(world_size: int) -> list[Job]:
    return [
        *decodes_of(world_size),
        *(ENCODED if world_size in ENCODING_WORLDS else []),
        *(FORMATS if world_size in FORMAT_WORLDS else []),
        *([*SMOOTH, *ODD_CHANNELS, *HALF] if world_size in OTHER_WORLDS else []),
    ]


class Vaes(dict):
    """By `(kind, channels_last, dtype)`; made once, so that all requests of a kind meet the same one."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def __missing__(self, key: tuple) -> ParallelVae:
        kind, channels_last, dtype = key
        self[key] = parallelize_vae(random_vae(kind, dtype), self.mesh, channels_last=channels_last)
        return self[key]


def answer(vae: ParallelVae, job: Job) -> torch.Tensor | None:
    """Of a decode, this rank's rows; of an encode, what it returned."""
    if job.work == "decode":
        frames = list(vae.decode(laid_out(latents(job.clip), job.layout)))
        return torch.cat(frames, dim=2) if frames else None
    pixels = laid_out(video(job.clip), job.layout)
    return vae.encode(job.clip.frames, pixels.shape[3], lambda begin, end: pixels[..., begin:end, :])


# One after the other on one VAE. `left` is given up after its first frame, `fails` in the model at its second.
SUCCESSION = [
    ("", Job("decode", Clip("wan2.1", 9))),
    ("", Job("decode", Clip("wan2.1", 4))),
    ("", Job("encode", Clip("wan2.1", 7, batch=2))),
    ("", Job("decode", Clip("wan2.1", 7, batch=2))),
    ("left", Job("decode", Clip("wan2.1", 6))),
    ("", Job("decode", Clip("wan2.1", 5))),
    ("left", Job("decode", Clip("wan2.1", 9))),
    ("", Job("encode", Clip("wan2.1", 6))),
    ("fails", Job("decode", Clip("wan2.1", 6))),
    ("", Job("decode", Clip("wan2.1", 5))),
    ("", Job("encode", Clip("wan2.1", 5))),
    ("fails", Job("encode", Clip("wan2.1", 6))),
    ("", Job("encode", Clip("wan2.1", 4))),
    ("", Job("decode", Clip("wan2.1", 6))),
]


def in_succession(vae: ParallelVae) -> list[torch.Tensor | None]:
    found = []
    for how, job in SUCCESSION:
        if how == "left":
            next(vae.decode(latents(job.clip)), None)
        elif how == "fails":
            fail(vae, job)
        else:
            found.append(answer(vae, job))
    return found


def fail(vae: ParallelVae, job: Job) -> None:
    last = (vae.model.decoder if job.work == "decode" else vae.model.encoder).conv_out
    with patch.object(last, "forward", fails_the_second_time(last.forward)):
        try:
            answer(vae, job)
        except RuntimeError as error:
            assert str(error) == "as if out of memory"
        else:
            assert not vae.split.works


def fails_the_second_time(function: Callable) -> Callable:
    calls = itertools.count()

    def forward(*args: Any) -> Any:
        if next(calls) == 1:
            raise RuntimeError("as if out of memory")
        return function(*args)

    return forward


# Coarsest rows, layout. What the pieces of the parallel VAE do by themselves, at a level twice as fine.
PIECES = [(rows, layout) for rows in (7, 2) for layout in ("plain", "channels last", "permuted")]


def image(rows: int) -> torch.Tensor:
    """Several batches, channels, frames and columns: in channels-last order its parts are views of no plain one."""
    return torch.randn(2, 8, 3, 2 * rows, 3, generator=torch.Generator().manual_seed(rows))


def pieces(mesh: Mesh, rows: int, layout: str) -> dict[str, torch.Tensor | None]:
    """`gathered`, `first` (rows gathered on the first rank), `around` (2 rows above, 1 below), `attended`; of ranks
    that hold rows."""
    split = RowSplit(mesh["vae"])
    split.share(rows)
    if not split.works:
        return {}
    begin, end = (2 * row for row in split.mine)
    mine = laid_out(image(rows), layout)[..., begin:end, :]
    parts = [mine[:, :, :1], mine[:, :, 1:]]
    vae = parallelize_vae(random_vae("wan2.1"), mesh)
    vae.split.share(rows)
    return {
        "gathered": gather_rows(mine, split, 3),
        "first": rows_to_first(mine, split, 3),
        "around": surrounded(parts, halo_rows(parts, split, 2, 1), 2, 1),
        "attended": vae.model.encoder.mid_block.attentions[0](mine),
    }


@dataclass
class Found:
    """What one rank found."""

    jobs: dict[Job, torch.Tensor | None]
    succession: list[torch.Tensor | None]
    pieces: list[dict[str, torch.Tensor | None]]
    log: Log


@torch.no_grad()
def on_rank(env) -> Found:
    with mesh_of(env, timeout_s=20, ulysses=env.world_size) as mesh, logged() as log:
        vaes, others = Vaes(mesh), env.world_size in OTHER_WORLDS
        return Found(
            {job: answer(vaes[job.clip.kind, job.channels_last, job.dtype], job) for job in jobs_of(env.world_size)},
            in_succession(vaes["wan2.1", False, torch.float32]) if others else [],
            [pieces(mesh, *case) for case in PIECES] if others else [],
            log,
        )


def world_of(ranks: int) -> list[Found]:
    """By rank; what failed once is not started again for the next test."""
    outcome = outcome_of(ranks)
    if isinstance(outcome, AssertionError):
        raise outcome
    return outcome


@functools.cache
def outcome_of(ranks: int) -> list[Found] | AssertionError:
    try:
        return run_cases(ranks, on_rank, [()])[0]
    except AssertionError as error:
        return error


def expected(job: Job) -> torch.Tensor:
    return (decoded if job.work == "decode" else encoded)(job.clip, job.dtype)


def joined(job: Job, by_rank: list[torch.Tensor | None]) -> torch.Tensor:
    """The whole answer; of a decode every rank has the rows that `tensor_split` gives it."""
    if job.work == "encode":
        assert all(others is None for others in by_rank[1:])
        return by_rank[0]
    stride = stride_of(job.clip.kind)
    sizes = [size * stride for size in split_sizes(job.clip.rows, len(by_rank))]
    assert [0 if part is None else part.shape[3] for part in by_rank] == sizes
    return torch.cat([part for part in by_rank if part is not None], dim=3)


def found(ranks: int, job: Job) -> torch.Tensor:
    return joined(job, [rank.jobs[job] for rank in world_of(ranks)])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return (one.float() - other.float()).abs().max().item()


def assert_serial(ranks: int, jobs: list[Job]) -> None:
    differences = {job: apart(found(ranks, job), expected(job)) for job in jobs}
    assert max(differences.values()) <= LIMIT, {job: by for job, by in differences.items() if by > LIMIT}


@pytest.mark.parametrize("ranks", WORLDS)
def test_decode_equals_the_serial_one(ranks):
    assert_serial(ranks, decodes_of(ranks))


@pytest.mark.parametrize("ranks", ENCODING_WORLDS)
def test_encode_equals_the_serial_one(ranks):
    assert_serial(ranks, ENCODED)
    for job in ENCODED:
        assert apart(found(ranks, job)[..., -1:, :], expected(job)[..., -1:, :]) <= LIMIT, job


@pytest.mark.parametrize("ranks", FORMAT_WORLDS)
def test_memory_formats_of_weights_and_inputs(ranks):
    assert_serial(ranks, FORMATS)
    followed = [follows for rank in world_of(ranks) for follows in rank.log.followed]
    assert followed
    assert all(followed)


@pytest.mark.parametrize("ranks", WORLDS)
def test_both_ends_of_a_message_have_one_format(ranks):
    logs = [rank.log for rank in world_of(ranks)]
    for rank, log in enumerate(logs):
        assert all(all(contiguous) for contiguous in log.others.values()), log.others
        assert bool(log.sent) == (ranks > 1)
        for peer in range(ranks):
            sent, received = log.sent[peer], logs[peer].received[rank]
            assert all(one.contiguous for one in (*sent, *received)), f"from {rank} to {peer}"
            assert sent == received, f"from {rank} to {peer}"


@pytest.mark.parametrize("ranks", OTHER_WORLDS)
def test_odd_numbers_of_channels_and_several_clips(ranks):
    assert_serial(ranks, ODD_CHANNELS)


@pytest.mark.parametrize("ranks", OTHER_WORLDS)
def test_no_seam_where_the_serial_one_has_none(ranks):
    for job in SMOOTH:
        stride = stride_of(job.clip.kind)
        seams = [row * stride for row in accumulate(split_sizes(job.clip.rows, ranks)[:-1])]
        assert len(seams) == ranks - 1
        steps, serial = (x.diff(dim=-2)[..., [seam - 1 for seam in seams], :].abs() for x in both(ranks, job))
        assert (steps <= serial + LIMIT).all(), job


def both(ranks: int, job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    return found(ranks, job), expected(job)


@pytest.mark.parametrize("ranks", OTHER_WORLDS)
def test_bfloat16(ranks):
    """About as far from the answer in fp32 as the serial one is."""
    for job in HALF:
        whole, serial = both(ranks, job)
        exact = expected(replace(job, dtype=torch.float32))
        assert whole.dtype == torch.bfloat16
        assert apart(whole, serial) <= 2 * apart(serial, exact), job
        errors = [(x.float() - exact).square().mean().sqrt() for x in (whole, serial)]
        assert errors[0] <= 1.2 * errors[1], (job, errors)


@pytest.mark.parametrize("ranks", OTHER_WORLDS)
def test_one_request_after_another(ranks):
    """Of another size, for several clips, after one that was given up, and after one that failed."""
    jobs = [job for how, job in SUCCESSION if not how]
    for number, job in enumerate(jobs):
        whole = joined(job, [rank.succession[number] for rank in world_of(ranks)])
        assert apart(whole, expected(job)) <= LIMIT, (number, job)


@pytest.mark.parametrize("ranks", OTHER_WORLDS)
def test_pieces(ranks):
    attention = random_vae("wan2.1").encoder.mid_block.attentions[0]
    for number, (rows, layout) in enumerate(PIECES):
        whole, sizes = image(rows), split_sizes(rows, ranks)
        around, attended = F.pad(whole, (0, 0, 2, 1)), attention(whole)
        for rank, (begin, size) in enumerate(zip(accumulate(sizes, initial=0), sizes, strict=False)):
            piece, at = world_of(ranks)[rank].pieces[number], (rank, rows, layout)
            assert bool(piece) == (size > 0), at
            if not piece:
                continue
            begin, end = 2 * begin, 2 * (begin + size)
            assert torch.equal(piece["gathered"], whole), at
            assert torch.equal(piece["first"], whole) if rank == 0 else piece["first"] is None, at
            assert torch.equal(piece["around"], around[..., begin : end + 3, :]), at
            assert apart(piece["attended"], attended[..., begin:end, :]) <= LIMIT, at


class Asked(Exception):  # noqa: N818
    pass


def test_each_rank_asks_for_the_pixels_of_its_own_rows():
    def pixel_rows(begin: int, end: int) -> torch.Tensor:
        raise Asked(begin, end)  # before anything is sent

    model, asked = random_vae("wan2.2"), []
    for rank in range(8):
        mesh = Mesh({"vae": Axis("vae", rank, 8)}, Axis("world", rank, 8), Counter())
        with pytest.raises(Asked) as caught:
            parallelize_vae(model, mesh).encode(5, 720, pixel_rows)
        asked.append(caught.value.args)
    ends = [*accumulate(16 * size for size in (6, 6, 6, 6, 6, 5, 5, 5))]
    assert asked == list(zip([0, *ends], ends, strict=False))


def test_refuses_what_the_vae_would_cut():
    vae = parallelize_vae(random_vae("wan2.2"), build_mesh(dict.fromkeys(AXES, 1), "cpu"))
    for frames in (0, 2, 4, 6, 8):
        with pytest.raises(ValueError, match=f"{frames} frames"):
            vae.encode(frames, 32, pytest.fail)
    for rows in (8, 40, 33):
        with pytest.raises(ValueError, match=f"{rows} rows .* multiple of 16"):
            vae.encode(5, rows, pytest.fail)
