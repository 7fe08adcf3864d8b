"""The command line: one process per node composes, checks, freezes and starts (or, under torchrun, hands over to)
the ranks.

Exit codes: 0; 2 for a config that cannot run, before any rank starts; 1 for a failure; 75 after a stop that was asked
for (SIGTERM, SIGUSR1), with the state saved.
"""

import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from wan_dist.agent.launch import (
    InterruptedRunError,
    RunFailedError,
    RunRefusedError,
    StoppedRunError,
    ending_signals,
    launch,
)
from wan_dist.agent.nodes import Arrival, LostNodeError, Meeting, Node, find_node, slurm_address, typed_node
from wan_dist.agent.plan import show_plan
from wan_dist.agent.prepare import Checked, Invocation, check, freeze_run, run_id
from wan_dist.cli.compose import FAILED, REFUSED, compose_and_run
from wan_dist.cli.free_text import is_multirun
from wan_dist.config.schema import Config, leaves
from wan_dist.output.kept_latents import how_to_decode
from wan_dist.planning.refusal import Refusal, RefusedError
from wan_dist.stop import StopRequest
from wan_dist.topology import EXIT_STOPPED, STOP_SIGNALS, RankEnv, rank_env, slurm_step

_CONNECT_S = 20


def main() -> NoReturn:
    """The `wan-dist` command, `python -m wan_dist`, and `launch/generate.py` under torchrun."""
    for stream in (sys.stdout, sys.stderr):  # a path or prompt that the terminal's encoding lacks is no reason to fail
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    gc.disable()  # until there is a job: what is made by then stays, and looking through it takes a tenth of the time
    env = rank_env()
    if env is None:
        try:
            _stop_on_signals()
            node = typed_node(sys.argv[1:]) if slurm_step() is None else None  # Slurm ends its other tasks itself
            jobs = Jobs(None if node is None else Arrival(node))
            code = compose_and_run(sys.argv[1:], jobs.run, default_dir=None, world=None, local_ranks=None)
            _ignore_stops()
        except InterruptedRunError as stop:
            _ignore_stops()
            print(f"wan-dist: {stop}", file=sys.stderr)
            code = EXIT_STOPPED if isinstance(stop, StoppedRunError) else FAILED
        leave(code)
    _torchrun_rank(sys.argv[1:], env)


def leave(code: int) -> NoReturn:
    """End this process; where torch came into it, past the interpreter's teardown, which unwinds threads that are
    inside torch's store: that aborts it ("terminate called without an active exception")."""
    if "torch" not in sys.modules:
        sys.exit(code)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader of a pipe may be gone
            stream.flush()
    os._exit(code)


