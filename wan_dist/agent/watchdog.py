"""The watchdog of an agent: finds out that no rank goes on, says which one the others wait for, has stacks written.

Every agent of a run reads the pulses of all ranks from the store and comes to the same verdict by itself; it signals
the ranks of its own node only. `judge` is a function of what was seen and when; the store, `/proc` and signals are at
the edge. Imports no torch.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Any

from wan_dist.log import logger
from wan_dist.output.pulse import DONE, STACKS_SIGNAL, Heartbeat, pulse_key
from wan_dist.planning.patience import START_S

_SILENT_S, _SILENT_INTERVALS = 3.0, 6  # a rank that has not published for longer than both does not respond
_FRESH_INTERVALS = 2  # one that has published within these does
_LEAST_INTERVALS = 3  # no limit is shorter: a mark is seen an interval after it was published, published one after that
_COUNTED_INTERVALS = 4  # of a longer pause between two looks, only so much was watched: the agent itself was stopped
_STACKS_S = 2.0  # in which ranks write their stacks: word by word, on a file system of unknown speed
_NAMED = 4  # suspects that a message tells everything about
_STOPPED = ("T", "t")
_STATES = {
    "T": "its process is stopped (SIGSTOP?)",
    "t": "its process is held by a debugger",
    "D": "its process waits for a device or a file system",
    "Z": "its process has ended",
    "R": "its process runs, but not its Python threads",
    "S": "its process sleeps, its Python threads do not run",
}


@dataclass(frozen=True)
class Suspect:
    """A rank that the others wait for, as far as can be told; host and pid are None of one that never reported."""

    rank: int
    host: str | None
    pid: int | None
    phase: str
    step: int
    of: int
    why: str

    def __str__(self) -> str:
        who = f"rank {self.rank}" if self.host is None else f"rank {self.rank} on {self.host} (pid {self.pid})"
        return f"{who}, {self.place}, {self.why}"

    @property
    def place(self) -> str:
        """`phase denoise, step 7 of 20`."""
        counted = f"{self.step} of {self.of}" if self.of else str(self.step or "")
        unit = "step " if self.phase == "denoise" else ""
        return f"phase {self.phase}" + (f", {unit}{counted}" if counted else "")


@dataclass(frozen=True)
class Stall:
    """No rank has made progress for `seconds`. suspects: the slowest rank; or several that nothing tells apart."""

    seconds: float
    suspects: tuple[Suspect, ...]

    @property
    def slowest(self) -> Suspect:
        return self.suspects[0]

    def message(self, logs: Path | None = None) -> str:
        """One text for the user. logs: the folder of the ranks' logs."""
        seconds = f"{self.seconds:.0f}" if self.seconds >= 10 else f"{self.seconds:.1f}"
        named, rest = self.suspects[:_NAMED], self.suspects[_NAMED:]
        who = "; ".join(map(str, named))
        who += f"; and as much rank {', '.join(str(suspect.rank) for suspect in rest)}" if rest else ""
        where = "" if logs is None else f"\nthe stacks of all ranks are in their logs: {logs}/rank*.log"
        return f"no progress for {seconds} s (runtime.stall_timeout_s): {who}{where}"


@dataclass
class Sighting:
    """The last heartbeat of a rank; when its marks and its beat were last seen to change; its last limit."""

    heartbeat: Heartbeat
    marked_at: float
    beat_at: float
    limit: float | None


@dataclass
class Seen:
    """What was seen of the ranks of a run by a clock that stands still while nobody looks."""

    world_size: int
    interval_s: float = 0.5
    by_rank: dict[int, Sighting] = field(default_factory=dict)

    def note(self, heartbeats: Iterable[Heartbeat], now: float) -> None:
        for heartbeat in heartbeats:
            last = self.by_rank.get(heartbeat.rank)
            if last is None:
                self.by_rank[heartbeat.rank] = Sighting(heartbeat, now, now, heartbeat.limit)
                continue
            if heartbeat.marks != last.heartbeat.marks:
                last.marked_at = now
            if heartbeat.beat != last.heartbeat.beat:
                last.beat_at = now
            if heartbeat.limit is not None:
                last.limit = heartbeat.limit
            last.heartbeat = heartbeat

    @property
    def at_work(self) -> list[Sighting]:
        return [sighting for _, sighting in sorted(self.by_rank.items()) if sighting.heartbeat.phase != DONE]

    @property
    def all_done(self) -> bool:
        return len(self.by_rank) == self.world_size and not self.at_work

    @property
    def silence_s(self) -> float:
        return max(_SILENT_S, _SILENT_INTERVALS * self.interval_s)

    def is_silent(self, sighting: Sighting, now: float) -> bool:
        return now - sighting.beat_at > self.silence_s


