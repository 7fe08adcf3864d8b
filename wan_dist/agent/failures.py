"""What became of a run's ranks: the accounts they leave in the run's folder, and the one failure that the user reads.

Each rank that fails or stops writes `failure.rankN.json`; for one that could not, its agent does. The folder is shared
by all nodes, so that each can tell which rank of any node was the first.
"""

import json
import shlex
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from wan_dist.loading.tensor_files import CheckpointError
from wan_dist.log import rank_log_path
from wan_dist.output.identity import describe_state
from wan_dist.output.names import PLAN_FILE, STATE_FILE
from wan_dist.topology import EXIT_ENDED

_CRASHES = tuple(-number for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE))
_ENDED = (0, -signal.SIGTERM, EXIT_ENDED)  # by the agent, or by itself
_LAST_LINES = 5  # of a rank's log
_LOG_TAIL_BYTES = 16_384


@dataclass(frozen=True)
class RankFailure:
    """How one rank ended: its exit code (negative: a signal's number) and what it wrote about it, if it could."""

    rank: int
    exit_code: int
    account: dict[str, Any] | None
    host: str = ""

    @property
    def stopped(self) -> bool:
        """Whether it ended because it was asked to."""
        return self.account is not None and bool(self.account.get("stopped"))


def account_path(run_dir: Path, rank: int) -> Path:
    return run_dir / f"failure.rank{rank}.json"


def collect(run_dir: Path, ended: dict[int, int], request: signal.Signals | None = None) -> list[RankFailure]:
    """The failures of this node's ranks (rank -> exit code), and those that other nodes have told of. A rank of ours
    that left no account gets one, for the other nodes. request: the stop signal that was passed on."""
    mine = []
    for rank, code in ended.items():
        failure = _read(account_path(run_dir, rank), rank, code)
        mine.append(failure)
        if failure.account is None and (code not in _ENDED or request is not None):
            _tell(run_dir, failure, request)
    others = [_rank_of(file) for file in sorted(run_dir.glob("failure.rank*.json"))]
    return mine + [_read(account_path(run_dir, rank), rank, 1) for rank in others if rank not in ended]


def _rank_of(file: Path) -> int:
    return int(file.name.removeprefix("failure.rank").removesuffix(".json"))


def _read(file: Path, rank: int, exit_code: int) -> RankFailure:
    try:
        account = json.loads(file.read_text())
    except (OSError, ValueError):
        return RankFailure(rank, exit_code, None, socket.gethostname())
    if "exit_code" in account:  # by its agent: the rank itself could not
        return RankFailure(rank, account["exit_code"], None, account["host"])
    return RankFailure(rank, exit_code, account, account["host"])


def _tell(run_dir: Path, failure: RankFailure, request: signal.Signals | None) -> None:
    account: dict[str, Any] = {"rank": failure.rank, "host": failure.host, "time": time.time()}
    if failure.exit_code in _ENDED and request is not None:  # it was not listening yet
        account |= {"stopped": True, "signal": request.name, "saved": None, "steps": 0}
    else:
        account["exit_code"] = failure.exit_code
    file = account_path(run_dir, failure.rank)
    try:
        file.write_text(json.dumps(account))
    except OSError:  # a full disk, or a folder that is gone: this node's user is told in any case
        with suppress(OSError):
            file.unlink()


def root_cause(failures: list[RankFailure]) -> RankFailure:
    """The failure that the others followed from. In this order: a rank that was killed or crashed, the earliest rank
    that told of an error of its own, one that aborted (NCCL aborts ranks whose peers are gone), any other."""
    own = [f for f in failures if f.account is not None and not f.account.get("consequence") and not f.stopped]
    for candidates in (
        [f for f in failures if f.account is None and f.exit_code in _CRASHES],
        sorted(own, key=lambda f: (f.account or {})["time"]),
        [f for f in failures if f.account is None and f.exit_code not in _ENDED],
        sorted((f for f in failures if f.account is not None), key=lambda f: (f.account or {})["time"]),
    ):
        if candidates:
            return candidates[0]
    return failures[0]


