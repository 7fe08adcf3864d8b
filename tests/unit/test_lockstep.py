"""Forwards side by side: each has its own result, each block travels once for all of them, and what a GPU is free to
run at the same time as a copy is never what the copy is for."""

import contextvars
import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from support.streaming import (
    BLOCKS,
    FAILING_WHERE,
    FailureError,
    FakeGpu,
    FakeStream,
    Streamed,
    assert_real,
    assert_right,
    failing,
    match_stack,
    requests,
    save_stack,
    stream_one,
    whole_stack,
)
from wan_dist.loading.weights import fill
from wan_dist.offload import lockstep, slots
from wan_dist.offload.host_blocks import HostBlocks
from wan_dist.offload.lockstep import in_lockstep
from wan_dist.offload.slots import SlotRing
from wan_dist.pipeline import streaming

CPU = torch.device("cpu")
STATE = whole_stack().state_dict()


@pytest.fixture(autouse=True)
def _without_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_stack(tmp_path_factory.mktemp("stacks") / "stack")


@pytest.fixture
def streamed(folder):
    """`streamed(prefetch=..., resident=...)`: the stack with its blocks streamed."""
    return lambda **how: stream_one(match_stack(folder), **how)


@pytest.mark.parametrize("where", FAILING_WHERE)
@pytest.mark.parametrize("branch", [0, 1])
def test_a_branch_that_fails_ends_the_other_and_both_run_again(streamed, branch, where):
    it, threads = streamed(prefetch=1), threading.active_count()
    assert_right(it)
    failing(it.model, where, skip=branch)
    with pytest.raises(FailureError):
        in_lockstep(it.stream, [partial(it.model, x) for x in requests(2)])
    assert threading.active_count() == threads
    assert it.stream.turns is None and not any(slot.in_use for slot in it.ring.slots)
    assert_real(it, STATE)
    assert_lockstep(it)
    assert_right(it)


@pytest.mark.parametrize("branch", [0, 1, 2])
@pytest.mark.parametrize("when", ["at once", "at the end"])
def test_a_branch_that_fails_outside_the_blocks(streamed, branch, when):
    it, threads, done = streamed(prefetch=1), threading.active_count(), []

    def run(number, x):
        if when == "at the end" or number != branch:
            it.model(x)
        if number == branch:
            raise FailureError(number)
        done.append(number)

    with pytest.raises(FailureError) as caught:
        in_lockstep(it.stream, [partial(run, number, x) for number, x in enumerate(requests(3))])
    assert caught.value.args == (branch,)
    assert threading.active_count() == threads
    assert done == (list(range(branch)) if when == "at the end" else [])
    assert_lockstep(it)


def assert_lockstep(it: Streamed) -> None:
    xs, whole = requests(2), whole_stack()
    for one, x in zip(in_lockstep(it.stream, [partial(it.model, x) for x in xs]), xs, strict=True):
        assert torch.equal(one, whole(x))
    assert_real(it, STATE)


@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize("prefetch", [0, 1, 2, 3, BLOCKS])
def test_in_lockstep_each_result_is_that_of_its_own_forward_and_weights_travel_half_as_often(
    streamed, prefetch, resident
):
    it, count, threads = streamed(prefetch=prefetch, resident=resident), BLOCKS - resident, threading.active_count()
    assert_lockstep(it)
    before = it.ring.copies
    for x in requests(2):
        it.model(x)
    serial = it.ring.copies - before
    for _ in range(2):
        before, late = it.ring.copies, it.ring.late
        assert_lockstep(it)
        assert it.ring.copies - before == serial / 2 == (0 if prefetch >= count - 1 else count)
        assert it.ring.late == late or prefetch == 0
    assert threading.active_count() == threads
    assert_right(it)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_forwards_in_their_order(streamed, count):
    it, whole, xs = streamed(), whole_stack(), requests(count)
    for _ in range(2):
        results = in_lockstep(it.stream, [partial(it.model, x) for x in xs])
        assert all(torch.equal(result, whole(x)) for result, x in zip(results, xs, strict=True))
    assert (it.ring.copies, it.ring.late) == (2 * BLOCKS + 1, 1)


ORDERS = [((0, 1), range(6)), (range(6), (0, 1)), ((), range(6)), (range(6), ()), ((5, 0), (0, 5)), ((3, 3), (0, 3, 4))]


