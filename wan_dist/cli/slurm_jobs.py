"""The jobs of a sweep in Slurm's hands: what runs in each of their tasks, the wait for their ends, and what to tell.

A task leaves builtins behind, pickled by submitit in a folder that all nodes share: how the job ended, and why. Slurm
is asked only whether a job without a result may still come to one.
"""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from wan_dist.agent.launch import InterruptedRunError
from wan_dist.topology import EXIT_STOPPED

FAILED, REFUSED = 1, 2
_OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
_OVER |= {"BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED"}
# Before the time limit, to all processes of the job: it has a run stop and save its state. Not submitit's own USR2,
# which would end ranks at once.
TIME_SIGNAL = signal.SIGUSR1
POLL_S = 1.0
# A job without a result is given up when Slurm has not had it under way for so long, and for so many looks in a row:
# a shared file system shows a result late, and a requeued job changes its state twice.
GRACE_S, LOOKS = 10.0, 3
_SQUEUE_S = 60
_LOG_LINES = 12


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its exit code, and what the user needs to read about it where that is not 0."""

    code: int
    text: str = ""


class SweepJob:
    """What submitit runs in every task of a Slurm job: Hydra's launcher for one job, its outcome brought home.

    payload: the launcher and its arguments, pickled as they were: a requeued job must not start from the state that
    its first attempt left in them. folder: where the sweep was typed, for relative paths.
    """

    def __init__(self, payload: bytes, folder: str) -> None:
        self.payload, self.folder = payload, folder

    def __call__(self) -> tuple[int, str]:
        """`(exit code, text)`: builtins, which can be read back wherever the sweep was typed."""
        import submitit

        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        task = submitit.JobEnvironment()
        # An attempt before a requeue may have left a result; the sweep must not take it for this one's.
        task.paths.result_pickle.unlink(missing_ok=True)
        os.chdir(self.folder)
        requeue = signal.getsignal(TIME_SIGNAL)  # submitit's; it is ours from here on, while ranks live their agent's
        signal.signal(TIME_SIGNAL, lambda *_: _requeue(requeue))
        signal.signal(signal.SIGTERM, _end)
        try:
            return self._run()
        except _OutOfTimeError as stop:
            return FAILED, str(stop)
        except KeyboardInterrupt as stop:
            print(f"wan-dist: {stop}", file=sys.stderr, flush=True)
            if TIME_SIGNAL.name not in str(stop):  # no result: Slurm may start the job again, else it is cancelled
                sys.exit(0 if task.global_rank else EXIT_STOPPED)  # a task that fails would have srun kill the others
            return FAILED, _why_not_requeued(requeue, str(stop))

    def _run(self) -> tuple[int, str]:
        launcher, arguments = pickle.loads(self.payload)
        outcome = launcher(*arguments).return_value
        return outcome.code, outcome.text

    def checkpoint(self) -> Any:
        """submitit's, when it requeues: the same job again, which goes on by `output.resume=auto`."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def _end(number: int, _frame: Any) -> NoReturn:
    """While no ranks live; submitit would have Slurm wait, and kill."""
    raise InterruptedRunError(f"stopped by {signal.Signals(number).name}")


class _OutOfTimeError(InterruptedRunError):
    """The time limit is near, and the job may not be requeued."""


def _requeue(submitits: Any) -> None:
    """Have submitit requeue this job, which ends this process; tasks other than the first go on from here, and leave
    that to the first. Its error must pass for none of the run's own."""
    from submitit.core.utils import UncompletedJobError

    try:
        submitits(TIME_SIGNAL, None)
    except UncompletedJobError:
        raise _OutOfTimeError(
            "its time limit (hydra.launcher.timeout_min) is near, and it has been requeued as often as "
            "hydra.launcher.max_num_timeout allows"
        ) from None


def _why_not_requeued(submitits: Any, told: str) -> str:
    """After a run that stopped for the time limit, its state saved: this job requeued, or else what to say."""
    try:
        _requeue(submitits)
    except _OutOfTimeError as stop:
        return f"{told}\n{stop}"
    return told


@dataclass(frozen=True)
class Submitted:
    """One job of the sweep in Slurm's hands. results, logs (stdout, stderr): one for each of its tasks."""

    number: int
    overrides: str
    slurm_id: str
    results: tuple[Path, ...]
    logs: tuple[tuple[Path, Path], ...]

    def is_done(self) -> bool:
        """Whether every task has left its result. Listing a folder has NFS look at the server, unlike asking for a
        file that was not there a moment ago."""
        folder = self.results[0].parent
        names = set(os.listdir(folder)) if folder.is_dir() else set()  # noqa: PTH208
        return all(path.name in names for path in self.results)


