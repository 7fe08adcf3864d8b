"""`wan-dist --multirun hydra/launcher=slurm`: jobs on several nodes, failures that are told, jobs that vanish, and
sweeps that are left alone."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from e2e.processes import Running, together
from safetensors.torch import load_file

from support.commands import BIN, wan_dist

SWEEP = ("--multirun", "hydra/launcher=slurm")
MESH = ("parallelism.cfg=2",)
HELD = "+hydra.launcher.additional_parameters.hold=true"  # jobs that cost nothing: they never start


def typed(checkpoint: Path | str, *overrides: str) -> list[str]:
    return ["model=tiny", f"model.path={checkpoint}", "prompt=a cat", "output.formats=[latents]", *overrides]


def sweep_folder(cwd: Path) -> Path:
    (folder,) = cwd.glob("multirun/*/*")
    return folder


def latents(folder: Path) -> torch.Tensor:
    return load_file(folder / "video.latents.safetensors")["latents"]


def sweeping(cluster, cwd: Path, *overrides: str) -> Running:
    return Running(["wan-dist", *SWEEP, *overrides], cwd, SLURM_CONF=str(cluster.configuration))


def slurm_job(running: Running, number: int) -> str:
    """The Slurm job of the sweep's job `number`, once it is submitted."""
    running.wait_for(rf"#{number} : .*: Slurm job \S+$")
    return re.search(rf"#{number} : .*: Slurm job (\S+)$", running.err, re.MULTILINE)[1]


class TestThreeJobsOnTwoNodes:
    @pytest.fixture(scope="class")
    def done(self, two_nodes, tmp_path_factory, tiny):
        """The sweep, with a rank on each node, and the same mesh on this machine: both finished."""
        cwd, here = tmp_path_factory.mktemp("sweep"), tmp_path_factory.mktemp("here")
        with sweeping(
            two_nodes,
            cwd,
            "hydra.launcher.nodes=2",
            "hydra.launcher.array_parallelism=2",
            *typed(tiny, *MESH, "sampler.seed=1,2,3"),
        ) as running:
            assert running.finish(timeout=300) == 0, running.err
        alone = wan_dist(*typed(tiny, *MESH, "sampler.seed=3", f"output.dir={here}"), cwd=here)
        assert alone.returncode == 0, alone.stderr
        return sweep_folder(cwd), running, here

    def test_each_has_its_seed_and_its_folder(self, done):
        folder, _, here = done
        found = [latents(folder / str(number)) for number in range(3)]
        seeds = [json.loads((folder / f"{n}/video.json").read_text())["request"]["seed"] for n in range(3)]
        assert seeds == [1, 2, 3]
        assert torch.equal(found[2], latents(here))
        assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])

    def test_one_run_holds_the_ranks_of_both_nodes(self, done):
        folder, _, _ = done
        ranks = json.loads((folder / "0/video.json").read_text())["ranks"]
        assert [rank["rank"] for rank in ranks] == [0, 1]

    def test_the_terminal_says_where_each_is(self, done):
        _, running, _ = done
        assert len(re.findall(r"#\d : done$", running.err, re.MULTILINE)) == 3
        assert running.err.count("wan-dist: ") == running.err.count("wan-dist: no accounting here") == 1


class TestJobsThatFail:
    @pytest.fixture(scope="class")
    def done(self, two_nodes, tmp_path_factory, checkpoints):
        """Three jobs on one node: one has a damaged checkpoint, one is cancelled before it starts, one is well."""
        cwd, healthy = tmp_path_factory.mktemp("fail"), checkpoints(max_shard_size="60KB")
        damaged = shutil.copytree(healthy, cwd / "damaged")
        shard = sorted((damaged / "transformer").glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-40])
        paths = f"'{damaged}','{healthy}','{healthy}'"
        overrides = typed(paths, "parallelism=single", "hydra.launcher.array_parallelism=2")
        with sweeping(two_nodes, cwd, *overrides) as running:
            cancelled = slurm_job(running, 2)
            two_nodes.cancel(cancelled)
            code = running.finish(timeout=120)
        return code, running.err, sweep_folder(cwd), shard, cancelled

    def test_the_others_finish(self, done):
        code, err, folder, _, _ = done
        assert code == 1
        assert latents(folder / "1").isfinite().all() and err.count("#1 : done\n") == 1
        assert not (folder / "0/video.latents.safetensors").exists()

    def test_the_failure_is_the_jobs_own(self, done):
        _, err, folder, shard, _ = done
        (told,) = re.findall(r"^wan-dist: job 0 \(.*\), Slurm job (\S+), failed:\n((?:  .*\n)+)", err, re.MULTILINE)
        assert f"transformer/{shard.name}: truncated" in told[1] and "failed in phase" in told[1]
        assert str(folder / f".submitit/{told[0]}/{told[0]}_0_log.err") in told[1]
        assert "Traceback" not in err and "submitit." not in err

    def test_the_cancelled_job_is_noticed_without_accounting(self, done):
        _, err, _, _, cancelled = done
        assert re.search(rf"^wan-dist: job 2 .*Slurm job {cancelled}, failed:$", err, re.MULTILINE)
        assert re.search(r"ended without a result; Slurm (no longer knows it|says CANCELLED)", err)  # as squeue tells


