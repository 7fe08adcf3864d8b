"""The command line: one Hydra process per node composes, checks, freezes and starts (or, under torchrun, hands over
to) the ranks. The only module that imports `hydra.main`.

Exit codes: 0; 2 for a config that cannot run, before any rank starts; 1 for a failure.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from wan_dist.agent.launch import InterruptedRunError, RunFailedError, launch
from wan_dist.agent.prepare import Checked, Invocation, check, freeze_run, run_id
from wan_dist.cli.free_text import is_multirun, literal_overrides, overrides_first, unguard
from wan_dist.cli.overrides import check_overrides
from wan_dist.config.normalise import normalise_switches
from wan_dist.config.schema import Config
from wan_dist.config.store import conf_dir, register_schemas
from wan_dist.planning.refusal import Refusal, RefusedError
from wan_dist.topology import RankEnv, rank_env

DEFAULT_MODEL = "wan_shapes"  # the `model` of conf/config.yaml
FAILED, REFUSED = 1, 2


def main() -> NoReturn:
    """The `wan-dist` command, `python -m wan_dist`, and `launch/generate.py` under torchrun."""
    for stream in (sys.stdout, sys.stderr):  # a path or prompt that the terminal's encoding lacks is no reason to fail
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    env = rank_env()
    if env is None:
        try:
            _stop_on_signals()
            code = _command(sys.argv[1:])
        except InterruptedRunError as stop:
            print(f"wan-dist: {stop}", file=sys.stderr)
            code = FAILED
        sys.exit(code)
    _torchrun_rank(sys.argv[1:], env)


def _command(arguments: Sequence[str]) -> int:
    """`wan-dist`: run every job of this command line; returns the exit code."""
    written: set[tuple[str, str]] = set()

    def run(config: Config, invocation: Invocation) -> None:
        checked = check(config, invocation)
        _refuse_overwriting(checked, written)
        launch(freeze_run(checked), checked.ranks)

    return _hydra(arguments, run, default_dir=None, world=None, local_ranks=None)


def _refuse_overwriting(checked: Checked, written: set[tuple[str, str]]) -> None:
    """Jobs of one sweep must not write over each other's files."""
    output = checked.config.output
    target = (str(output.dir), output.name)
    if target in written:
        why = f"an earlier job of this sweep wrote {output.name!r} there"
        remedy = "leave output.dir null (each job then has a folder of its own), or sweep output.name too"
        raise RefusedError([Refusal("output.dir", output.dir, why, remedy)])
    written.add(target)


def _torchrun_rank(arguments: Sequence[str], env: RankEnv) -> NoReturn:
    """A rank of a hand-typed torchrun: local rank 0 composes for its node, the others take what it froze."""
    from wan_dist.worker import die_with_parent, run_rank

    die_with_parent()
    from wan_dist.distributed.process_group import agent_store

    store = agent_store(timeout_s=24 * 3600)  # a first run may fetch a large checkpoint before it answers
    key = f"wan_dist/frozen/{env.node_rank}"
    if env.local_rank != 0:
        answer = store.get(key).decode()
    else:
        answer = _compose_for_node(arguments, env, store)
        store.set(key, answer)
    if answer.startswith("exit "):
        sys.stdout.flush()
        # The store lives in torchrun's agent, so nobody has to wait for anybody here.
        os._exit(int(answer.removeprefix("exit ")))
    run_rank(Path(answer), env)


