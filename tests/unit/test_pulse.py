"""What a rank publishes of itself, and that it costs the rank nothing."""

import ctypes
import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from wan_dist.agent.watchdog import ask_for_stacks
from wan_dist.distributed import collectives
from wan_dist.distributed.collectives import PeerLostError, wait_for_first
from wan_dist.distributed.mesh import Axis
from wan_dist.output.pulse import DONE, STAGES, Heartbeat, Pulse, next_stage, pulse_key, stacks_on_signal, waiting_for


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def published(store, rank=0, until=lambda _heartbeat: True) -> Heartbeat:
    """The first heartbeat that is as wished."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if store.check([pulse_key(rank)]):
            heartbeat = Heartbeat.loads(store.get(pulse_key(rank)))
            if until(heartbeat):
                return heartbeat
        time.sleep(0.005)
    raise AssertionError("nothing of the kind was published")


def test_what_is_published(store):
    pulse = Pulse(store, 0, interval_s=0.01)
    first = published(store)
    assert (first.rank, first.phase, first.marks, first.limit) == (0, "start", 0, None)
    pulse.allow({"denoise": 12.5})
    pulse.mark("denoise", 7, 20)
    then = published(store, until=lambda heartbeat: heartbeat.marks == 1)
    assert (then.phase, then.step, then.of, then.limit, then.waiting) == ("denoise", 7, 20, 12.5, None)
    assert then.pid == first.pid and then.beat > first.beat and then.since < 1
    later = published(store, until=lambda heartbeat: heartbeat.beat > then.beat + 3)
    assert later.marks == 1 and later.since > then.since
    pulse.mark("other")
    assert published(store, until=lambda heartbeat: heartbeat.phase == "other").limit is None
    pulse.close()
    last = published(store)
    assert last.phase == DONE and last.marks == 3
    assert set(json.loads(store.get(pulse_key(0)))) >= {"host", "pid", "of", "since", "beat"}
    pulse.close()


def test_nobody_watches():
    threads = threading.active_count()
    pulse = Pulse(None, 0)
    pulse.allow({})
    pulse.mark("denoise", 1, 2)
    assert threading.active_count() == threads  # nothing is published
    pulse.close()


def test_a_mark_costs_about_a_microsecond():
    pulse, best = Pulse(None, 0), 1.0
    for _ in range(5):
        start = time.perf_counter()
        for step in range(1000):
            pulse.mark("denoise", step, 1000)
        best = min(best, (time.perf_counter() - start) / 1000)
    assert best < 5e-6


def test_a_store_that_goes_away_ends_it_quietly(capfd):
    class Gone:
        def clone(self):
            raise dist.DistNetworkError("gone")

    pulse = Pulse(Gone(), 0)
    pulse._thread.join(2)
    assert not pulse._thread.is_alive()
    pulse.mark("denoise")
    pulse.close()
    assert capfd.readouterr() == ("", "")


def test_a_connection_of_its_own(store):
    """A thread that waits in the store that was given does not hold up the pulse."""
    client = dist.TCPStore("127.0.0.1", store.port, is_master=False)
    waiting = threading.Thread(target=client.get, args=("awaited",), daemon=True)
    waiting.start()
    pulse = Pulse(client, 3, interval_s=0.01)
    assert published(store, 3).rank == 3
    store.set("awaited", "")
    waiting.join(5)
    pulse.close()


def in_thread(function):
    """What a thread that is in `function` waits for; `function` is called with the event that it may wait for."""
    found, enough = [], threading.Event()
    thread = threading.Thread(target=function, args=(enough,), daemon=True)
    thread.start()
    time.sleep(0.03)
    found.append(waiting_for(thread.ident))
    enough.set()
    thread.join(5)
    return found[0]


def test_what_a_thread_waits_for(monkeypatch):
    axis = Axis("ulysses")

    class Store:
        def __init__(self, event):
            self._event = event

        def wait(self, *_args):
            self._event.wait(5)
            raise RuntimeError

    def first(event):
        mesh = SimpleNamespace(store=Store(event), world=SimpleNamespace(rank=1))
        with pytest.raises(PeerLostError):
            wait_for_first(mesh, "video written")

    assert in_thread(lambda event: event.wait(5)) is None
    assert in_thread(lambda event: collectives._run(axis, "all_to_all", lambda: event.wait(5))) == (
        "all_to_all over axis ulysses"
    )
    assert in_thread(first) == "wait_for_first (video written)"
    assert waiting_for(-1) is None


def test_what_torch_itself_waits_for(store):
    library = {"__name__": "torch.distributed.fsdp.units"}
    exec("def wait_for_unshard(store):\n    store.wait(['it'])", library)

    def wait(event):
        library["wait_for_unshard"](client)

    client = dist.TCPStore("127.0.0.1", store.port, is_master=False)
    thread = threading.Thread(target=wait, args=(None,), daemon=True)
    thread.start()
    time.sleep(0.03)
    assert waiting_for(thread.ident) == "wait_for_unshard of torch.distributed.fsdp.units"
    store.set("it", "")
    thread.join(5)


@pytest.mark.parametrize(
    ("phases", "stage"),
    [
        (["check", "encode", "load", "denoise"], "denoise"),
        (["denoise", "write", "load"], "decode"),
        (["denoise", "load"], "decode"),
        (["load", "decode", "write", "decode"], "write"),
        (["load", "bench"], "load"),
        (["load", "encode"], "load"),
    ],
)
def test_stages_never_fall(phases, stage):
    reached = 0
    for phase in phases:
        assert next_stage(reached, phase) >= reached
        reached = next_stage(reached, phase)
    assert reached == STAGES[stage]


def test_stacks_come_while_the_interpreter_is_held(tmp_path):
    """By a loop in C that never lets another thread run; the signal's handler needs none."""
    log = tmp_path / "a folder" / "rank0.log"
    log.parent.mkdir()
    log.write_text("what was there\n")
    pid = os.fork()
    if pid == 0:
        stacks_on_signal(log)
        while True:
            ctypes.PyDLL(None).sleep(60)  # PyDLL keeps the lock
    try:
        deadline = time.monotonic() + 5
        while "in test_stacks_come_while_the_interpreter_is_held" not in log.read_text():
            assert time.monotonic() < deadline
            ask_for_stacks([pid])
            time.sleep(0.05)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert log.read_text().startswith("what was there\n")
