"""A rank's pulse: what it is at, and whether it goes on, published in the agent's store for the agents' watchdogs.

The main thread marks every sign of progress, which costs an assignment; a daemon thread publishes what was marked last.
So a rank whose main thread hangs still says where, and one that publishes nothing is stopped or frozen as a whole. The
stacks of a rank are written by a signal handler in C, which needs no thread of it to be free.

Imports no torch: the agent reads what is published here.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

from wan_dist.log import logger

DONE = "done"
# Which phase comes before which. Decoding and writing take turns.
STAGES = {"start": 0, "check": 1, "encode": 2, "load": 3, "denoise": 4, "decode": 5, "write": 5}
STACKS_SIGNAL = signal.SIGUSR2
_AFTER_DENOISING = STAGES["decode"]
_COLLECTIVES = "wan_dist.distributed.collectives"
_CLOSING_S = 2.0  # the longest that a store which does not answer delays the end of a rank


@dataclass(frozen=True)
class Heartbeat:
    """What a rank publishes. stage: of its phase (`STAGES`), never falling. step, of: how far it is in the phase, both
    0 where nothing is counted. marks: signs of progress so far; since: seconds since the last. limit: seconds that may
    pass without one, None while that is not judged. beat: of this publication. waiting: for what, in a collective."""

    rank: int
    host: str
    pid: int
    phase: str
    stage: int
    step: int
    of: int
    marks: int
    since: float
    limit: float | None
    beat: int
    waiting: str | None

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str | bytes) -> "Heartbeat":
        return cls(**json.loads(text))


def pulse_store(store: Any, run_id: str) -> Any:
    """The part of the agent's store where a run's ranks publish."""
    from torch.distributed import PrefixStore

    return PrefixStore(f"wan_dist/{run_id}", store)


def pulse_key(rank: int) -> str:
    """Where a rank publishes."""
    return f"pulse/{rank}"


class Pulse:
    """Made by the thread that does the rank's work; publishes every `interval_s` until it is closed.

    store: a torch.distributed store, of which a connection of its own is made; None where nobody watches.
    """

    def __init__(self, store: Any | None, rank: int, *, interval_s: float = 0.5) -> None:
        self._rank, self._interval_s = rank, interval_s
        self._host, self._pid, self._worker = socket.gethostname(), os.getpid(), threading.get_ident()
        self._limits: Mapping[str, float] = {}
        self._beat = 0
        # One tuple, replaced as a whole: the publishing thread never sees half of a mark.
        self._last = ("start", STAGES["start"], 0, 0, 0, monotonic())
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if store is not None:
            self._thread = threading.Thread(target=self._publish, args=(store,), name="pulse", daemon=True)
            self._thread.start()

    def mark(self, phase: str, step: int = 0, of: int = 0) -> None:
        """A sign of progress."""
        before, stage, _, _, marks, _ = self._last
        if phase != before:
            stage = next_stage(stage, phase)
        self._last = (phase, stage, step, of, marks + 1, monotonic())

    def allow(self, limits: Mapping[str, float]) -> None:
        """How many seconds each phase may go on without a mark, from now on; a phase that is not named is not judged.
        The mapping is not to be changed afterwards."""
        self._limits = limits

    def close(self) -> None:
        """Publish that this rank is done, and nothing afterwards; nobody waits for it any more."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(_CLOSING_S)

    def _publish(self, store: Any) -> None:
        try:
            connection = store.clone()  # who waits in a store blocks its connection
            while not self._closed.is_set():
                connection.set(pulse_key(self._rank), self._heartbeat(waiting_for(self._worker)).dumps())
                self._closed.wait(self._interval_s)
            self.mark(DONE)
            connection.set(pulse_key(self._rank), self._heartbeat(None).dumps())
        except RuntimeError as error:  # the agent has gone, and this rank is about to
            logger.debug("the pulse ends: %s", error)

    def _heartbeat(self, waiting: str | None) -> Heartbeat:
        phase, stage, step, of, marks, at = self._last
        self._beat += 1
        return Heartbeat(
            rank=self._rank,
            host=self._host,
            pid=self._pid,
            phase=phase,
            stage=stage,
            step=step,
            of=of,
            marks=marks,
            since=monotonic() - at,
            limit=self._limits.get(phase),
            beat=self._beat,
            waiting=waiting,
        )


def next_stage(reached: int, phase: str) -> int:
    """Of a rank that enters a phase. What is loaded after denoising is loaded for decoding.

    >>> next_stage(STAGES["encode"], "load") == STAGES["load"]
    True
    >>> next_stage(STAGES["denoise"], "load") == STAGES["decode"]
    True
    """
    stage = STAGES.get(phase, reached)
    if stage < STAGES["denoise"] <= reached:
        return _AFTER_DENOISING
    return max(reached, stage)


def waiting_for(thread: int) -> str | None:
    """What a thread of this process waits for in a collective, `all_to_all over axis ulysses`; None where it is in
    none. The stack is looked at and let go: a frame that is held keeps its tensors."""
    innermost = frame = sys._current_frames().get(thread)
    while frame is not None:
        found = _in_collective(frame)
        if found is not None:
            return found
        frame = frame.f_back
    return _in_library(innermost)


def _in_collective(frame: FrameType) -> str | None:
    """Where the frame is one of those of our collectives that wait."""
    if frame.f_globals.get("__name__") != _COLLECTIVES:
        return None
    function, values = frame.f_code.co_name, frame.f_locals
    if function == "wait_for_first":
        return f"wait_for_first ({values.get('what')})"
    if function in ("_run", "any_rank"):  # `any_rank` asks a GPU for what came, which waits
        return f"{values.get('name', function)} over axis {getattr(values.get('axis'), 'name', '?')}"
    return None


def _in_library(frame: FrameType | None) -> str | None:
    """Where torch itself waits: while the process group is made, for an FSDP gather that was started before. Only the
    innermost frame tells: much that computes is called from FSDP's code; and what is called on a DTensor computes."""
    module = frame.f_globals.get("__name__", "") if frame is not None else ""
    if frame is None or not module.startswith("torch.distributed.") or module.startswith("torch.distributed.tensor"):
        return None
    return f"{frame.f_code.co_name} of {module}"


class StackDump:
    """Python stacks of all threads, appended to a file whenever `STACKS_SIGNAL` comes, until it is closed. The file
    stays open by itself (faulthandler holds it)."""

    def __init__(self, log_file: Path) -> None:
        self._file = log_file.open("a")
        faulthandler.register(STACKS_SIGNAL, file=self._file, all_threads=True, chain=False)

    def close(self) -> None:
        faulthandler.unregister(STACKS_SIGNAL)
        self._file.close()


def stacks_on_signal(log_file: Path) -> StackDump:
    """Have this process write its stacks into `log_file` when `STACKS_SIGNAL` comes, also while a thread holds the
    interpreter's lock, or, once it is continued, where it was stopped. Before this the signal would end the process."""
    return StackDump(log_file)
