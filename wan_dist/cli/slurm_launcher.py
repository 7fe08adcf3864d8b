"""`hydra/launcher=slurm`: a sweep's jobs as Slurm jobs, submitted by submitit, with one task, a wan-dist agent, a node.

Hydra's own submitit launcher composes and runs each job where Slurm puts it. What is ours is the way back: a job
leaves plain data behind (how it ended, and why), every job is waited for, and one that Slurm no longer knows is given
up after a while, accounting or not.
"""

import difflib
import gc
import logging
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

from hydra.plugins.launcher import Launcher

from wan_dist.agent.launch import InterruptedRunError, environment
from wan_dist.cli.slurm_jobs import GRACE_S, REFUSED, TIME_SIGNAL, Outcome, Submitted, SweepJob, finished, told
from wan_dist.planning.refusal import Refusal, RefusedError

# Hydra takes plugins of this name space only; the name is ours, the class is registered under it.
_TARGET = "hydra_plugins.wan_dist.SlurmLauncher"
_PLUGIN = "hydra_plugins.hydra_submitit_launcher"
_COMMANDS = ("sbatch", "srun", "squeue", "scontrol")
_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class SlurmOptions:
    """The keys of `hydra.launcher`; null leaves an option out, so that the site's default holds."""

    _target_: str = _TARGET
    submitit_folder: str = "${hydra.sweep.dir}/.submitit/%j"
    name: str = "${hydra.job.name}"
    nodes: int = 1
    tasks_per_node: int = 1
    timeout_min: int = 60
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus_per_node: int | None = None
    gpus_per_task: int | None = None
    cpus_per_task: int | None = None
    cpus_per_gpu: int | None = None
    mem_gb: float | None = None
    mem_per_cpu: str | None = None
    mem_per_gpu: str | None = None
    gres: str | None = None
    constraint: str | None = None
    nodelist: str | None = None
    exclude: str | None = None
    exclusive: bool | None = None
    dependency: str | None = None
    comment: str | None = None
    mail_type: str | None = None
    mail_user: str | None = None
    array_parallelism: int = 256
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    setup: list[str] | None = None
    teardown: list[str] | None = None
    # A task that dies has the others end at once; they would wait for it.
    srun_args: list[str] = field(default_factory=lambda: ["--kill-on-bad-exit=1"])
    stderr_to_stdout: bool = False
    signal_delay_s: int = 120
    max_num_timeout: int = 0