ProcessState = Callable[[Heartbeat], str | None]


def judge(seen: Seen, now: float, process_state: ProcessState = lambda _heartbeat: None) -> Stall | None:
    """A stall, if no rank's marks have changed for longer than any rank's phase may take, else None.

    process_state: the kernel's letter for a rank's process, None where that cannot be told from here. The verdict waits
    for a moment while it is open whether a rank still responds, which tells who is the slowest.
    """
    at_work = seen.at_work
    limit = _limit(seen, now)
    if not seen.by_rank and now > START_S:
        return Stall(now, tuple(_unreported(seen)))
    if not at_work or limit is None:
        return None
    quiet = now - max(sighting.marked_at for sighting in seen.by_rank.values())
    if quiet < limit:
        return None
    states = {sighting.heartbeat.rank: process_state(sighting.heartbeat) for sighting in at_work}
    stopped = {rank for rank, state in states.items() if state in _STOPPED}
    fresh = now - _FRESH_INTERVALS * seen.interval_s
    is_open = any(
        sighting.beat_at < fresh and not seen.is_silent(sighting, now) and sighting.heartbeat.rank not in stopped
        for sighting in at_work
    )
    if is_open and quiet < limit + seen.silence_s:
        return None
    silent = [s for s in at_work if seen.is_silent(s, now) or s.heartbeat.rank in stopped]
    suspects = [_suspect(s.heartbeat, _no_answer(states[s.heartbeat.rank])) for s in silent]
    suspects += _unreported(seen)
    return Stall(quiet, tuple(suspects or _slowest([sighting.heartbeat for sighting in at_work])))


def _unreported(seen: Seen) -> list[Suspect]:
    why = "has not reported at all: it is still starting, or cannot"
    ranks = (rank for rank in range(seen.world_size) if rank not in seen.by_rank)
    return [Suspect(rank, None, None, "start", 0, 0, why) for rank in ranks]


def _limit(seen: Seen, now: float) -> float | None:
    """Seconds without progress that are a stall: the longest that a rank is allowed for what it is at. None while a
    rank that responds is at something which is not judged."""
    limits = []
    for sighting in seen.at_work:
        limit = sighting.heartbeat.limit
        if limit is None and not seen.is_silent(sighting, now):
            return None
        limits.append(sighting.limit if limit is None else limit)
    known = [limit for limit in limits if limit is not None]
    return max([*known, _LEAST_INTERVALS * seen.interval_s]) if known else None


def _slowest(heartbeats: list[Heartbeat]) -> list[Suspect]:
    """Of ranks that all respond. Who waits in a collective waits for another one; of those who do not, and where all
    do, the one that has come the least far."""
    waiting = [heartbeat for heartbeat in heartbeats if heartbeat.waiting is not None]
    candidates = [heartbeat for heartbeat in heartbeats if heartbeat.waiting is None] or waiting
    least = min((heartbeat.stage, heartbeat.step) for heartbeat in candidates)
    slowest = [heartbeat for heartbeat in candidates if (heartbeat.stage, heartbeat.step) == least]
    if candidates is waiting:
        return [_suspect(heartbeat, f"waits in {heartbeat.waiting}") for heartbeat in slowest]
    why = "is not in a collective"
    if waiting:
        why += f", others wait in {' and in '.join(sorted({str(heartbeat.waiting) for heartbeat in waiting}))}"
    return [_suspect(heartbeat, why) for heartbeat in slowest]


def _suspect(heartbeat: Heartbeat, why: str) -> Suspect:
    place = (heartbeat.phase, heartbeat.step, heartbeat.of)
    return Suspect(heartbeat.rank, heartbeat.host, heartbeat.pid, *place, why)


