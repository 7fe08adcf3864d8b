"""Who is found to hold up a run, by a clock that tests set; and a watchdog over processes that are stopped or hang."""

import os
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch.distributed as dist

from wan_dist.agent import watchdog
from wan_dist.agent.watchdog import Seen, Stall, Suspect, Watchdog, handles, judge, process_state
from wan_dist.output.pulse import STACKS_SIGNAL, STAGES, Heartbeat, Pulse, pulse_key, stacks_on_signal

LIMIT = 20.0
IN_COLLECTIVE = "all_to_all over axis ulysses"


class Ranks:
    """A run of which a test says what happens, second by second; a rank that is not told anything goes on publishing
    and makes no progress."""

    def __init__(self, world_size=2, present=None, state=None):
        self.now, self.seen, self.stopped = 0.0, Seen(world_size), set()
        self.state = state or (lambda _heartbeat: None)
        present = range(world_size) if present is None else present
        self.beats = {
            rank: Heartbeat(
                rank=rank,
                host="node",
                pid=100 + rank,
                phase="denoise",
                stage=STAGES["denoise"],
                step=7,
                of=20,
                marks=50,
                since=0.0,
                limit=LIMIT,
                beat=1,
                waiting=None,
            )
            for rank in present
        }

    def tell(self, *ranks, **values):
        for rank in ranks:
            if "phase" in values:
                values["stage"] = STAGES.get(values["phase"], self.beats[rank].stage)
            self.beats[rank] = replace(self.beats[rank], **values)

    def progress(self, rank):
        self.tell(rank, marks=self.beats[rank].marks + 1, step=self.beats[rank].step + 1)

    def after(self, seconds, working=(), every=1.0) -> Stall | None:
        """The first stall within so many seconds, in which `working` ranks make progress."""
        for half_seconds in range(int(seconds * 2)):
            self.now += 0.5
            for rank in set(self.beats) - self.stopped:
                self.tell(rank, beat=self.beats[rank].beat + 1)
            if half_seconds % int(every * 2) == 0:
                for rank in working:
                    self.progress(rank)
            self.seen.note(self.beats.values(), self.now)
            stall = judge(self.seen, self.now, self.state)
            if stall is not None:
                return stall
        return None

    def named(self, seconds=LIMIT + 1, **told) -> list[int]:
        stall = self.after(seconds, **told)
        assert stall is not None
        return [suspect.rank for suspect in stall.suspects]


def test_the_only_rank_stopped():
    ranks = Ranks(1, state=lambda _heartbeat: "T")
    assert ranks.after(5, working=[0]) is None
    ranks.stopped = {0}
    stall = ranks.after(LIMIT + 1)
    assert stall == Stall(20.0, (stall.slowest,))
    assert stall.message(Path("/run")) == (
        "no progress for 20 s (runtime.stall_timeout_s): rank 0 on node (pid 100), phase denoise, step 12 of 20, "
        "does not respond, its process is stopped (SIGSTOP?)\n"
        "the stacks of all ranks are in their logs: /run/rank*.log"
    )


@pytest.mark.parametrize("waiting", [IN_COLLECTIVE, None])
def test_one_of_two_stopped_while_the_other_waits_for_it(waiting):
    ranks = Ranks(2)
    ranks.after(5, working=[0, 1])
    ranks.stopped = {1}
    ranks.tell(1, step=15)  # further than the one that waits
    ranks.tell(0, waiting=waiting)
    assert ranks.named() == [1]


def test_all_stopped_and_more_than_a_message_has_room_for():
    ranks = Ranks(6, state=lambda _heartbeat: "T")
    ranks.stopped = set(range(6))
    stall = ranks.after(LIMIT + 1)
    assert [suspect.rank for suspect in stall.suspects] == list(range(6))
    assert "rank 3 on node" in stall.message() and stall.message().endswith("; and as much rank 4, 5")


def test_a_rank_is_stopped_just_before_the_others_patience_ends():
    """Then it is open for a moment whether it responds."""
    elsewhere, here = Ranks(2), Ranks(2, state=lambda heartbeat: "T" if heartbeat.rank == 1 else "S")
    for ranks in (elsewhere, here):
        ranks.after(LIMIT - 1)
        ranks.stopped = {1}
        ranks.tell(0, step=6)
    assert here.named(1.5) == [1]
    assert elsewhere.after(1.5) is None
    assert elsewhere.named(4) == [1]


def test_a_rank_that_publishes_now_and_then_does_not_put_the_verdict_off_for_ever():
    ranks = Ranks(2)
    ranks.after(LIMIT - 2)
    stalls = []
    for _ in range(4):
        ranks.stopped = {1}
        stalls.append(ranks.after(2))
        ranks.stopped = set()
        stalls.append(ranks.after(0.5))
    assert any(stalls)