def stopped_by_request(failures: list[RankFailure], request: signal.Signals | None) -> bool:
    """Whether the run ended because it was asked to: all that happened is a stop, or followed from one. request: the
    signal that this node's agent passed on, which also ends ranks that do not listen yet."""
    told = [f.account for f in failures if f.account is not None]
    only_stops = all(account.get("stopped") or account.get("consequence") for account in told)
    silent = [f for f in failures if f.account is None and f.exit_code not in (*_ENDED, -signal.SIGUSR1)]
    return only_stops and not silent and (request is not None or any(f.stopped for f in failures))


def describe_stop(failures: list[RankFailure], request: signal.Signals | None, run_dir: Path) -> str:
    """`stopped by SIGTERM after step 7 of 20; ...`: what was done, and how to go on. run_dir: in the output folder."""
    accounts = [f.account for f in failures if f.stopped and f.account is not None]
    saved = next((account for account in accounts if account.get("saved") is not None), None)
    names = [account["signal"] for account in accounts if account["signal"] in signal.Signals.__members__]
    name = request.name if request is not None else next(iter(names), "a signal")
    done, steps = (saved["saved"], saved["steps"]) if saved is not None else _state_on_disk(run_dir)
    if not steps:
        return f"stopped by {name} before the first step; nothing was to be saved"
    what = "after the last step" if done == steps else f"after step {done} of {steps}"
    how = shlex.join(["output.resume=auto", f"output.dir={run_dir.parents[1]}"])
    return f"stopped by {name} {what}; its state is saved, and the same command goes on from there with: {how}"


def _state_on_disk(run_dir: Path) -> tuple[int, int]:
    """Steps done, and of how many, of the state that an earlier stop of this run has left; zeros where there is none
    that could be used."""
    try:
        state = describe_state(run_dir / STATE_FILE)
    except CheckpointError:
        return 0, 0
    return state.steps_done, state.steps


def describe(failure: RankFailure, run_dir: Path, *, elsewhere: bool = False) -> str:
    """One message: who, where, why, and where to read on. elsewhere: another node shows the whole of it."""
    account, log = failure.account, rank_log_path(run_dir, failure.rank)
    who = f"rank {failure.rank}" + (f" on {failure.host}" if failure.host else "")
    if account is None:
        end = f"exit code {failure.exit_code}"
        if failure.exit_code < 0:
            end = f"killed by {signal.Signals(-failure.exit_code).name}"
        if failure.exit_code == -signal.SIGKILL:  # most likely by the kernel, for want of memory
            end += " (out of memory?)" + _planned(run_dir)
        return f"{who} ended without an account: {end}{_last_lines(log)}\nits log: {log}"
    step = f", {account['step']}" if account.get("step") else ""
    if account.get("consequence"):
        lost = f"lost another rank in phase {account['phase']}{step}: it, or its node, is gone"
        return f"{who} {lost}\nits log: {account['log']}"
    head = f"{who} failed in phase {account['phase']}{step}"
    if account["expected"] or elsewhere:
        return f"{head}: {account['message']}\nits log: {account['log']}"
    return f"{head}\n{account['traceback'].rstrip()}{_last_lines(log)}"


def _planned(run_dir: Path) -> str:
    """What the run had planned, where it came so far."""
    try:
        return "\n" + (run_dir / PLAN_FILE).read_text().rstrip()
    except OSError:
        return ""


def _last_lines(log: Path) -> str:
    """What the rank said last, before it told of its failure itself."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = list(takewhile(lambda line: " ERROR wan_dist: failed in phase" not in line, text.splitlines()))
    return "".join(f"\n  {line}" for line in ["the last lines of its log:", *lines[-_LAST_LINES:]]) if lines else ""
