"""Starting the ranks of this node through torchrun's own engine, passing on what they are asked, and saying what became
of them."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from wan_dist.agent.failures import collect, describe, describe_stop, root_cause, stopped_by_request
from wan_dist.agent.nodes import Meeting, interface_towards
from wan_dist.agent.watchdog import Stall, Watchdog
from wan_dist.output.pulse import pulse_store
from wan_dist.topology import EXIT_ENDED, STOP_SIGNALS, threads_per_rank

_SHUTDOWN_S = 5  # after Ctrl-C, ranks that ignore it are killed
_CLOSED_AFTER_S = 25  # torch kills after 30 s, which cannot be set, what did not end by SIGTERM; it counts seconds
_JOIN_S = 300  # of the nodes' agents, all of which are there when the ranks are started


class RunFailedError(RuntimeError):
    """A rank failed; the message is what the user needs to see. Picklable, unlike torch's ChildFailedError."""


class RunRefusedError(RunFailedError):
    """The ranks found that the configuration cannot run on their devices; nothing was read or written."""


class InterruptedRunError(KeyboardInterrupt):
    """The run was ended by a signal: a sweep must not go on with the next job."""


class StoppedRunError(InterruptedRunError):
    """The run was asked to stop, and has: nothing that it did is lost."""


def launch(config_path: Path, ranks: int, meeting: Meeting, job: str) -> None:
    """Run `python -m wan_dist.worker` on `ranks` ranks of this node until all are done, here and on the other nodes.

    job: the run's name among those of this meeting, the same on all nodes. Raises RunFailedError with the first
    failure's account, StoppedRunError after a stop that was asked for, InterruptedRunError after another signal; no
    rank of this node is left then.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _quieten_torch()
    node = meeting.node
    launch_config = LaunchConfig(
        min_nodes=node.count,
        max_nodes=node.count,
        nproc_per_node=ranks,
        run_id=job,
        rdzv_backend="static",  # the numbers of nodes and ranks are known: node 0 holds rank 0
        rdzv_endpoint=f"{node.head}:{meeting.port}",
        rdzv_configs={"rank": node.rank, "timeout": _JOIN_S},
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=_SHUTDOWN_S,
        signals_to_handle=",".join(number.name for number in ending_signals()),
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    ended: dict[int, int] = {}
    stalls: list[Stall] = []
    with (
        environment(**_rank_variables(ranks, meeting)),
        _signal_handlers_kept(),
        _stops_passed_on() as asked,
        _watched(pulse_store(meeting.store, job), ranks * node.count, stalls),
    ):
        try:  # -P: a file in the user's folder must not be imported in place of a library
            worker = ("-P", "-u", "-m", "wan_dist.worker", str(config_path), str(os.getpid()))
            elastic_launch(launch_config, sys.executable)(*worker)
        except ChildFailedError as error:
            ended = exit_codes(error.failures)
        except SignalException as error:
            raise InterruptedRunError(f"stopped by {signal.Signals(error.sigval).name}") from None
    if stalls:
        raise RunFailedError(stalls[0].message(config_path.parent))
    if ended:
        _tell(config_path.parent, ended, asked.number)


@contextmanager
def _watched(store: Any, ranks: int, stalls: list[Stall]) -> Iterator[None]:
    """While no rank of the run makes progress for too long: the stall is put into `stalls`, this node's ranks end."""

    def end(stall: Stall) -> None:
        stalls.append(stall)
        signal_ranks(signal.SIGKILL)

    watchdog = Watchdog(store, ranks, local_pids=rank_pids, on_stall=end)
    try:
        yield
    finally:
        watchdog.close()


def exit_codes(failures: Mapping[int, Any]) -> dict[int, int]:
    """By rank, of torch's ProcessFailures. Which the agent itself had to kill, since they did not end when others had
    failed, count as ended by it."""
    first = min(failure.timestamp for failure in failures.values())
    late = {rank for rank, failure in failures.items() if failure.timestamp - first >= _CLOSED_AFTER_S}
    killed = {rank for rank in late if failures[rank].exitcode == -signal.SIGKILL}
    return {rank: EXIT_ENDED if rank in killed else failure.exitcode for rank, failure in failures.items()}


def _tell(run_dir: Path, ended: dict[int, int], asked: signal.Signals | None) -> None:
    """Raise what the ends of this node's ranks mean for the run."""
    failures = collect(run_dir, ended)
    if stopped_by_request(failures, asked):
        raise StoppedRunError(describe_stop(failures, asked, run_dir))
    cause = root_cause(failures)
    refused = cause.account is not None and cause.account.get("refused")
    told = describe(cause, run_dir, elsewhere=cause.rank not in ended)
    raise (RunRefusedError if refused else RunFailedError)(told)


def ending_signals() -> list[signal.Signals]:
    """The signals that end a run at once: SIGHUP is not one of them under `nohup`, which has it ignored."""
    numbers = [signal.SIGINT, signal.SIGQUIT]
    return numbers if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*numbers, signal.SIGHUP]


class _Asked:
    """The stop signal that this agent has received, if any."""

    number: signal.Signals | None = None


@contextmanager
def _stops_passed_on() -> Iterator[_Asked]:
    """While ranks live, SIGTERM and SIGUSR1 are theirs: each is told, by SIGUSR1 (the agent's SIGTERM means their end),
    until all have ended, since some may not be there yet, and being told twice means nothing to them."""
    asked, over = _Asked(), threading.Event()

    def ask(number: int, _frame: Any) -> None:
        asked.number = asked.number or signal.Signals(number)

    def pass_on() -> None:
        while not over.wait(0.05):
            if asked.number is not None:
                signal_ranks(signal.SIGUSR1)
                over.wait(0.5)

    for number in STOP_SIGNALS:
        signal.signal(number, ask)
    thread = threading.Thread(target=pass_on, name="stop signals", daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        over.set()
        thread.join()


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


def _quieten_torch() -> None:
    """The failure is told once, by us. torch's elastic loggers have a level each, so each is set."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _rank_variables(ranks: int, meeting: Meeting) -> dict[str, str]:
    """Threads for each rank unless the user said how many; a checkout that is not installed made importable; on several
    nodes, the interface over which they see each other, unless the user named one."""
    variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads_per_rank(ranks)))}
    root = str(Path(__file__).resolve().parents[2])
    if "site-packages" not in root:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    if meeting.node.count > 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = interface_towards(meeting.node.head, meeting.port)
        variables |= {"GLOO_SOCKET_IFNAME": interface} if interface else {}
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
    numbers = (*STOP_SIGNALS, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