@pytest.mark.parametrize("orders", ORDERS, ids=str)
def test_forwards_that_run_other_blocks_than_each_other(streamed, orders):
    it, whole, xs = streamed(), whole_stack(), requests(2)
    forwards = [partial(it.model, x, order) for x, order in zip(xs, orders, strict=True)]
    for _ in range(2):
        for result, x, order in zip(in_lockstep(it.stream, forwards), xs, orders, strict=True):
            assert torch.equal(result, whole(x, order))
    assert_lockstep(it)


def test_forwards_take_turns_behind_each_streamed_block_in_one_order(streamed):
    it, seen = streamed(resident=2), []
    names = ["conditional", "negative"]
    branch = contextvars.ContextVar("branch")
    for number, block in enumerate(it.model.blocks):
        block.register_forward_pre_hook(lambda *_args, number=number: seen.append((branch.get(), number)))

    def run(name):
        branch.set(name)
        return it.model(requests()[0])

    in_lockstep(it.stream, [partial(run, name) for name in names])
    expected = [(name, number) for visit in ((0,), (1,), (2, 3), (4,), (5,)) for name in names for number in visit]
    assert seen == expected


def test_a_forward_sees_its_callers_context(streamed):
    it, said = streamed(), contextvars.ContextVar("said", default="nothing")
    said.set("something")

    def look():
        it.model(requests()[0])
        return torch.is_grad_enabled(), said.get()

    assert in_lockstep(it.stream, [look, look]) == [(False, "something")] * 2
    with torch.enable_grad():
        assert in_lockstep(it.stream, [look, look]) == [(True, "something")] * 2


# What a GPU is free to run at the same time


@pytest.fixture
def gpu(monkeypatch):
    """A fake one, where rings of slots and their streams are."""
    fake = FakeGpu()
    monkeypatch.setattr(slots, "torch", fake)
    monkeypatch.setattr(lockstep, "torch", fake)
    monkeypatch.setattr(streaming, "SlotRing", lambda layouts, size, _device: SlotRing(layouts, size, _CUDA))
    monkeypatch.setattr(HostBlocks, "pin", lambda _self, _budget: 0)
    return fake


_CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefetch", [0, 1, 2, BLOCKS])
def test_copies_and_computing_wait_for_each_other_and_for_nothing_else(folder, gpu, prefetch, dtype):
    it, caller = stream_one(match_stack(folder, dtype), prefetch=prefetch), FakeStream("caller")
    whole = fill(match_stack(folder, dtype), device=CPU)

    def run(x, order=None):
        with gpu.running():
            return it.model(x, order)

    xs = [x.to(dtype) for x in requests(2)]
    with gpu.stream(caller):
        for order in (None, (0, 3, 3, 1), None):
            assert all(torch.equal(run(x, order), whole(x, order)) for x in xs)
        for _ in range(2):
            results = in_lockstep(it.stream, [partial(run, x) for x in xs])
            assert all(torch.equal(result, whole(x)) for result, x in zip(results, xs, strict=True))
    (copies,) = gpu.copy_streams
    assert copies.synchronized == 1  # when it was made
    assert len(gpu.touches) == min(prefetch + 1, BLOCKS) * len(it.ring.slots[0].buffers)
    for touches in gpu.touches.values():
        assert [touch.kind for touch in touches[:2]] in (["allocation", "write"], ["allocation"])
        for number, touch in enumerate(touches[1:], 1):
            assert touch.stream == (copies.name if touch.kind == "write" else "caller")
            assert not touch.is_blocking
            # A copy comes after all that used the memory before, a read after the copy that it reads.
            before = touches[:number] if touch.kind == "write" else [last_write(touches[:number])]
            assert all(earlier.is_before(touch) for earlier in before), number
    if prefetch in (1, 2):  # a copy does not wait for what computes beside it
        assert all(beside(gpu, copies.name))


def last_write(touches):
    return [touch for touch in touches if touch.kind == "write"][-1]


def beside(gpu, name: str) -> Iterator[bool]:
    """Of each memory, whether something else was read there while a copy into another one may have been under way."""
    everything = [touch for touches in gpu.touches.values() for touch in touches]
    reads = [touch for touch in everything if touch.kind == "read"]
    for touches in gpu.touches.values():
        writes = [touch for touch in touches if touch.kind == "write"]
        yield any(not read.is_before(copy) and not copy.is_before(read) for copy in writes for read in reads)
