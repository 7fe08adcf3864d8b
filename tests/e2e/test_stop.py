"""Real commands that are asked to stop by real signals, in every phase, and go on from there; and runs that are killed
or stand still.

What makes a video together with others is one chain: each run of it goes on from what the one before has left.
"""

import json
import re
import shutil
import signal
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from e2e.processes import Running, files_in, processes_about, together
from support.commands import wan_dist
from wan_dist.agent.watchdog import handles

STEPS = 20
TENSORS = {"latents": "video.latents.safetensors", "frames": "video.frames.safetensors"}
COMPLETE = {*TENSORS.values(), "video.json"}
RESUME = "output.resume=auto"

# On PYTHONPATH, this makes ranks slow: in one phase, where they wait for a signal, or in every step.
SITECUSTOMIZE = textwrap.dedent(
    """
    import os, sys, time
    from contextlib import contextmanager
    from importlib.machinery import PathFinder

    class Plant:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name != "wan_dist.output.record":
                return None
            spec = PathFinder.find_spec(name, path, target)
            run_module = spec.loader.exec_module

            def exec_module(module):
                run_module(module)
                timed, mark_step = module.RankReport.timed, module.RankReport.mark_step

                @contextmanager
                def slow_phase(self, phase):
                    with timed(self, phase):
                        if phase == os.environ.get("SLOW_PHASE"):
                            time.sleep(60)
                        yield

                def slow_step(self, done, of):
                    mark_step(self, done, of)
                    time.sleep(float(os.environ.get("SLOW_STEPS", "0")))

                module.RankReport.timed, module.RankReport.mark_step = slow_phase, slow_step

            spec.loader.exec_module = exec_module
            return spec

    if "RANK" in os.environ:
        sys.meta_path.insert(0, Plant)
    """
)

Act = Callable[[Running, Path], None]


@dataclass
class Ended:
    """How a run ended, and what it has left by then."""

    code: int
    err: str
    seconds: float
    files: set[str]
    state: bool
    processes: list[str]
    logs: dict[int, str]