def _no_answer(state: str | None) -> str:
    return f"does not respond, {_STATES.get(state or '', 'its process or its node is stopped or frozen')}"


class Watchdog:
    """Watches from its making until it is closed, has found a stall, or the store has gone.

    store: a torch.distributed store, of which a connection of its own is made. local_pids: of the ranks of this node
    that run at the time. on_stall: called once, by the watchdog's thread, when the ranks of this node have had time to
    write their stacks; stopped ones go on from there (only so could they write), and it is for `on_stall` to end them.
    found: the stall, as soon as there is one.
    """

    def __init__(
        self,
        store: Any,
        world_size: int,
        *,
        local_pids: Callable[[], list[int]],
        on_stall: Callable[[Stall], None],
        interval_s: float = 0.5,
    ) -> None:
        self._local_pids, self._on_stall, self._interval_s = local_pids, on_stall, interval_s
        self._seen = Seen(world_size, interval_s)
        self.found: Stall | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(store,), name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """After this `on_stall` is not called any more, unless it is being called (then it may be the caller)."""
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(_STACKS_S)

    def _watch(self, store: Any) -> None:
        try:
            stall = self._stall(store)
        except RuntimeError as error:  # the agent that served it has ended, and this one's ranks with it
            logger.debug("the watchdog ends: %s", error)
            return
        if stall is None:
            return
        self.found = stall
        ask_for_stacks(self._local_pids())
        if not self._closed.wait(_STACKS_S):
            self._on_stall(stall)

    def _stall(self, store: Any) -> Stall | None:
        """Looks until there is one; None where the watchdog is closed before, or all ranks are done (the agent that
        serves the store may end first then, and torch would tell of that on the terminal)."""
        connection = store.clone()  # who waits in a store blocks its connection
        looked_at, watched = monotonic(), 0.0
        while not self._closed.wait(self._interval_s):
            heartbeats = self._read(connection)
            now = monotonic()
            watched += min(now - looked_at, _COUNTED_INTERVALS * self._interval_s)
            looked_at = now
            self._seen.note(heartbeats, watched)
            if self._seen.all_done:
                return None
            stall = judge(self._seen, watched, self._process_states())
            if stall is not None:
                return stall
        return None

    def _read(self, connection: Any) -> list[Heartbeat]:
        """Of the ranks that have published: to get a key that is not there would wait for it."""
        ranks = [
            rank
            for rank in range(self._seen.world_size)
            if rank in self._seen.by_rank or connection.check([pulse_key(rank)])
        ]
        return [Heartbeat.loads(text) for text in connection.multi_get(list(map(pulse_key, ranks)))] if ranks else []

    def _process_states(self) -> ProcessState:
        """For one look. None of a rank on another node."""
        host, local_pids = socket.gethostname(), cache(self._local_pids)

        def state(heartbeat: Heartbeat) -> str | None:
            is_here = heartbeat.host == host and heartbeat.pid in local_pids()
            return process_state(heartbeat.pid) if is_here else None

        return state


def process_state(pid: int, proc: Path = Path("/proc")) -> str | None:
    """The kernel's letter for what a process does (`T`: stopped); None where it cannot be told."""
    try:
        return (proc / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return None


def ask_for_stacks(pids: Iterable[int]) -> None:
    """Have ranks write their stacks. A stopped process handles no signal before it is continued, so it is."""
    for pid in pids:
        for number in (STACKS_SIGNAL, signal.SIGCONT):
            if number == signal.SIGCONT or handles(pid, STACKS_SIGNAL):
                try:
                    os.kill(pid, number)
                except OSError as error:
                    logger.debug("signal %d to %d: %s", number, pid, error)


def handles(pid: int, number: int, proc: Path = Path("/proc")) -> bool:
    """Whether a process has a handler for a signal: one that is just starting would be ended by it. True where the
    system does not say."""
    try:
        lines = (proc / str(pid) / "status").read_text(errors="replace").splitlines()
    except OSError:
        return True
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), None)
    return caught is None or bool(int(caught, 16) >> (number - 1) & 1)