def finished(jobs: Sequence[Submitted]) -> Iterator[tuple[Submitted, Outcome]]:
    """Each job and its outcome, as soon as it has one."""
    for job, state in await_jobs(jobs, slurm_states):
        tasks = [read_result(path) for path in job.results]
        vanished = {number: _no_result(job, number, state) for number, task in enumerate(tasks) if task is None}
        yield job, job_outcome(tasks, vanished)


def await_jobs(
    jobs: Sequence[Submitted],
    look: Callable[[Sequence[str]], dict[str, str] | None],
    *,
    pause: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[Submitted, str | None]]:
    """Each job when it is over, with the last state that Slurm gave for it.

    look: from job ids to the states of those that Slurm still knows, or None where it could not tell.
    """
    left = {job.slurm_id: job for job in jobs}
    states: dict[str, str] = {}
    gone: dict[str, tuple[float, int]] = {}  # since when, and for how many looks, a job has not been under way
    while left:
        for job in list(left.values()):
            since, looks = gone.get(job.slurm_id, (clock(), 0))
            if job.is_done() or (looks >= LOOKS and clock() - since >= GRACE_S):
                del left[job.slurm_id]
                yield job, states.get(job.slurm_id)
        if not left:
            return
        listed = look(list(left))
        if listed is not None:
            states.update(listed)
            for slurm_id in left:
                since, looks = gone.get(slurm_id, (clock(), 0))
                gone[slurm_id] = (since, looks + 1)
                if listed.get(slurm_id, "COMPLETED").split(" ")[0] not in _OVER:  # `CANCELLED by 0`
                    del gone[slurm_id]
        pause(POLL_S)


def slurm_states(slurm_ids: Sequence[str]) -> dict[str, str] | None:
    """Ids to states by one squeue; ids that Slurm has forgotten are left out. None where squeue fails, as it does
    while the controller restarts."""
    whole = ",".join(sorted({slurm_id.split("_")[0] for slurm_id in slurm_ids}))
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T", f"--jobs={whole}"]
    try:
        end = subprocess.run(command, capture_output=True, text=True, timeout=_SQUEUE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if end.returncode and "Invalid job id" not in end.stderr:
        return None
    return parse_states(end.stdout)


def parse_states(listing: str) -> dict[str, str]:
    """`ID|STATE` a line; the id of an array's task is `12_0`."""
    pairs = (line.strip().split("|", 1) for line in listing.splitlines() if "|" in line)
    return {slurm_id: state.strip() for slurm_id, state in pairs}


def read_result(path: Path) -> Outcome | None:
    """What a task left behind, or None where it left nothing."""
    try:
        kind, value = pickle.loads(path.read_bytes())
    except OSError:
        return None
    except Exception as error:
        return Outcome(FAILED, f"its result cannot be read ({type(error).__name__}): {path}")
    if kind == "success":
        return Outcome(*value)
    return Outcome(FAILED, f"it did not come as far as its run: {str(value).strip().splitlines()[-1]}")


def job_outcome(tasks: Sequence[Outcome | None], vanished: Mapping[int, str]) -> Outcome:
    """One outcome of a job from those of its tasks, in their order: the worst code (a failure before a refusal), and
    one account, the first that there is. A task that vanished is told of too: the others' may only follow from it.

    vanished: what to say of tasks without a result.
    """
    codes = {FAILED if task is None else task.code for task in tasks}
    code = FAILED if codes - {0, REFUSED} else max(codes, default=FAILED)
    accounts = [task.text for task in tasks if task is not None and task.text]
    return Outcome(code, "\n".join([*accounts[:1], *list(vanished.values())[:1]]))


def _no_result(job: Submitted, task: int, state: str | None) -> str:
    """A task that vanished: its job's state, and the end of its log."""
    which = f"task {task}" if len(job.results) > 1 else "it"
    if state is None or state.split(" ")[0] not in _OVER:  # so it is with a cancelled task of an array
        says = f"no longer knows it{f' (last {state})' if state else ''}: cancelled before it started, or lost?"
    else:
        says = f"says {state}"
    told = f"{which} ended without a result; Slurm {says}"
    for log in reversed(job.logs[task]):
        if lines := _tail(log):
            return f"{told}; the end of its log:\n{textwrap.indent(lines, '  ')}"
    return told


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").rstrip().splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-_LOG_LINES:])


def told(job: Submitted, outcome: Outcome) -> str:
    """One message about a job that failed or was refused."""
    logs = [str(log) for pair in job.logs for log in pair if log.exists()]
    head = f"job {job.number}{f' ({job.overrides})' if job.overrides else ''}, Slurm job {job.slurm_id}"
    lines = [f"{head}, {'cannot run' if outcome.code == REFUSED else 'failed'}:", outcome.text]
    return "\n  ".join("\n".join([*lines, *(["its output:", *logs] if logs else [])]).splitlines())