def test_the_one_that_is_not_in_the_collective_is_named():
    ranks = Ranks(4)
    ranks.tell(0, 1, 3, waiting=IN_COLLECTIVE)
    stall = ranks.after(LIMIT + 1)
    (suspect,) = stall.suspects
    assert (suspect.rank, suspect.why) == (2, f"is not in a collective, others wait in {IN_COLLECTIVE}")


def test_writing_is_no_later_than_loading_for_those_who_wait_to_load():
    ranks = Ranks(2)
    ranks.tell(0, phase="write", step=0)
    ranks.tell(1, phase="load", step=0, stage=STAGES["decode"], waiting="gather_objects over axis world")
    assert ranks.named() == [0]


@pytest.mark.parametrize("waiting", [None, IN_COLLECTIVE])
def test_what_nothing_tells_apart_is_named_together_else_the_earliest_step(waiting):
    ranks = Ranks(3)
    ranks.tell(0, 1, 2, waiting=waiting)
    assert ranks.named() == [0, 1, 2]
    ranks.progress(1)
    assert ranks.named() == [0, 2]
    ranks.progress(0)
    ranks.tell(2, phase="load", step=19)
    stall = ranks.after(LIMIT + 1)
    assert stall.slowest.place == "phase load, 19 of 20"
    assert ("is not in a collective" in stall.slowest.why) is (waiting is None)


def test_halves_of_cfg_that_drift_and_one_rank_that_works_for_long_while_others_wait():
    ranks = Ranks(2)
    ranks.tell(1, waiting=IN_COLLECTIVE)
    assert ranks.after(100, working=[0], every=10) is None
    ranks.tell(0, phase="write", step=0)  # one file, at a frame every 19 s
    assert ranks.after(200, working=[0], every=19) is None
    assert ranks.named() == [0]


def test_ranks_that_are_done_are_waited_for_no_more():
    ranks = Ranks(2)
    ranks.tell(0, phase="done", limit=None)
    ranks.stopped = {0}
    assert ranks.after(100, working=[1]) is None
    assert ranks.named() == [1]
    ranks.tell(1, phase="done", limit=None)
    assert ranks.after(100) is None


def test_one_never_reports():
    ranks = Ranks(3, present=[0, 2])
    ranks.tell(0, 2, phase="start", step=0, of=0, waiting="init_process_group")
    stall = ranks.after(LIMIT + 1)
    assert [suspect.rank for suspect in stall.suspects] == [1]
    assert str(stall.slowest) == "rank 1, phase start, has not reported at all: it is still starting, or cannot"


def test_nobody_reports():
    assert Ranks(2, present=[]).after(500) is None
    stall = Ranks(2, present=[]).after(1000)
    assert [suspect.rank for suspect in stall.suspects] == [0, 1]
    assert "has not reported at all" in stall.message()


def test_what_is_not_judged():
    ranks = Ranks(2)
    ranks.tell(0, 1, limit=None)
    assert ranks.after(1000) is None
    ranks.tell(0, limit=LIMIT)
    assert ranks.after(1000) is None


def test_a_rank_that_is_not_judged_any_more_but_stopped_has_its_last_limit():
    ranks = Ranks(1)
    ranks.after(1)
    ranks.tell(0, limit=None, phase="other")
    assert ranks.after(100) is None
    ranks.stopped = {0}
    assert ranks.named(4) == [0]  # its last mark is long ago: as soon as it is silent
    never = Ranks(1)
    never.tell(0, limit=None)
    never.stopped = {0}
    assert never.after(1000) is None


def test_the_longest_limit_of_all_ranks_and_no_shorter_one_than_can_be_seen():
    ranks = Ranks(2)
    ranks.tell(1, limit=100.0)
    assert ranks.after(99) is None
    assert ranks.after(3).seconds == pytest.approx(100, abs=1)
    hasty = Ranks(1)
    hasty.tell(0, limit=1e-3)
    assert hasty.after(30, working=[0], every=1.0) is None


def test_where_a_suspect_is():
    def place(phase, step=0, of=0):
        return Suspect(0, "node", 1, phase, step, of, "").place

    assert place("check") == "phase check"
    assert place("denoise", 7, 20) == "phase denoise, step 7 of 20"
    assert place("decode", 0, 5) == "phase decode, 0 of 5"
    assert place("load", 12) == "phase load, 12"


