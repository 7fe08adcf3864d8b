"""What goes wrong in mid-run: signals, a rank that raises or is killed; one account of it, and nothing left behind."""

import os
import signal
import textwrap
import time
from dataclasses import dataclass

import psutil
import pytest

from e2e.processes import Running, files_in, processes_about, together
from support.commands import wan_dist
from support.tiers import in_all

# On PYTHONPATH, this makes one rank raise in its second step: wan_dist itself has no such hook.
SITECUSTOMIZE = textwrap.dedent(
    """
    import gc, os, sys
    from importlib.machinery import PathFinder

    class Plant:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name != "wan_dist.sampling.denoise":
                return None
            spec = PathFinder.find_spec(name, path, target)
            run_module = spec.loader.exec_module

            def exec_module(module):
                run_module(module)
                guided_prediction = module.guided_prediction

                def fail(predict, latents, timestep, step, axis):
                    if step.index == 1:
                        raise RuntimeError(f"planted; garbage is collected: {gc.isenabled()}")
                    return guided_prediction(predict, latents, timestep, step, axis)

                module.guided_prediction = fail

            spec.loader.exec_module = exec_module
            return spec

    if os.environ.get("RANK") == os.environ["FAIL_RANK"]:
        sys.meta_path.insert(0, Plant)
    """
)


@dataclass
class Ended:
    """How a disturbed run ended; `files` and `processes` are what it left."""

    code: int
    err: str
    seconds: float
    files: set[str]
    processes: list[str]
    folder: str


ACTIONS = {
    "SIGINT": lambda run: run.process.send_signal(signal.SIGINT),
    "SIGTERM": lambda run: run.process.send_signal(signal.SIGTERM),
    "SIGUSR1": lambda run: run.process.send_signal(signal.SIGUSR1),
    "SIGKILL": lambda run: run.process.send_signal(signal.SIGKILL),
    "rank killed": lambda run: run.rank(1).send_signal(signal.SIGKILL),
    "rank raises": lambda run: None,
}
FRESH = in_all("SIGTERM", "SIGKILL", "rank killed")


@pytest.fixture(scope="module")
def ends(tmp_path_factory, tiny):
    """Every action, done to a run of two ranks that is denoising for minutes."""
    plant = tmp_path_factory.mktemp("plant")
    (plant / "sitecustomize.py").write_text(SITECUSTOMIZE)

    def disturb(action):
        folder = tmp_path_factory.mktemp("disturbed")
        typed = ["model=tiny", f"model.path={tiny}", "prompt=x", "sampler.steps=20000", "parallelism.ulysses=2"]
        env = {"PYTHONPATH": str(plant), "FAIL_RANK": "1"} if action == "rank raises" else {}
        with Running(["wan-dist", *typed, f"output.dir={folder}"], folder, fresh=action in FRESH, **env) as run:
            run.wait_for(r"^step \d+/20000")
            begin = time.monotonic()
            ACTIONS[action](run)
            code = run.finish()
        left = processes_about(str(folder))
        return Ended(code, run.err, time.monotonic() - begin, files_in(folder), left, str(folder))

    return dict(zip(ACTIONS, together(*(lambda a=a: disturb(a) for a in ACTIONS)), strict=True))


@pytest.mark.parametrize("action", ACTIONS)
def test_nothing_is_left(ends, action):
    end = ends[action]
    assert end.processes == [] and end.seconds < 10
    assert end.files == set()


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 1), ("SIGTERM", 75), ("SIGUSR1", 75)])
def test_a_signal_ends_the_run_in_one_sentence(ends, name, code):
    assert ends[name].code == code
    assert ends[name].err.count(f"wan-dist: stopped by {name}") == 1 and "Traceback" not in ends[name].err


def test_ranks_that_are_born_to_a_dead_parent_end(tmp_path, tiny):
    """The parent killed in the very moment its first rank appears."""
    typed = ["model=tiny", f"model.path={tiny}", "prompt=x", "sampler.steps=20000", f"output.dir={tmp_path}"]
    with Running(["wan-dist", *typed, "parallelism.ulysses=2"], tmp_path, fresh=True) as run:
        parent = psutil.Process(run.process.pid)
        while not any("wan_dist.worker" in " ".join(rank.cmdline()) for rank in parent.children()):
            assert run.process.poll() is None, run.err
        run.process.kill()
        run.finish()
    assert processes_about(str(tmp_path), within=10) == []


def test_a_killed_rank_is_named(ends):
    end = ends["rank killed"]
    assert end.code == 1 and "Traceback" not in end.err
    assert end.err.count("wan-dist: ") == 1
    assert "rank 1 on " in end.err and "ended without an account: killed by SIGKILL" in end.err
    assert f"{end.folder}/.run/video/rank1.log" in end.err


def test_a_rank_that_raises_is_told_once(ends):
    end = ends["rank raises"]
    assert end.code == 1
    # It was off while the rank imported.
    assert end.err.count("Traceback") == 1 and end.err.count("RuntimeError: planted; garbage is collected: True") == 1
    assert "rank 1 on " in end.err and "denoise" in end.err
    log = f"{end.folder}/.run/video/rank1.log"
    assert log in end.err and "RuntimeError: planted" in open(log).read()


def test_the_next_run_of_a_name_removes_its_leftovers(tmp_path, tiny):
    for name in ("video.mp4.tmp", "video.json.tmp", "other.mp4.tmp"):
        (tmp_path / name).write_text("cut short")
    (tmp_path / "video.mp4").write_text("an older video")
    typed = ["model=tiny", f"model.path={tiny}", "prompt=x", "parallelism=single", f"output.dir={tmp_path}"]
    done = wan_dist(*typed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path) == {"video.mp4", "video.json", "other.mp4.tmp"}
    assert os.path.getsize(tmp_path / "video.mp4") > 1000
