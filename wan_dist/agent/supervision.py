"""What an agent does for its ranks beside torchrun's engine: passes on requests to stop, finds stalls, and ends ranks
that nobody else would."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from wan_dist.agent.nodes import Meeting
from wan_dist.agent.watchdog import Stall, Watchdog, process_state
from wan_dist.output.pulse import pulse_store
from wan_dist.topology import STOP_SIGNALS

_LOOK_S = 0.1
_TELL_S = 0.5
_LEAVE_S = 5.0  # in which this agent ends after its ranks have, unless it waits for a node that is gone


class Supervision:
    """For as long as the ranks of this node live; a context manager, entered by the main thread.

    asked: the stop signal that this node, or another, was asked by. stall: that of the run, if there was one. lost: why
    this node's ranks had to end for another node.
    """

    def __init__(self, meeting: Meeting, job: str, ranks: int) -> None:
        self.asked: signal.Signals | None = None
        self.stall: Stall | None = None
        self.lost: str | None = None
        self._meeting, self._job, self._ranks = meeting, job, ranks
        self._over = threading.Event()

    def __enter__(self) -> "Supervision":
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask)
        store = pulse_store(self._meeting.store, self._job)
        self._watchdog = Watchdog(store, self._ranks, local_pids=rank_pids, on_stall=self._end_stalled)
        self._thread = threading.Thread(target=self._tend, name="supervision", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._watchdog.close()
        self._thread.join()

    @property
    def suspected(self) -> Stall | None:
        """The stall that was found, also where a rank ended while it wrote its stacks: those of threads that run may
        crash it (in faulthandler, once in some hundred times)."""
        return self._watchdog.found

    @property
    def ended(self) -> bool:
        """Whether it was here that the ranks were ended: how they ended then tells nothing."""
        return self.stall is not None or self.lost is not None

    def _ask(self, number: int, _frame: Any) -> None:
        self.asked = self.asked or signal.Signals(number)

    def _end_stalled(self, stall: Stall) -> None:
        self.stall = stall
        signal_ranks(signal.SIGKILL)

    def _tend(self) -> None:
        line, told_at, looked_at, most = self._meeting.line, 0.0, 0.0, 0
        while not self._over.wait(_LOOK_S):
            if self.asked is None and line.heard is not None:
                self.asked = signal.Signals[line.heard]
            now = time.monotonic()
            if self.asked is not None and now - told_at >= _TELL_S:
                # Each is told until all have ended: some may not be there yet, and twice means nothing to them. Always
                # by SIGUSR1: SIGTERM from the agent is a rank's end.
                line.asked, told_at = self.asked.name, now
                signal_ranks(signal.SIGUSR1)
            if now - looked_at >= _TELL_S:
                looked_at, pids = now, rank_pids()
                most = max(most, len(pids))
                if len(pids) < most:
                    _continue_stopped(pids)
            if line.lost is not None:
                self._leave(line.lost)
                return

    def _leave(self, why: str) -> None:
        """Another node is gone, or its ranks are: so are this one's, and this agent soon."""
        if rank_pids():
            self.lost = why
        signal_ranks(signal.SIGKILL)
        if not self._over.wait(_LEAVE_S):  # torchrun's engine waits for the other agents
            print(f"wan-dist: {why}", file=sys.stderr, flush=True)
            os._exit(1)


def _continue_stopped(pids: list[int]) -> None:
    """A rank has ended, so the others are ended; a stopped process notices when it is continued."""
    for pid in pids:
        if process_state(pid) == "T":
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def signal_ranks(number: signal.Signals) -> None:
    """Send a signal to every rank of this node."""
    for pid in rank_pids():
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def rank_pids() -> list[int]:
    """The processes of this node's ranks."""
    import psutil

    found = []
    for child in psutil.Process().children():
        try:
            if "wan_dist.worker" in child.cmdline():
                found.append(child.pid)
        except psutil.Error:  # it ended meanwhile
            pass
    return found
