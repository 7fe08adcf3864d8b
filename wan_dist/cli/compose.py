"""Composing with Hydra: from the command line to a typed config per job. The only module that imports `hydra.main`."""

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wan_dist.agent.launch import RunFailedError, RunRefusedError
from wan_dist.agent.prepare import Invocation, check, run_id
from wan_dist.cli.free_text import config_dirs, is_multirun, literal_overrides, overrides_first, unguard
from wan_dist.cli.overrides import check_overrides
from wan_dist.cli.slurm_jobs import FAILED, REFUSED, Outcome
from wan_dist.config.schema import Config
from wan_dist.config.store import conf_dir, register_schemas
from wan_dist.planning.refusal import Refusal, RefusedError

DEFAULT_MODEL = "wan_shapes"  # the `model` of conf/config.yaml


def compose_and_run(
    arguments: Sequence[str],
    run: Callable[[Config, Invocation], None],
    *,
    default_dir: Path | None,
    world: int | None,
    local_ranks: int | None,
) -> int:
    """Compose with Hydra and call `run` for every job; every job's failure is printed as it happens.

    Returns the exit code: REFUSED where no job could run, FAILED where one of several could not or one failed.
    """
    multirun = is_multirun(arguments)
    overrides = overrides_first(literal_overrides(arguments, multirun=multirun))
    from wan_dist.cli.slurm_launcher import register_launcher  # takes Hydra, and ranks import this module as well

    register_schemas()
    register_launcher()
    if multirun and any(a in ("-c", "--cfg") or a.startswith("--cfg=") for a in arguments):
        print("wan-dist: --cfg shows one job's configuration: leave --multirun out", file=sys.stderr)
        return REFUSED

    def invocation(named: bool, job_dir: Path | None) -> Invocation:
        return Invocation(named, job_dir or default_dir or Path("outputs") / run_id(), world, local_ranks)

    dirs = config_dirs(arguments)
    bad, good = check_overrides([o for o in overrides if not o.startswith("-") and "=" in o], dirs)
    if bad:
        more = [] if multirun else _other_refusals(bad, good, dirs, invocation)
        print(f"wan-dist: {RefusedError(bad + more)}", file=sys.stderr)
        return REFUSED

    job = _Job(run, invocation)

    import hydra

    sys.argv = [sys.argv[0], *overrides]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()
    except SystemExit as leave:
        if leave.code not in (0, None):  # Hydra has said why; before the first job, it could not compose
            return FAILED if job.outcomes else REFUSED
    codes = [outcome.code for outcome in job.outcomes]
    if codes and all(code == REFUSED for code in codes):
        return REFUSED
    return FAILED if any(codes) else 0


class _Job:
    """What Hydra calls with each job's config.

    outcomes: how the jobs ended, in their order. A call adds its own, which is lost where a launcher calls a copy in
    another process: it is returned as well, so that such a launcher can bring it back and add it here.
    """

    def __init__(
        self, run: Callable[[Config, Invocation], None], invocation: Callable[[bool, Path | None], Invocation]
    ) -> None:
        self.run, self.invocation = run, invocation
        self.outcomes: list[Outcome] = []

    def __call__(self, cfg: Any) -> Outcome:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        from wan_dist.cli.slurm_launcher import is_slurm

        hydra_cfg = HydraConfig.get()
        swept = hydra_cfg.mode == RunMode.MULTIRUN
        job_dir = Path(hydra_cfg.runtime.output_dir) if swept else None

        def action() -> None:
            if is_slurm(hydra_cfg) and not swept:
                why = "a launcher starts the jobs of a sweep, and this is one run"
                remedy = "add --multirun (for a single job too), or submit slurm/generate.sbatch"
                raise RefusedError(
                    [Refusal("hydra/launcher", hydra_cfg.runtime.choices["hydra/launcher"], why, remedy)]
                )
            self.run(_typed(cfg), self.invocation(_names_model(hydra_cfg), job_dir))

        self.outcomes.append(_outcome(action))
        return self.outcomes[-1]


def _outcome(action: Callable[[], None]) -> Outcome:
    """Run one job and say at once what went wrong with it."""
    try:
        action()
    except (RefusedError, RunFailedError) as error:
        print(f"wan-dist: {error}", file=sys.stderr, flush=True)
        return Outcome(REFUSED if isinstance(error, (RefusedError, RunRefusedError)) else FAILED, str(error))
    except Exception:  # a mistake of ours: all of it is worth reading
        traceback.print_exc()
        return Outcome(FAILED, traceback.format_exc())
    return Outcome(0)


def _typed(cfg: Any) -> Config:
    """The composed config as dataclasses. Merged into the schema once more: a `+key` in YAML slips past Hydra."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), cfg))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "config"
        why = str(error).splitlines()[0]
        raise RefusedError([Refusal(key, "?", why, "see conf/README.md for every key")]) from error
    assert isinstance(config, Config)
    unguard(config)
    return config


def _names_model(hydra_cfg: Any) -> bool:
    """Whether a model was chosen: on the command line, or (by an experiment) another one than the default."""
    typed = any(o.lstrip("+").startswith("model=") for o in hydra_cfg.overrides.task)
    return typed or hydra_cfg.runtime.choices.model != DEFAULT_MODEL


def _other_refusals(
    bad: list[Refusal],
    good: list[str],
    dirs: list[Path],
    invocation: Callable[[bool, Path | None], Invocation],
) -> list[Refusal]:
    """What else is wrong, judged without the overrides that were refused already."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    path = ",".join(f"file://{folder.absolute()}" for folder in dirs)
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose("config", [*good, f"hydra.searchpath=[{path}]"], return_hydra_config=True)
        known = not any(refusal.key == "model" or refusal.key.startswith("model.") for refusal in bad)
        named = _names_model(cfg.hydra)
        user = {key: cfg._get_node(key) for key in cfg if key != "hydra"}
        check(_typed(user), replace(invocation(named, None), model_known=known))
    except RefusedError as error:
        return error.refusals
    except (HydraException, OmegaConfBaseException):
        pass  # what is refused already may be what breaks it
    return []
