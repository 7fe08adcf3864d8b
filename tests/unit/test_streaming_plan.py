"""How deep streaming prefetches: a block's copy against the computing of the blocks before it."""

from itertools import product
from math import ceil

import pytest

from support.plans import gpu, placed, work
from wan_dist.planning.placement import TO_SPARE, DoesNotFitError
from wan_dist.planning.streaming import Streaming, choose_streaming

MS = 1e-3
BLOCK = 703_000_000
LINK = 55e9
COPY_S = BLOCK / LINK


def chosen(compute_s: float | None, *, blocks: int = 40, **told) -> Streaming:
    return choose_streaming([BLOCK] * blocks, compute_s=compute_s, **{"bytes_per_s": LINK, **told})


@pytest.mark.parametrize(
    ("video", "ranks", "milliseconds"),
    [("720p", 1, 206), ("480p", 1, 53), ("720p", 2, 206 / 2), ("480p", 8, 53 / 8), ("720p", 8, 206 / 8)],
)
def test_a_block_of_the_14b(video, ranks, milliseconds):
    rank = work("14b", video, ulysses=ranks, attention_tflops=790.0)
    assert rank.weights["transformer"].blocks == pytest.approx([703e6] * 40, rel=0.002)
    assert rank.block_s == pytest.approx(milliseconds * MS, rel=0.02)
    assert rank.branches == 2
    assert work("14b", video, cfg=2, ulysses=ranks).branches == 1


@pytest.mark.parametrize(("video", "seconds"), [("720p", 19.1), ("480p", 4.74)])
def test_forty_blocks_and_two_branches_are_a_step(video, seconds):
    """At the usual rates, attention's being 648 TFLOP/s."""
    assert 2 * 40 * work("14b", video).block_s == pytest.approx(seconds, rel=0.03)


@pytest.mark.parametrize(
    ("video", "mesh", "hidden"),
    [
        ("720p", {}, True), ("720p", {"ulysses": 8}, True), ("720p", {"cfg": 2, "ulysses": 8}, True),
        ("480p", {}, True), ("480p", {"cfg": 2}, True), ("480p", {"ulysses": 2}, True),
        ("480p", {"cfg": 2, "ulysses": 8}, False), ("480p", {"ulysses": 16}, False),
        ("short", {}, False), ("short", {"ulysses": 8}, False),
    ],
)  # fmt: skip
def test_what_is_hidden(video, mesh, hidden):
    ranks = max([1, *mesh.values()])
    plan = placed(
        work("14b", video, fsdp="off", **mesh), gpu(24, local_ranks=ranks), fsdp="off", transformer="layerwise"
    )
    streaming = plan.streaming("transformer")
    assert streaming.copy_s == pytest.approx(12.8 * MS, rel=0.01)
    reason = next(p.reason for p in plan.placements if p.component == "transformer")
    if hidden:
        assert (streaming.prefetch, streaming.resident_blocks, streaming.hidden) == (1, 0, 1.0)
        assert not plan.warnings and streaming.exposed_s() == 0 and "100 % of the copying hidden" in reason
    else:
        assert streaming.is_transfer_bound and streaming.prefetch > 1
        (warning,) = plan.warnings
        assert "short clip" in warning and "12.8" in warning and f"{100 * streaming.hidden:.0f} %" in warning
        assert f"{100 * streaming.hidden:.0f} % of the copying hidden" in reason


def test_a_visit_serves_both_branches_of_serial_guidance():
    serial, halves = (
        placed(work("14b", "720p", fsdp="off", **mesh), gpu(24, local_ranks=8), transformer="layerwise", fsdp="off")
        for mesh in ({"ulysses": 8}, {"cfg": 2, "ulysses": 8})
    )
    assert serial.streaming("transformer").compute_s == 2 * halves.streaming("transformer").compute_s