def _compose_for_node(arguments: Sequence[str], env: RankEnv, store: Any) -> str:
    """The path of the frozen config, or `exit CODE` where there is nothing to run."""
    if is_multirun(arguments):
        typed = " ".join(a for a in arguments if a not in ("-m", "--multirun"))
        print(
            "wan-dist: --multirun cannot run under a hand-typed torchrun, whose ranks serve one job; "
            f"type instead: wan-dist --multirun {typed}",
            file=sys.stderr,
        )
        return f"exit {REFUSED}"
    if env.rank == 0:
        store.set("wan_dist/run_id", run_id(env.run_id))
    elif (first := store.get("wan_dist/frozen/0").decode()).startswith("exit "):
        return first  # the first node has said why
    name = store.get("wan_dist/run_id").decode()
    frozen: list[Path] = []

    def run(config: Config, invocation: Invocation) -> None:
        frozen.append(freeze_run(check(config, invocation), fresh=env.rank == 0))

    default_dir = Path("outputs") / name
    code = _hydra(arguments, run, default_dir=default_dir, world=env.world_size, local_ranks=env.local_world_size)
    return str(frozen[0]) if frozen else f"exit {code}"


def _hydra(
    arguments: Sequence[str],
    run: Callable[[Config, Invocation], None],
    *,
    default_dir: Path | None,
    world: int | None,
    local_ranks: int | None,
) -> int:
    """Compose with Hydra and call `run` for every job; every job's failure is printed as it happens."""
    multirun = is_multirun(arguments)
    overrides = overrides_first(literal_overrides(arguments, multirun=multirun))
    register_schemas()

    def invocation(named: bool, job_dir: Path | None) -> Invocation:
        return Invocation(named, job_dir or default_dir or Path("outputs") / run_id(), world, local_ranks)

    typed = [o for o in overrides if not o.startswith("-") and "=" in o]
    bad, good = check_overrides(typed)
    if bad:
        rest = [] if multirun or any("/" in r.key or r.why == "no such option" for r in bad) else good
        print(f"wan-dist: {RefusedError(bad + _other_refusals(rest, invocation))}", file=sys.stderr)
        return REFUSED

    codes: list[int] = []

    def job(cfg: Any) -> None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        hydra_cfg = HydraConfig.get()
        job_dir = Path(hydra_cfg.runtime.output_dir) if hydra_cfg.mode == RunMode.MULTIRUN else None
        codes.append(
            _outcome(lambda: run(_typed(cfg), invocation(_names_model(hydra_cfg.overrides.task, cfg), job_dir)))
        )

    import hydra

    sys.argv = [sys.argv[0], *overrides]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()
    except SystemExit as leave:
        if leave.code not in (0, None) and not codes:
            return REFUSED  # Hydra could not compose, and has said why
        return max(codes, default=0) if leave.code in (0, None) else FAILED
    if codes and all(code == REFUSED for code in codes):
        return REFUSED
    return FAILED if any(codes) else 0


def _outcome(action: Callable[[], None]) -> int:
    """Run one job and say at once what went wrong with it; returns its exit code."""
    try:
        action()
    except (RefusedError, RunFailedError) as error:
        print(f"wan-dist: {error}", file=sys.stderr, flush=True)
        return REFUSED if isinstance(error, RefusedError) else FAILED
    except Exception:  # a mistake of ours: all of it is worth reading
        traceback.print_exc()
        return FAILED
    return 0


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
    normalise_switches(config)
    return config


def _names_model(task_overrides: Sequence[str], cfg: Any) -> bool:
    """Whether a model was chosen: on the command line, or (by an experiment) another one than the default."""
    return any(o.lstrip("+").startswith("model=") for o in task_overrides) or cfg.model.name != DEFAULT_MODEL


def _other_refusals(overrides: list[str], invocation: Callable[[bool, Path | None], Invocation]) -> list[Refusal]:
    """What else is wrong, judged without the overrides that were refused already."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if not overrides:
        return []
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose("config", overrides=overrides)
        check(_typed(cfg), invocation(_names_model(overrides, cfg), None))
    except RefusedError as error:
        return error.refusals
    except (HydraException, OmegaConfBaseException):
        pass  # what is refused already may be what breaks it
    return []


def _stop_on_signals() -> None:
    """While no ranks live (their agent handles signals itself), a signal ends this process, sweeps included."""

    def stop(number: int, _frame: Any) -> None:
        raise InterruptedRunError(f"stopped by {signal.Signals(number).name}")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