# From here on with processes.


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(watchdog, "_STACKS_S", 0.3)
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@contextmanager
def ranks_of(server, folder, *works, limit=0.6):
    """A forked rank for each of `works`, which is called with its pulse. Yields their process ids once all publish."""
    pids = []
    for rank, work in enumerate(works):
        pid = os.fork()
        if pid == 0:
            stacks_on_signal(folder / f"rank{rank}.log")
            client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
            pulse = Pulse(dist.PrefixStore("run", client), rank, interval_s=0.05)
            pulse.allow(dict.fromkeys(STAGES, limit))
            pulse.mark("denoise", 1, 20)
            work(pulse)
            os._exit(0)
        pids.append(pid)
    try:
        deadline = time.monotonic() + 5
        for rank in range(len(works)):
            while not server.check([f"run/{pulse_key(rank)}"]):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        yield pids
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def works(pulse):
    step = 1
    while True:
        step += 1
        pulse.mark("denoise", step, 10**9)
        time.sleep(0.01)


def waits_for_itself(_pulse):
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def written(log, *words):
    """Waits for them: stacks are written word by word."""
    deadline = time.monotonic() + 5
    while not all(word in log.read_text() for word in words):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def watched(server, pids, interval_s=0.05, world_size=None):
    found, told = [], threading.Event()

    def on_stall(stall):
        found.append(stall)
        told.set()

    prefixed = dist.PrefixStore("run", server)
    dog = Watchdog(prefixed, world_size or len(pids), local_pids=lambda: pids, on_stall=on_stall, interval_s=interval_s)
    return dog, found, told


@pytest.mark.parametrize("world_size", [1, 2])
def test_processes_that_are_all_stopped_are_named_and_write_their_stacks(server, tmp_path, world_size):
    with ranks_of(server, tmp_path, *[works] * world_size) as pids:
        dog, found, told = watched(server, pids)
        assert not told.wait(0.3)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        assert told.wait(5)
        dog.close()
        (stall,) = found
        assert dog.found == stall
        assert [(suspect.rank, suspect.pid) for suspect in stall.suspects] == list(enumerate(pids))
        assert all("stopped (SIGSTOP?)" in suspect.why for suspect in stall.suspects)
        for rank, pid in enumerate(pids):
            written(tmp_path / f"rank{rank}.log", "in works", "in _publish")
            assert process_state(pid) in ("R", "S")


def test_a_stall_is_known_before_the_stacks_are_written(server, tmp_path):
    """A rank may end while it writes them, and the watchdog with it."""
    with ranks_of(server, tmp_path, works) as pids:
        dog, found, told = watched(server, pids)
        os.kill(pids[0], signal.SIGSTOP)
        give_up = time.monotonic() + 10
        while dog.found is None:
            assert time.monotonic() < give_up
            time.sleep(0.01)
        dog.close()
        assert not told.wait(0.2) and found == [] and dog.found.suspects[0].pid == pids[0]


def test_a_process_that_hangs_in_python_is_told_from_one_that_waits(server, tmp_path):
    with ranks_of(server, tmp_path, waits_for_itself) as pids:
        dog, found, told = watched(server, pids)
        assert told.wait(5)
        dog.close()
        assert found[0].slowest.why == "is not in a collective"
        written(tmp_path / "rank0.log", "in waits_for_itself")


def test_who_works_is_left_alone(server, tmp_path):
    with ranks_of(server, tmp_path, works, works, limit=0.2) as pids:
        dog, found, _ = watched(server, pids)
        time.sleep(0.4)
        dog.close()
        assert not found and not dog._thread.is_alive()
        assert (tmp_path / "rank0.log").read_text() == ""


def test_it_ends_by_itself_when_all_ranks_are_done(server):
    pulses = [Pulse(dist.PrefixStore("run", server), rank, interval_s=0.01) for rank in range(2)]
    dog, found, _ = watched(server, [], world_size=2)
    pulses[0].close()
    dog._thread.join(0.2)
    assert dog._thread.is_alive()
    pulses[1].close()
    dog._thread.join(2)
    assert not dog._thread.is_alive() and not found


def test_a_pause_of_the_agent_itself_is_not_held_against_the_ranks(server, monkeypatch):
    """As when the whole job was stopped, and is continued: one look comes an hour after the last."""
    clock = count(0.0, 3600.0)
    monkeypatch.setattr(watchdog, "monotonic", lambda: next(clock))
    monkeypatch.setattr(watchdog, "_STACKS_S", 0.0)
    last = Heartbeat(0, "node", 1, "denoise", 4, 1, 2, 1, 0.0, 5.0, 1, None)
    server.set(f"run/{pulse_key(0)}", last.dumps())
    dog, found, told = watched(server, [], interval_s=0.01, world_size=1)
    assert not told.wait(0.2)
    dog.close()
    assert next(clock) > 5 * 3600.0 and not found


def test_a_process_without_a_handler_is_not_sent_the_signal():
    assert not handles(os.getpid(), STACKS_SIGNAL)
    before = signal.signal(signal.SIGWINCH, lambda *_: None)
    assert handles(os.getpid(), signal.SIGWINCH)
    signal.signal(signal.SIGWINCH, before)
    assert process_state(os.getpid()) == "R" and process_state(2**22 + 1) is None
