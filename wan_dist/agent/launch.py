"""Starting the ranks of this node through torchrun's own engine, passing on what they are asked, and saying what became
of them."""

import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wan_dist.agent.failures import collect, describe, describe_stop, root_cause, stopped_by_request
from wan_dist.agent.nodes import Meeting, interface_towards
from wan_dist.agent.supervision import Supervision
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


def launch(config_path: Path, ranks: int, meeting: Meeting, job: str) -> signal.Signals | None:
    """Run `python -m wan_dist.worker` on `ranks` ranks of this node until all are done, here and on the other nodes.

    job: the run's name among those of this meeting, the same on all nodes. Returns the signal that asked for a stop, if
    one did and the run was complete all the same. Raises RunFailedError with the first
    failure's account, StoppedRunError after a stop that was asked for, InterruptedRunError after another signal; no
    rank of this node is left then.
    """
    gc.disable()  # what is imported stays
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _quieten_torch()
    if not gc.get_freeze_count():  # the first job of a sweep
        gc.freeze()
    gc.enable()
    node = meeting.node
    launch_config = LaunchConfig(
        min_nodes=node.count,
        max_nodes=node.count,
        nproc_per_node=ranks,
        run_id=job,
        rdzv_backend="static",  # the numbers of nodes and ranks are known: node 0 holds rank 0
        rdzv_endpoint=f"{node.head}:{meeting.store_port}",
        rdzv_configs={"rank": node.rank, "timeout": _JOIN_S},
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=_SHUTDOWN_S,
        signals_to_handle=",".join(number.name for number in ending_signals()),
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    ended: dict[int, int] = {}
    supervision = Supervision(meeting, job, ranks * node.count)
    with environment(**_rank_variables(ranks, meeting)), _signal_handlers_kept(), supervision:
        try:  # -P: a file in the user's folder must not be imported in place of a library
            worker = ("-P", "-u", "-m", "wan_dist.worker", str(config_path), str(os.getpid()))
            elastic_launch(launch_config, sys.executable)(*worker)
        except ChildFailedError as error:
            ended = exit_codes(error.failures)
        except SignalException as error:
            raise InterruptedRunError(f"stopped by {signal.Signals(error.sigval).name}") from None
    if ended:
        try:
            _tell(config_path.parent, ended, supervision, meeting)
        except RunFailedError:
            meeting.line.fail()
            raise
    return supervision.asked


def exit_codes(failures: Mapping[int, Any]) -> dict[int, int]:
    """By rank, of torch's ProcessFailures. Which the agent itself had to kill, since they did not end when others had
    failed, count as ended by it."""
    first = min(failure.timestamp for failure in failures.values())
    late = {rank for rank, failure in failures.items() if failure.timestamp - first >= _CLOSED_AFTER_S}
    killed = {rank for rank in late if failures[rank].exitcode == -signal.SIGKILL}
    return {rank: EXIT_ENDED if rank in killed else failure.exitcode for rank, failure in failures.items()}


def _tell(run_dir: Path, ended: dict[int, int], supervision: Supervision, meeting: Meeting) -> None:
    """Raise what the ends of this node's ranks mean for the run."""
    asked = supervision.asked
    if supervision.stall is not None:
        raise RunFailedError(supervision.stall.message(run_dir))
    failures = collect(run_dir, dict.fromkeys(ended, EXIT_ENDED) if supervision.ended else ended, asked)
    if stopped_by_request(failures, asked):
        raise StoppedRunError(describe_stop(failures, asked, run_dir))
    cause = root_cause(failures)
    if cause.account is None and supervision.suspected is not None:
        raise RunFailedError(supervision.suspected.message(run_dir))
    lost = supervision.lost
    if lost is None and cause.account is not None and cause.account.get("consequence"):
        lost = meeting.line.wait_for_loss()  # which takes longer to be sure of
    if lost is not None and cause.rank in ended:  # the others' accounts are not to be had here
        raise RunFailedError(f"{lost}; this node's ranks have ended with it")
    refused = cause.account is not None and cause.account.get("refused")
    told = describe(cause, run_dir, elsewhere=cause.rank not in ended)
    raise (RunRefusedError if refused else RunFailedError)(told)


def ending_signals() -> list[signal.Signals]:
    """The signals that end a run at once: SIGHUP is not one of them under `nohup`, which has it ignored."""
    numbers = [signal.SIGINT, signal.SIGQUIT]
    return numbers if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*numbers, signal.SIGHUP]


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
        interface = interface_towards(meeting.node.head, meeting.store_port)
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