def _ignore_stops() -> None:
    """This process is on its way out, and Python's own end would take a signal for a death."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    logging.getLogger("torch").setLevel(logging.ERROR)  # it counts its caches to Hydra's log at the end


class Jobs:
    """The jobs of one `wan-dist` command line: one, or a sweep's, one after the other."""

    def __init__(self, arrival: Arrival | None = None) -> None:
        self._arrival = arrival
        self._written: set[tuple[str, str]] = set()
        self._meeting: Meeting | None = None
        self._count = 0
        self._asked: signal.Signals | None = None

    def run(self, config: Config, invocation: Invocation) -> None:
        """Check and freeze one job, and run this node's ranks of it. Raises RefusedError, RunFailedError,
        InterruptedRunError."""
        gc.enable()
        if self._asked is not None:  # in the last moments of the job before this one, which is complete
            raise StoppedRunError(f"stopped by {self._asked.name} after {self._count} jobs; the others were not begun")
        node = find_node(config.launch, slurm_step(), slurm_address)
        invocation, self._count = replace(invocation, nodes=node.count), self._count + 1
        if config.task == "plan":
            if node.rank == 0:  # one node shows it
                _show(check(config, invocation))
            return
        if node.count == 1:
            self._run_ranks(self._prepare(config, invocation, node), node)
            return
        try:
            self._run_ranks(self._prepare_together(config, invocation, node), node)
        except LostNodeError as error:
            raise RunFailedError(str(error)) from error

    def _run_ranks(self, prepared: tuple[Checked, Path], node: Node) -> None:
        checked, frozen = prepared
        try:
            self._asked = launch(frozen, checked.ranks // node.count, self._meet(node), f"job{self._count}")
        except RunFailedError as error:
            told, advice = str(error), how_to_decode(frozen)
            raise type(error)(f"{told}\n{advice}" if advice and advice not in told else told) from None

    def _prepare(self, config: Config, invocation: Invocation, node: Node) -> tuple[Checked, Path]:
        checked = check(config, invocation)
        _refuse_overwriting(checked, self._written)
        return checked, freeze_run(checked, node=node.rank)

    def _prepare_together(self, config: Config, invocation: Invocation, node: Node) -> tuple[Checked, Path]:
        """The same, in the folder that node 0 names; where a node cannot run it, none does."""
        meeting = self._meet(node)
        mine: dict[str, Any]
        told = json.loads(meeting.first_says(json.dumps({"folder": str(invocation.default_dir), "nodes": node.count})))
        refusal: RefusedError | None = None
        try:
            if told["nodes"] != node.count:
                why = f"node 0 was given {told['nodes']}"
                raise RefusedError([Refusal("launch.nodes", node.count, why, "give the same on every node")])
            prepared = self._prepare(config, replace(invocation, default_dir=Path(told["folder"])), node)
            mine = {"config": _same_on_all_nodes(prepared[0].config)}
        except RefusedError as error:
            refusal, mine = error, {"refused": str(error)}
        meeting.answer(mine)
        if told["nodes"] != node.count and refusal is not None:
            raise refusal
        answers = meeting.answers()
        for number, answer in enumerate(answers):
            told_there = number < node.rank and answer.get("refused") == mine.get("refused")
            if refusal is not None and not told_there:
                raise refusal
            if "refused" in answer:
                raise RunRefusedError(f"node {number} cannot run this; its own output says why")
            theirs = answer["config"]
            found = [
                Refusal(key, value, f"node {number} has {theirs.get(key)}", "give the same on every node")
                for key, value in mine["config"].items()
                if theirs.get(key) != value
            ]
            if found:
                raise RefusedError(found)
        return prepared

    def _meet(self, node: Node) -> Meeting:
        if self._meeting is None:
            self._meeting = Meeting(node, self._arrival)
        return self._meeting


def _same_on_all_nodes(config: Config) -> dict[str, Any]:
    """The values of a resolved config that must be, by key, as JSON has them. Where files lie is each node's own."""
    own = ("launch.node_rank", "model.path", "image", "last_image", "latents", "output.dir")
    return json.loads(json.dumps({key: value for key, value, _ in leaves(config) if key not in own}))


def _show(checked: Checked) -> None:
    """Show a plan, which is not run."""
    assert checked.source is not None and checked.checkpoint is not None, "a plan is of a model"
    show_plan(checked.config, checked.checkpoint, checked.source.name, guided=checked.guided)


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
    stop = StopRequest()
    stop.listen(None)  # before torch makes threads, which would take the signals
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
    run_rank(Path(answers[env.node_rank]), env, stop=stop)


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
        gc.enable()
        checked = check(config, invocation)
        if checked.config.task != "plan":
            frozen.append(freeze_run(checked, node=env.node_rank))
        elif env.rank == 0:  # one node shows it
            _show(checked)

    default_dir = Path("outputs") / name
    code = compose_and_run(
        arguments, run, default_dir=default_dir, world=env.world_size, local_ranks=env.local_world_size
    )
    return str(frozen[0]) if frozen else f"exit {code}"


def _stop_on_signals() -> None:
    """While no ranks live (their agent handles signals itself), a signal ends this process, sweeps included."""

    def end(number: int, _frame: Any) -> None:
        kind = StoppedRunError if number in STOP_SIGNALS else InterruptedRunError
        raise kind(f"stopped by {signal.Signals(number).name}")

    for number in (*STOP_SIGNALS, *ending_signals()):
        signal.signal(number, end)
