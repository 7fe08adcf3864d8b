"""Starting the ranks of this node through torchrun's own engine, and saying what became of them."""

import json
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_dist.log import rank_log_path
from wan_dist.output.names import PLAN_FILE
from wan_dist.topology import threads_per_rank

_CRASHES = tuple(-number for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE))
_SHUTDOWN_S = 5  # ranks that ignore SIGTERM are killed after this


class RunFailedError(RuntimeError):
    """A rank failed; the message is what the user needs to see. Picklable, unlike torch's ChildFailedError."""


class RunRefusedError(RunFailedError):
    """The ranks found that the configuration cannot run on their devices; nothing was read or written."""


class InterruptedRunError(KeyboardInterrupt):
    """The run was stopped by a signal: a sweep must not go on with the next job."""


@dataclass(frozen=True)
class RankFailure:
    """How one rank ended: its exit code (negative: a signal's number) and what it wrote about it, if it could."""

    rank: int
    exit_code: int
    account: dict[str, Any] | None


def launch(config_path: Path, ranks: int) -> None:
    """Run `python -m wan_dist.worker` on `ranks` ranks of this node until all are done.

    Raises RunFailedError with the first failure's account, InterruptedRunError after a signal; no rank is left then.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _quieten_torch()
    launch_config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=_SHUTDOWN_S,
        signals_to_handle=",".join(number.name for number in stopping_signals()),
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    failed: list[tuple[int, int]] = []
    with environment(**_rank_variables(ranks)), _signal_handlers_kept():
        try:  # -P: a file in the user's folder must not be imported in place of a library
            worker = ("-P", "-u", "-m", "wan_dist.worker", str(config_path), str(os.getpid()))
            elastic_launch(launch_config, sys.executable)(*worker)
        except ChildFailedError as error:
            failed = [(rank, failure.exitcode) for rank, failure in error.failures.items()]
        except SignalException as error:
            raise InterruptedRunError(f"stopped by {signal.Signals(error.sigval).name}") from None
    if failed:
        run_dir = config_path.parent
        cause = root_cause([_failure(run_dir, rank, code) for rank, code in failed])
        refused = cause.account is not None and cause.account.get("refused")
        raise (RunRefusedError if refused else RunFailedError)(describe(cause, run_dir))


def stopping_signals() -> list[signal.Signals]:
    """The signals that end a run: SIGHUP is not one of them under `nohup`, which has it ignored."""
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT]
    return numbers if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*numbers, signal.SIGHUP]


def _quieten_torch() -> None:
    """The failure is told once, by us. torch's elastic loggers have a level each, so each is set."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _rank_variables(ranks: int) -> dict[str, str]:
    """Threads for each rank unless the user said how many; a checkout that is not installed made importable."""
    variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads_per_rank(ranks)))}
    root = str(Path(__file__).resolve().parents[2])
    if "site-packages" not in root:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return variables


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables for child processes, put back afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """The elastic agent installs handlers and leaves them; a sweep's next job must not inherit them."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _failure(run_dir: Path, rank: int, exit_code: int) -> RankFailure:
    try:
        account = json.loads((run_dir / f"failure.rank{rank}.json").read_text())
    except (OSError, ValueError):
        account = None
    return RankFailure(rank, exit_code, account)


def root_cause(failures: list[RankFailure]) -> RankFailure:
    """The failure that the others followed from. In this order: a rank that was killed or crashed, the earliest rank
    that told of an error of its own, one that aborted (NCCL aborts ranks whose peers are gone), any other."""
    own = [f for f in failures if f.account is not None and not f.account.get("consequence")]
    for candidates in (
        [f for f in failures if f.account is None and f.exit_code in _CRASHES],
        sorted(own, key=lambda f: (f.account or {})["time"]),
        [f for f in failures if f.account is None and f.exit_code not in (0, -signal.SIGTERM)],
        sorted((f for f in failures if f.account is not None), key=lambda f: (f.account or {})["time"]),
    ):
        if candidates:
            return candidates[0]
    return failures[0]


def _planned(run_dir: Path) -> str:
    """What the run had planned, where it came so far."""
    try:
        return "\n" + (run_dir / PLAN_FILE).read_text().rstrip()
    except OSError:
        return ""


def describe(failure: RankFailure, run_dir: Path) -> str:
    """One message: who, where, why, and where to read on."""
    account, log = failure.account, rank_log_path(run_dir, failure.rank)
    if account is None:
        end = f"exit code {failure.exit_code}"
        if failure.exit_code < 0:
            end = f"killed by {signal.Signals(-failure.exit_code).name}"
        if failure.exit_code == -signal.SIGKILL:  # most likely by the kernel, for want of memory
            end += " (out of memory?)" + _planned(run_dir)
        return f"rank {failure.rank} ended without an account: {end}\nits log: {log}"
    head = f"rank {account['rank']} on {account['host']} failed in phase {account['phase']}"
    if account["expected"]:
        return f"{head}: {account['message']}\nits log: {account['log']}"
    return f"{head}\n{account['traceback'].rstrip()}"
