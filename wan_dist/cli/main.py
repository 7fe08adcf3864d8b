"""The command line: one process per node composes, checks, freezes and starts (or, under torchrun, hands over to)
the ranks.

Exit codes: 0; 2 for a config that cannot run, before any rank starts; 1 for a failure.
"""

import os
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from wan_dist.agent.launch import InterruptedRunError, RunFailedError, launch, stopping_signals
from wan_dist.agent.plan import show_plan
from wan_dist.agent.prepare import Checked, Invocation, check, freeze_run, run_id
from wan_dist.cli.compose import FAILED, REFUSED, compose_and_run
from wan_dist.cli.free_text import is_multirun
from wan_dist.config.schema import Config
from wan_dist.output.kept_latents import how_to_decode
from wan_dist.planning.refusal import Refusal, RefusedError
from wan_dist.topology import RankEnv, rank_env

_CONNECT_S = 20


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
        if _is_shown(checked):
            return
        _refuse_overwriting(checked, written)
        frozen = freeze_run(checked)
        try:
            launch(frozen, checked.ranks)
        except (RunFailedError, InterruptedRunError) as error:
            told, advice = str(error), how_to_decode(frozen)
            raise type(error)(f"{told}\n{advice}" if advice and advice not in told else told) from None

    return compose_and_run(arguments, run, default_dir=None, world=None, local_ranks=None)


def _is_shown(checked: Checked) -> bool:
    """Whether this is a plan, which is shown and not run; shows it."""
    if checked.config.task != "plan":
        return False
    assert checked.source is not None and checked.checkpoint is not None, "a plan is of a model"
    show_plan(checked.config, checked.checkpoint, checked.source.name, guided=checked.guided)
    return True


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

    store = agent_store(_CONNECT_S)  # torchrun serves it already; if it does not, torchrun is dead
    store.set_timeout(timedelta(days=1))  # a node may fetch a large checkpoint before it answers
    if env.local_rank == 0:
        store.set(_answer_key(env.node_rank), _compose_for_node(arguments, env, store))
    answers = [store.get(_answer_key(node)).decode() for node in range(env.nodes)]
    refused = [node for node, answer in enumerate(answers) if answer.startswith("exit ")]
    if refused:
        if env.local_rank == 0 and refused[0] not in (0, env.node_rank):
            print(f"wan-dist: node {refused[0]} cannot run this; its own terminal says why", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # The store lives in torchrun's agent, so nobody has to wait for anybody here.
        os._exit(int(answers[refused[0]].removeprefix("exit ")))
    run_rank(Path(answers[env.node_rank]), env)


def _answer_key(node: int) -> str:
    """Where local rank 0 of a node leaves the path of its frozen config, or `exit CODE`."""
    return f"wan_dist/frozen/{node}"


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
    elif (first := store.get(_answer_key(0)).decode()).startswith("exit "):
        return first  # the first node has said why
    name = store.get("wan_dist/run_id").decode()
    frozen: list[Path] = []

    def run(config: Config, invocation: Invocation) -> None:
        checked = check(config, invocation)
        is_plan_elsewhere = checked.config.task == "plan" and env.rank != 0  # one node shows it
        if not is_plan_elsewhere and not _is_shown(checked):
            frozen.append(freeze_run(checked, node=env.node_rank))

    default_dir = Path("outputs") / name
    code = compose_and_run(
        arguments, run, default_dir=default_dir, world=env.world_size, local_ranks=env.local_world_size
    )
    return str(frozen[0]) if frozen else f"exit {code}"


def _stop_on_signals() -> None:
    """While no ranks live (their agent handles signals itself), a signal ends this process, sweeps included."""

    def stop(number: int, _frame: Any) -> None:
        raise InterruptedRunError(f"stopped by {signal.Signals(number).name}")

    for number in stopping_signals():
        signal.signal(number, stop)