def test_the_slower_link_decides():
    depths = []
    for rate in (55, 27, 3, 1):
        plan = placed(work("14b", "480p"), gpu(24, host_gb_s=rate), transformer="layerwise", resident_blocks=0)
        depths.append((plan.streaming("transformer").prefetch, bool(plan.warnings)))
    assert depths == [(1, False), (1, False), (2, True), (4, True)]


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.99, 1.0, 1.01, 1.5, 2.0, 2.01, 3.7, 4.0])
def test_the_smallest_depth_that_hides_a_copy(ratio):
    streaming = chosen(COPY_S / ratio)
    assert streaming.prefetch == max(1, ceil(ratio))
    assert streaming.resident_blocks == 0
    assert streaming.hidden == pytest.approx(min(1, 1 / ratio))


def test_a_deeper_ring_than_four_only_takes_memory():
    assert chosen(COPY_S / 100).prefetch == 4


@pytest.mark.parametrize("room", [0, 3, 20, 39, 40])
def test_blocks_stay_only_where_copying_takes_longer_and_no_more_than_hiding_takes(room):
    assert chosen(COPY_S, may_stay=room).resident_blocks == 0
    half = chosen(COPY_S / 2, may_stay=room)
    assert half.resident_blocks == min(room, 20)
    assert (half.hidden == 1.0) == (room >= 20)
    assert chosen(COPY_S / 2, may_stay=room, resident_blocks=2).resident_blocks == 2


def test_blocks_stay_as_far_as_there_is_room():
    for gigabytes in (15, 24, 40):
        machine = gpu(gigabytes)
        plan = placed(work("14b", "short"), machine, transformer="layerwise", text_encoder="component")
        streaming, usable = plan.streaming("transformer"), (1 - TO_SPARE) * machine.device_bytes
        enough = ceil(40 * (1 - streaming.compute_s / streaming.copy_s))
        assert 0 < streaming.resident_blocks <= enough
        block, denoising = work("14b", "short").weights["transformer"].blocks[0], plan.footprint.device["denoise"]
        assert streaming.resident_blocks == enough or denoising + 3 * block > usable  # the ring may be a block narrower
        assert denoising <= usable


@pytest.mark.parametrize("expert", ["transformer", "transformer_2"])
def test_two_experts_prefetch_two(expert):
    assert placed(work("a14b"), gpu(24)).streaming(expert).prefetch == 2
    assert placed(work("a14b"), gpu(24), prefetch=1).streaming(expert).prefetch == 1
    with pytest.raises(DoesNotFitError):
        placed(work("a14b"), gpu(24), prefetch=30)


@pytest.mark.parametrize("compute_s", [None, COPY_S / 3, 2 * COPY_S])
@pytest.mark.parametrize(("prefetch", "stay"), [(0, 0), (1, 3), (7, 40)])
def test_orders_are_kept(compute_s, prefetch, stay):
    streaming = chosen(compute_s, prefetch=prefetch, resident_blocks=stay, may_stay=40, least_prefetch=2)
    assert (streaming.prefetch, streaming.resident_blocks, streaming.blocks) == (prefetch, stay, 40)


def test_hidden_and_exposed_are_two_sides_of_one_time():
    for ratio, stay in product([0.2, 0.9, 1.0, 1.6, 3.0, 20.0], [0, 1, 13, 39, 40]):
        streaming = chosen(COPY_S / ratio, resident_blocks=stay)
        copying = (40 - stay) * COPY_S
        assert 0 <= streaming.hidden <= 1
        assert streaming.exposed_s() == pytest.approx(max(0.0, copying - 40 * COPY_S / ratio), abs=1e-9)
        assert streaming.exposed_s() == pytest.approx((1 - streaming.hidden) * copying, abs=1e-9)
        assert (streaming.exposed_s() > 1e-9) == (streaming.hidden < 1)


@pytest.mark.parametrize("told", [{"bytes_per_s": None}, {"blocks": 0}])
def test_where_no_copy_runs_beside_computing(told):
    streaming = chosen(COPY_S / 2, **told)
    assert (streaming.prefetch, streaming.resident_blocks, streaming.exposed_s()) == (1, 0, 0.0)
    assert not streaming.is_transfer_bound