def test_a_signal_leaves_the_jobs_to_slurm_and_says_how_to_cancel_them(two_nodes, tmp_path, tiny):
    with sweeping(two_nodes, tmp_path, HELD, *typed(tiny, "sampler.seed=1,2")) as running:
        ids = [slurm_job(running, number) for number in (0, 1)]
        running.wait_for("Logs: ")
        running.process.send_signal(signal.SIGINT)
        assert running.finish(timeout=20) == 1
    assert f"these Slurm jobs go on: {' '.join(ids)}; to cancel them: scancel {' '.join(ids)}" in running.err
    assert {two_nodes.show(job)["JobState"] for job in ids} == {"PENDING"}
    two_nodes.cancel(ids[0].split("_")[0])


def test_a_requeued_job_goes_on_in_its_folder(two_nodes, tmp_path, tiny):
    overrides = ["parallelism=single", "sampler.steps=300", "output.checkpoint_every=5", "output.resume=auto"]
    with sweeping(two_nodes, tmp_path, *typed(tiny, *overrides)) as running:
        job = slurm_job(running, 0)
        running.wait_for("Logs: ")
        log = sweep_folder(tmp_path) / f".submitit/{job}/{job}_0_log.err"
        two_nodes.wait_until(job, lambda _: log.exists() and re.search(r"step \d+/300", log.read_text()), timeout=60)
        two_nodes.signal(job, "USR1", batch=False)  # as Slurm does before the time limit
        two_nodes.release(job)
        assert running.finish(timeout=60) == 0, running.err
    assert "resumed at step" in log.read_text()
    assert [path.name for path in sweep_folder(tmp_path).iterdir() if path.name.isdecimal()] == ["0"]
    assert latents(sweep_folder(tmp_path) / "0").isfinite().all()


def test_a_job_that_slurm_lists_as_cancelled_is_told_as_such(two_nodes, tmp_path, tiny):
    with sweeping(two_nodes, tmp_path, HELD, *typed(tiny)) as running:
        two_nodes.cancel(slurm_job(running, 0))
        assert running.finish(timeout=40) == 1
    assert running.err.count("it ended without a result; Slurm says CANCELLED") == 1


# name -> (the command line, what is said). None of them needs Slurm.
REFUSED = {
    "one run": (["hydra/launcher=slurm", "prompt=x"], "add --multirun"),
    "two tasks a node": ([*SWEEP, "hydra.launcher.tasks_per_node=2", "prompt=x"], "hydra.launcher.tasks_per_node=2: "),
    "a mistyped key": ([*SWEEP, "hydra.launcher.nodez=2", "prompt=x"], "hydra.launcher.nodez"),
    "a mistyped key, added": ([*SWEEP, "+hydra.launcher.nodez=2", "prompt=x"], "did you mean nodes"),
    "no sbatch": ([*SWEEP, "prompt=x"], "no sbatch"),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("refused")
    nowhere = {name: {"PATH": str(BIN)} if name == "no sbatch" else {} for name in REFUSED}
    calls = [lambda n=name: wan_dist(*REFUSED[n][0], cwd=cwd, **nowhere[n]) for name in REFUSED]
    done = dict(zip(REFUSED, together(*calls), strict=True))
    assert list(cwd.iterdir()) == []
    return done


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(refusals, name):
    assert refusals[name].returncode == 2 and REFUSED[name][1] in refusals[name].stderr
    assert "Traceback" not in refusals[name].stderr