def register_launcher() -> None:
    """Make `hydra/launcher=slurm` known to Hydra."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    ConfigStore.instance().store(group="hydra/launcher", name="base", node=SlurmOptions)
    Plugins.instance().class_name_to_class[_TARGET] = SlurmLauncher


def is_slurm(hydra_cfg: Any) -> bool:
    """Whether this composed `hydra` node's launcher is ours, under whatever option's name."""
    return hydra_cfg.launcher._target_ == _TARGET


def launcher_refusals(options: Mapping[str, Any], *, has_plugin: bool, missing: Sequence[str]) -> list[Refusal]:
    """Why nothing can be submitted. missing: commands of Slurm that are not on PATH."""
    found = []
    if not has_plugin:
        why, remedy = "the package hydra-submitit-launcher is not installed", "type: pip install 'wan_dist[slurm]'"
        found.append(Refusal("hydra/launcher", "slurm", why, remedy))
    if missing:
        why = f"no {' and no '.join(missing)} on PATH"
        found.append(
            Refusal("hydra/launcher", "slurm", why, "start the sweep where Slurm's commands are: a login node")
        )
    known = [option.name for option in fields(SlurmOptions)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2)
            remedy = f"did you mean {' or '.join(near)}?" if near else "conf/README.md names every key"
            found.append(Refusal(f"hydra.launcher.{name}", options[name], "no such key", remedy))
    if options.get("tasks_per_node", 1) != 1:
        why = "a task is an agent, which starts all ranks of its node itself"
        remedy = "leave it 1; the degrees of parallelism say how many ranks there are"
        found.append(Refusal("hydra.launcher.tasks_per_node", options["tasks_per_node"], why, remedy))
    for name, least in {"nodes": 1, "timeout_min": 1, "array_parallelism": 1, "max_num_timeout": 0}.items():
        if options.get(name, least) < least:
            found.append(Refusal(f"hydra.launcher.{name}", options[name], "too small", f"give {least} or more"))
    return found


def same_target(jobs: Sequence[tuple[int, str | None, str]]) -> list[Refusal]:
    """Jobs, each `(number, output.dir, output.name)`, that would write over each other: they run at the same time."""
    first: dict[tuple[str, str], int] = {}
    found = []
    for number, folder, name in jobs:
        if folder is None:
            continue  # each has its own
        other = first.setdefault((os.path.abspath(folder), name), number)  # noqa: PTH100  # as typed, links unresolved
        if other != number:
            why = f"jobs {other} and {number} would both write {name!r} there"
            remedy = "leave output.dir null (each job then has a folder of its own), or sweep output.name too"
            found.append(Refusal("output.dir", folder, why, remedy))
    return found


class SlurmLauncher(Launcher):
    """Submit all jobs, wait for all of them, and leave an Outcome of each in the task function's `outcomes`."""

    def __init__(self, **options: Any) -> None:
        from omegaconf import OmegaConf

        self.options: dict[str, Any] = {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in options.items()
        }

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Before Hydra writes anything: refuse what cannot be submitted."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        missing = [command for command in _COMMANDS if shutil.which(command) is None]
        found = launcher_refusals(self.options, has_plugin=_has_plugin(), missing=missing)
        if found:
            _refuse(found)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        """Submit these jobs and wait for them; a failure is told as soon as it is known."""
        from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals

        gc.enable()  # the jobs are elsewhere, and waiting for them may take days
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        numbered = [(initial_job_idx + i, list(overrides)) for i, overrides in enumerate(job_overrides)]
        self._refuse_overwriting(numbered)
        if initial_job_idx == 0:
            _warn_without_accounting()
        try:
            jobs = self._submit(numbered, [" ".join(filter_overrides(overrides)) for _, overrides in numbered])
        except KeyboardInterrupt as stop:
            raise InterruptedRunError(f"{stop} while submitting; squeue --me shows what Slurm has taken") from None
        outcomes = dict(self._outcomes(jobs))
        self.task_function.outcomes += [outcomes[number] for number, _ in numbered]
        return [
            JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=outcomes[number])
            for number, overrides in numbered
        ]

    def _refuse_overwriting(self, numbered: Sequence[tuple[int, list[str]]]) -> None:
        targets = []
        for number, overrides in numbered:
            config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
            if config.task != "plan":
                targets.append((number, config.output.dir, config.output.name))
        found = same_target(targets)
        if found:
            _refuse(found)

    def _submit(self, numbered: Sequence[tuple[int, list[str]]], names: Sequence[str]) -> list[Submitted]:
        """All jobs, each `(number, overrides)`, as one Slurm job: an array, where there are several."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        executor, jobs = self._executor(), [self._job(number, overrides) for number, overrides in numbered]
        try:
            with environment(**_import_path()), redirect_stderr(StringIO()):  # what sbatch says is in the error
                handles = executor.submit_array(jobs)
        except (FailedJobError, FailedSubmissionError) as error:
            print(f"wan-dist: Slurm took no job:\n{textwrap.indent(str(error).strip(), '  ')}", file=sys.stderr)
            raise SystemExit(REFUSED) from None
        submitted = []
        for (number, _), name, handle in zip(numbered, names, handles, strict=True):
            paths = [handle.task(task).paths for task in range(handle.num_tasks)]
            results, logs = tuple(p.result_pickle for p in paths), tuple((p.stdout, p.stderr) for p in paths)
            submitted.append(Submitted(number, name, handle.job_id, results, logs))
            _log.info("\t#%d : %s : Slurm job %s", number, name, handle.job_id)
        _log.info("Logs: %s", submitted[0].logs[0][0].parent.parent)
        return submitted

    def _executor(self) -> Any:
        """submitit's, told what was asked for."""
        import submitit

        asked = {name: value for name, value in self.options.items() if value is not None}
        asked["setup"] = [f"export SUBMITIT_PREEMPT_SIGNAL={TIME_SIGNAL.name[3:]}", *asked.get("setup", [])]
        submitit.JobEnvironment.USR_SIG = TIME_SIGNAL.name[3:]
        folder, timeouts = asked.pop("submitit_folder"), asked.pop("max_num_timeout")
        if "cpus_per_task" in asked:  # since Slurm 22.05, srun does not take it over from sbatch
            asked["srun_args"] = [*asked.get("srun_args", []), f"--cpus-per-task={asked['cpus_per_task']}"]
        python = f"{shlex.quote(sys.executable)} -P"  # no file of the user's folder in place of a library
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=timeouts, slurm_python=python)
        shared = submitit.AutoExecutor._typed_parameters()
        executor.update_parameters(**{n if n in shared else f"slurm_{n}": value for n, value in asked.items()})
        return executor

    def _job(self, number: int, overrides: list[str]) -> SweepJob:
        import cloudpickle
        from hydra.core.singleton import Singleton
        from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as HydrasLauncher

        launcher = HydrasLauncher(**self.options)
        launcher.setup(hydra_context=self.hydra_context, task_function=self.task_function, config=self.config)
        arguments = (overrides, "hydra.sweep.dir", number, f"job_id_for_{number}", Singleton.get_state())
        return SweepJob(cloudpickle.dumps((launcher, arguments)), str(Path.cwd()))

    def _outcomes(self, jobs: Sequence[Submitted]) -> Iterator[tuple[int, Outcome]]:
        """`(number, outcome)` of each job as it ends, told at once. A signal ends the waiting and not the jobs."""
        left = {job.slurm_id for job in jobs}
        try:
            for job, outcome in finished(jobs):
                left.discard(job.slurm_id)
                if outcome.code:
                    print(f"wan-dist: {told(job, outcome)}", file=sys.stderr, flush=True)
                else:
                    _log.info("\t#%d : done", job.number)
                yield job.number, outcome
        except KeyboardInterrupt as stop:
            ids = " ".join(job.slurm_id for job in jobs if job.slurm_id in left)
            going_on = f"these Slurm jobs go on: {ids}; to cancel them: scancel {ids}" if ids else "no job is left"
            raise InterruptedRunError(f"{stop or 'interrupted'}; {going_on}") from None


def _warn_without_accounting() -> None:
    """Where sacct knows nothing, how a lost job ended may stay unknown: say so once."""
    try:
        end = subprocess.run(
            ["sacct", "--noheader", "--allocations", "--starttime=now"], capture_output=True, text=True, check=False
        )
        why = end.stderr.strip().splitlines()[:1] if end.returncode else None
    except OSError:
        why = ["no sacct on PATH"]
    if why is not None:
        print(
            f"wan-dist: no accounting here ({' '.join(why) or 'sacct fails'}): a job that ends without a result is "
            f"noticed by squeue, {GRACE_S:.0f} s later",
            file=sys.stderr,
        )


def _has_plugin() -> bool:
    try:
        return find_spec(_PLUGIN) is not None and find_spec("submitit") is not None
    except ModuleNotFoundError:  # without any plugin there is no hydra_plugins either
        return False


def _import_path() -> dict[str, str]:
    """A checkout that is not installed is made importable for the job."""
    root = str(Path(__file__).resolve().parents[2])
    if "site-packages" in root:
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def _refuse(found: list[Refusal]) -> NoReturn:
    """Told here: Hydra would print a stack."""
    print(f"wan-dist: {RefusedError(found)}", file=sys.stderr)
    raise SystemExit(REFUSED)