class Chain:
    """Runs of one request in one folder, one after the other."""

    def __init__(self, folder: Path, plant: Path, model: Path) -> None:
        self.folder, self.plant = folder, plant
        self.run_folder = folder / ".run" / "video"
        formats = f"output.formats=[{','.join(TENSORS)}]"
        self.typed = ["model=tiny", f"model.path={model}", "prompt=a cat", f"sampler.steps={STEPS}", formats]
        self.typed.append(f"output.dir={folder}")

    @property
    def state(self) -> Path:
        return self.run_folder / "state.safetensors"

    def disturbed(self, act: Act, *settings: str, fresh: bool = False, **slow: str) -> Ended:
        """One run, to which `act` is done when it is time: as `act` itself says."""
        command, plant = ["wan-dist", *self.typed, *settings], {"PYTHONPATH": str(self.plant), **slow}
        with Running(command, self.folder, fresh=fresh, **plant) as run:
            act(run, self.run_folder)
            begin = time.monotonic()
            code = run.finish()
        return self._ended(code, run.err, time.monotonic() - begin)

    def finished(self, *settings: str) -> Ended:
        """One that nothing disturbs."""
        done = wan_dist(*self.typed, *settings, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return self._ended(done.returncode, done.stderr, 0.0)

    def _ended(self, code: int, err: str, seconds: float) -> Ended:
        left = processes_about(str(self.folder))
        logs = {rank: path.read_text() for rank in range(2) if (path := self.run_folder / f"rank{rank}.log").exists()}
        return Ended(code, err, seconds, files_in(self.folder), self.state.exists(), left, logs)

    def tensor(self, kind: str) -> torch.Tensor:
        return load_file(self.folder / TENSORS[kind])[kind]


@pytest.fixture(scope="module")
def chain(tmp_path_factory, tiny):
    plant = tmp_path_factory.mktemp("plant")
    (plant / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return lambda: Chain(tmp_path_factory.mktemp("chain"), plant, tiny)


def wait_until(is_so: Callable[[], bool], run: Running) -> None:
    give_up = time.monotonic() + 60
    while not is_so():
        assert run.process.poll() is None and time.monotonic() < give_up, run.err
        time.sleep(0.02)


def in_phase(phase: str, number: signal.Signals) -> Act:
    """The signal to the agent once the first rank is in a phase. Its log is that of this run: the agent removes older
    ones before a rank starts; before that, a rank of this run need not be there."""

    def act(run: Running, run_folder: Path) -> None:
        log = run_folder / "rank0.log"
        begin = time.time()
        wait_until(lambda: log.exists() and log.stat().st_mtime > begin and f"phase {phase}" in log.read_text(), run)
        run.process.send_signal(number)

    return act


def in_mid_denoise(send: Callable[[Running], None]) -> Act:
    def act(run: Running, _run_folder: Path) -> None:
        run.wait_for(rf"^step \d+/{STEPS}")
        send(run)

    return act


def killed_with_a_state(run: Running, run_folder: Path) -> None:
    wait_until((run_folder / "state.safetensors").exists, run)
    run.process.kill()


def by_phases(chain: Chain) -> dict[str, Ended]:
    """Everything that can befall one video of one rank, and its end."""
    one = ("parallelism=single", RESUME)
    ends = {
        "encode": chain.disturbed(in_phase("encode", signal.SIGTERM), *one, SLOW_PHASE="encode"),
        "killed": chain.disturbed(killed_with_a_state, *one, "output.checkpoint_every=1", SLOW_STEPS="0.15"),
        "load": chain.disturbed(in_phase("load", signal.SIGUSR1), *one, SLOW_PHASE="load"),
        "write": chain.disturbed(in_phase("write", signal.SIGUSR1), *one, SLOW_PHASE="write"),
        "decode": chain.disturbed(in_phase("decode", signal.SIGTERM), *one, SLOW_PHASE="decode"),
    }
    return {**ends, "end": chain.finished(*one)}


def by_ranks(chain: Chain) -> dict[str, Ended]:
    """Two ranks that are stopped twice in their steps, and one that goes on."""
    two, asked = ("parallelism.ulysses=2", RESUME), signal.SIGTERM
    agent = in_mid_denoise(lambda run: run.process.send_signal(asked))
    rank = in_mid_denoise(lambda run: run.rank(1).send_signal(asked))
    ends = {"agent": chain.disturbed(agent, *two, SLOW_STEPS="0.15")}
    copy = shutil.copytree(chain.folder, chain.folder.with_name(chain.folder.name + "-copy"))
    ends["rank"] = chain.disturbed(rank, *two, SLOW_STEPS="0.15")
    ends["end"] = chain.finished("parallelism=single", RESUME)
    shutil.copytree(copy, chain.folder / "stopped")  # as the first of them has left it, to be refused
    return ends


def stalls(chain: Chain, rank: int, *settings: str) -> Ended:
    """A rank that is stopped in its steps, once it has had the time to publish that it takes them."""

    def send(run: Running) -> None:
        time.sleep(1)
        run.rank(rank).send_signal(signal.SIGSTOP)

    stop = in_mid_denoise(send)
    # Slow enough for it to be in its steps still when it has been continued, to write its stacks.
    return chain.disturbed(stop, *settings, "runtime.stall_timeout_s=5", SLOW_STEPS="1")


@dataclass
class All:
    chains: dict[str, Chain]
    undisturbed: Ended
    phases: dict[str, Ended]
    ranks: dict[str, Ended]
    stalls: dict[str, Ended]


@pytest.fixture(scope="module")
def ran(chain):
    chains = {name: chain() for name in ("undisturbed", "phases", "ranks", "one of two", "the only one")}
    phases, ranks, undisturbed, *stalled = together(
        lambda: by_phases(chains["phases"]),
        lambda: by_ranks(chains["ranks"]),
        lambda: chains["undisturbed"].finished("parallelism=single"),
        lambda: stalls(chains["one of two"], 1, "parallelism.ulysses=2"),
        lambda: stalls(chains["the only one"], 0, "parallelism=single"),
    )
    return All(chains, undisturbed, phases, ranks, dict(zip(("one of two", "the only one"), stalled, strict=True)))


@pytest.mark.parametrize(
    ("name", "number", "when"),
    [
        ("encode", "SIGTERM", "before the first step; nothing was to be saved"),
        ("load", "SIGUSR1", "after step "),  # which the run that was killed had saved
        ("write", "SIGUSR1", "after the last step; its state is saved, "),
        ("decode", "SIGTERM", "after the last step; its state is saved, "),
    ],
)
def test_every_phase_can_be_stopped(ran, name, number, when):
    end = ran.phases[name]
    assert end.code == 75 and end.processes == [] and end.seconds < 30
    assert end.err.count(f"wan-dist: stopped by {number} {when}") == 1 and "Traceback" not in end.err
    assert end.state == (name != "encode")
    assert end.files == ({TENSORS["latents"]} if name == "decode" else set())


def test_a_stop_tells_what_to_type(ran):
    how = f"the same command goes on from there with: {RESUME} output.dir={ran.chains['phases'].folder}"
    assert how in ran.phases["decode"].err and how in ran.phases["write"].err


def test_what_was_stopped_and_killed_gives_the_undisturbed_video(ran):
    assert ran.phases["end"].files == ran.undisturbed.files == COMPLETE
    for kind in TENSORS:
        ours, theirs = (ran.chains[name].tensor(kind) for name in ("phases", "undisturbed"))
        assert torch.equal(ours, theirs), kind


def test_after_the_last_step_no_transformer_is_read(ran):
    end, chain = ran.phases["end"], ran.chains["phases"]
    assert end.err.count(f"wan-dist: resumed at step {STEPS} of {STEPS}\n") == 1
    assert not end.state and not (chain.run_folder / "state.safetensors.tmp").exists()
    read = json.loads((chain.folder / "video.json").read_text())["ranks"][0]["bytes_read"]
    assert set(read) == {"vae"}


def test_a_killed_run_goes_on_from_its_last_state(ran):
    killed, next_run = ran.phases["killed"], ran.phases["load"]
    assert killed.code == -signal.SIGKILL and killed.processes == [] and killed.files == set() and killed.state
    (step,) = re.findall(rf"^wan-dist: resumed at step (\d+) of {STEPS}$", next_run.err, re.MULTILINE)
    assert 0 < int(step) < STEPS
    assert f"wan-dist: resumed at step {step} of {STEPS}\n" in ran.phases["write"].err  # it was stopped while it loaded


@pytest.mark.parametrize("name", ["agent", "rank"])
def test_all_ranks_stop_after_the_same_step(ran, name):
    end = ran.ranks[name]
    assert end.code == 75 and end.processes == [] and end.files == set() and end.state and end.seconds < 30
    (step,) = re.findall(rf"^wan-dist: stopped by .+ after step (\d+) of {STEPS};", end.err, re.MULTILINE)
    assert 0 < int(step) < STEPS and "Traceback" not in end.err
    for rank in range(2):
        assert f"; saved: {step} of {STEPS} steps" in end.logs[rank]


def test_the_signal_to_the_agent_is_named(ran):
    """Not asked of one to a rank: whether the first account that is read is that rank's is a matter of chance."""
    assert ran.ranks["agent"].err.count("wan-dist: stopped by SIGTERM after step ") == 1


def test_one_rank_goes_on_where_two_have_stopped(ran):
    _, rank, end = ran.ranks.values()
    (first,) = re.findall(r"^wan-dist: resumed at step (\d+) ", rank.err, re.MULTILINE)
    (second,) = re.findall(r"^wan-dist: resumed at step (\d+) ", end.err, re.MULTILINE)
    assert 0 < int(first) < int(second) < STEPS
    assert f"after step {first} of" in ran.ranks["agent"].err and f"after step {second} of" in rank.err
    ours, theirs = (ran.chains[name].tensor("latents") for name in ("ranks", "undisturbed"))
    assert (ours - theirs).abs().max() < 1e-5
    assert not end.state


@pytest.mark.parametrize(("name", "rank"), [("one of two", 1), ("the only one", 0)])
def test_a_rank_that_stands_still_is_named(ran, name, rank):
    end = ran.stalls[name]
    assert end.code == 1 and end.processes == [] and end.files == set() and end.seconds < 30
    assert end.err.count("wan-dist: no progress for ") == 1 and "Traceback" not in end.err
    told = rf"\(runtime\.stall_timeout_s\): rank {rank} on \S+ \(pid \d+\), phase denoise, step \d+ of {STEPS}, "
    assert re.search(told + "does not respond, its process is stopped", end.err), end.err
    for log in end.logs.values():
        assert "most recent call first" in log


@pytest.fixture(scope="module")
def refused(ran, chain, tmp_path_factory, checkpoints):
    """Runs that are to go on from the state of another one. Returns what each said."""
    source = ran.chains["ranks"].folder / "stopped"

    def refuse(*settings: str, cut: bool = False) -> str:
        copy = chain()
        shutil.copytree(source, copy.folder, dirs_exist_ok=True)
        if cut:
            copy.state.write_bytes(copy.state.read_bytes()[:-100])
        before = {path: path.read_bytes() for path in sorted(copy.run_folder.iterdir())}
        done = wan_dist(*copy.typed, "parallelism=single", RESUME, *settings, cwd=copy.folder)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert {path: path.read_bytes() for path in sorted(copy.run_folder.iterdir())} == before
        assert str(copy.state) in done.stderr and "(1 reason)" in done.stderr
        return done.stderr

    told = together(
        lambda: refuse("sampler.seed=5", "sampler.solver=euler", "prompt=a dog"),
        lambda: refuse(f"model.path={checkpoints(seed=3)}"),
        lambda: refuse(cut=True),
    )
    return dict(zip(("request", "model", "truncated"), told, strict=True))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "request",
            [
                "sampler.seed was 0 and is 5",
                "sampler.solver was unipc and is euler",
                "prompt was 'a cat' and is 'a dog'",
                "use another output.name, output.resume=off to start over, or remove",
            ],
        ),
        ("model", ["the saved state is that of another run: the model is another one (its files differ)"]),
        ("truncated", ["the saved state cannot be used: truncated: tensor "]),
    ],
)
def test_a_state_of_another_run_is_refused_before_any_rank_starts(refused, name, words):
    for word in words:
        assert refused[name].count(word) == 1


@pytest.mark.parametrize("moment", ["it composes", "a rank is born"])
def test_a_signal_before_ranks_listen(chain, moment):
    """The handler's being there tells that the agent is on its way; a rank that does not listen yet is ended by it."""
    chain = chain()

    def act(run: Running, _run_folder: Path) -> None:
        agent = psutil.Process(run.process.pid)
        if moment == "it composes":
            wait_until(lambda: handles(agent.pid, signal.SIGTERM), run)
        else:
            wait_until(lambda: any("wan_dist.worker" in " ".join(child.cmdline()) for child in agent.children()), run)
        run.process.send_signal(signal.SIGTERM)

    end = chain.disturbed(act, "parallelism=single", fresh=True)
    assert end.code == 75 and end.processes == [] and end.files == set() and not end.state
    assert end.err.count("wan-dist: stopped by SIGTERM") == 1 and "Traceback" not in end.err
