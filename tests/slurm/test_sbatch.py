"""`sbatch slurm/generate.sbatch`: the workstation's result from one node and two, exit codes, arrays, and what happens
when a job is stopped, requeued, killed, or loses a node."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from e2e.processes import processes_about, together
from safetensors.torch import load_file

from support.commands import REPO, wan_dist

SBATCH = REPO / "slurm" / "generate.sbatch"
MESH = ("parallelism.cfg=2", "parallelism.ulysses=2")
LONG = 300  # steps: some seconds of denoising, to be interrupted
LONG_RUN = ("parallelism.ulysses=2", f"sampler.steps={LONG}")


def typed(checkpoint: Path, *overrides: str) -> list[str]:
    return ["model=tiny", f"model.path={checkpoint}", "prompt=a cat", "output.formats=[latents]", *overrides]


def latents(folder: Path) -> torch.Tensor:
    return load_file(folder / "video.latents.safetensors")["latents"]


def record(folder: Path) -> dict:
    return json.loads((folder / "video.json").read_text("utf-8"))


def processes_of(folder: Path, name: str) -> list[psutil.Process]:
    """Processes of a job whose command line names `folder`: its `slurm_script`, its `wan-dist`, its `worker`s."""
    lines = {
        "slurm_script": lambda words: any(word.endswith("/slurm_script") for word in words),
        "wan-dist": lambda words: "python" in words[0] and any(word.endswith("/wan-dist") for word in words),
        "worker": lambda words: "wan_dist.worker" in words,
    }
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or [""]
        if str(folder) in " ".join(words) and lines[name](words):
            found.append(process)
    return found


class TestTheFile:
    def test_it_is_bash(self):
        assert subprocess.run(["bash", "-n", str(SBATCH)], capture_output=True).stderr == b""

    def test_resources_are_the_users_to_ask_for(self):
        asked = [line.split()[1] for line in SBATCH.read_text().splitlines() if line.startswith("#SBATCH")]
        assert {option.partition("=")[0] for option in asked} == {
            *("--job-name", "--output", "--open-mode", "--ntasks-per-node", "--requeue", "--signal"),
        }

    def test_there_is_one_srun_with_a_task_on_each_node(self):
        text = SBATCH.read_text().replace("\\\n", " ")
        (line,) = (line for line in text.splitlines() if line.startswith("srun "))
        for option in ("--kill-on-bad-exit=1", '--nodes="$SLURM_JOB_NUM_NODES"', "--ntasks-per-node=1", '"$@"'):
            assert option in line


def documented() -> list[list[str]]:
    text = (SBATCH.parent / "README.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("sbatch ")]


@pytest.mark.parametrize("words", documented(), ids=lambda words: " ".join(words[1:3]))
def test_slurm_accepts_the_documented_commands(two_nodes, words):
    two_nodes.command("sbatch", "--test-only", *words[1:], cwd=REPO)


# In place of `wan-dist` on a job's PATH: it says how it was called and, when all nodes are there, ends as its overrides
# say: `node2=1` with that code on that node, `seconds=9` after so long, with 75 soon after a signal. A requeued job
# ends at once, with 0. `slow=node1` does not get away before srun has noticed that the other has.
STAND_IN = """\
import glob, json, os, signal, sys, time
asked = []
for name in ("SIGUSR1", "SIGTERM"):
    signal.signal(getattr(signal, name), lambda *_: asked.append(1))
node, told = os.environ["SLURMD_NODENAME"], dict(text.split("=", 1) for text in sys.argv[1:])
called = [node, os.getcwd(), os.environ["WAN_DIST_RUN_ID"], os.environ.get("SLURM_CPUS_PER_TASK"), sys.argv[1:]]
print("called " + json.dumps(called), flush=True)
open(f"{os.environ['WAN_DIST_RUN_ID']}.{node}", "w").close()
while len(glob.glob(f"{os.environ['WAN_DIST_RUN_ID']}.node*")) < int(os.environ["SLURM_JOB_NUM_NODES"]):
    time.sleep(0.05)
if node in told:
    sys.exit(int(told[node]))
end = time.monotonic() + (0 if "SLURM_RESTART_COUNT" in os.environ else float(told.get("seconds", 0)))
while time.monotonic() < end and not asked:
    time.sleep(0.05)
if asked and told.get("slow") == node:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(30)
for name in ("SIGUSR1", "SIGTERM"):  # like wan-dist, which is not to be killed on its way out
    signal.signal(getattr(signal, name), signal.SIG_IGN)
time.sleep(1 if "slow" in told else 0)
sys.exit(75 if asked else 0)
"""


@pytest.fixture(scope="module")
def stand_in(two_nodes, tmp_path_factory):
    """`stand_in(*words)`: submit the file with a command in wan-dist's place."""
    folder = tmp_path_factory.mktemp("stand in")  # a space: the submit directory's name may have one
    (folder / "bin").mkdir()
    (folder / "bin" / "wan-dist").write_text(f"#!/usr/bin/env python3\n{STAND_IN}")
    (folder / "bin" / "wan-dist").chmod(0o755)
    path = f"{folder / 'bin'}:{two_nodes.environment()['PATH']}"

    def submit(*words: str) -> str:
        options = [word for word in words if word.startswith("--")]
        return two_nodes.submit([*options, str(SBATCH), *words[len(options) :]], folder, PATH=path)

    submit.folder = folder
    return submit


def calls(output: str) -> list[list]:
    return sorted(json.loads(line.removeprefix("called ")) for line in output.splitlines() if "called [" in line)


class TestWhatTheFileDoes:
    def test_overrides_arrive_as_typed_after_ours(self, two_nodes, stand_in):
        odd = 'prompt=a "cat", it\'s $HOME ${x} \\ *\n海'
        job = stand_in("--nodes=2", "--cpus-per-task=3", odd, "output.resume=off")
        assert two_nodes.wait(job)["ExitCode"] == "0:0"
        ours = ["output.resume=auto", "output.checkpoint_every=5"]
        expected = [str(stand_in.folder), job, "3", [*ours, odd, "output.resume=off"]]
        assert calls(two_nodes.output(job)) == [["node1", *expected], ["node2", *expected]]

    def test_the_code_is_that_of_the_node_that_matters(self, two_nodes, stand_in):
        """Also where another node was stopped for it, which is no clean stop, or died of it."""
        codes = {"node2=2": 2, "node1=1": 1, "node2=137": 1, "node1=75": 75}
        jobs = {words: stand_in("--nodes=2", words, "seconds=20") for words in codes}
        ended = {words: two_nodes.wait(job) for words, job in jobs.items()}
        assert {words: end["ExitCode"] for words, end in ended.items()} == {w: f"{c}:0" for w, c in codes.items()}
        assert {end["Restarts"] for end in ended.values()} == {"0"}

    def test_only_the_time_limit_requeues(self, two_nodes, stand_in):
        """USR1 to the batch shell is what `--signal=B:USR1` has Slurm send before the limit."""
        warned = stand_in("--nodes=2", "seconds=60", "slow=node1")
        stopped = stand_in("--nodes=2", "seconds=60")
        for job in (warned, stopped):
            two_nodes.wait_for_output(job, "called .*node1(.|\n)*called|called .*node2(.|\n)*called")
        two_nodes.signal(warned, "USR1")
        two_nodes.signal(stopped, "TERM", batch=False)
        two_nodes.release(warned)
        assert two_nodes.wait(stopped)["ExitCode"] == "75:0"
        end = two_nodes.wait(warned)
        assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1")
        output = two_nodes.output(warned)
        assert len(calls(output)) == 4 and {call[2] for call in calls(output)} == {warned}

    def test_array_tasks_have_a_run_each(self, two_nodes, stand_in):
        job = stand_in("--array=1-2")
        runs = []
        for task in (f"{job}_1", f"{job}_2"):
            assert two_nodes.wait(task)["ExitCode"] == "0:0"
            runs += [call[2] for call in calls(two_nodes.output(task))]
        assert runs == [f"{job}_1", f"{job}_2"]


@pytest.fixture(scope="module")
def submit(two_nodes, tiny, tmp_path_factory):
    """`submit(options, *overrides)`: a job in a folder of its own; returns its id and the folder."""

    def submit_job(options: list[str], *overrides: str) -> tuple[str, Path]:
        cwd = tmp_path_factory.mktemp("job")
        return two_nodes.submit([*options, str(SBATCH), *typed(tiny, *overrides)], cwd), cwd

    return submit_job


class TestAgainstTheWorkstation:
    @pytest.fixture(scope="class")
    def jobs(self, two_nodes, submit):
        """Four submissions, all under way at once; by name, the id and the folder they were submitted in."""
        jobs = {
            "one node": submit([], "parallelism.ulysses=2", "sampler.seed=1"),
            "two nodes": submit(["--nodes=2"], *MESH, "sampler.seed=1"),
            "refused": submit(["--nodes=2"], *MESH, "video.height=7"),
            "array": submit(["--array=1-2"], "parallelism=single", "sampler.seed=${oc.env:SLURM_ARRAY_TASK_ID}"),
        }
        for name, (job, _) in jobs.items():
            for task in [f"{job}_1", f"{job}_2"] if name == "array" else [job]:
                two_nodes.wait(task, timeout=120)
        return jobs

    @pytest.fixture(scope="class")
    def workstation(self, jobs, tiny, tmp_path_factory):
        """The same degrees without Slurm, and one rank; `jobs` first, so that they do not share the cores."""
        folder = tmp_path_factory.mktemp("workstation")
        meshes = {"one rank": ["parallelism=single"], "two nodes": list(MESH)}

        def run(name: str) -> torch.Tensor:
            words = typed(tiny, *meshes[name], "sampler.seed=1", f"output.dir={folder / name}")
            done = wan_dist(*words, cwd=folder)
            assert done.returncode == 0, done.stderr
            return latents(folder / name)

        return dict(zip(meshes, together(*(lambda n=n: run(n) for n in meshes)), strict=True))

    @pytest.mark.parametrize(("name", "ranks", "hosts"), [("one node", 2, 1), ("two nodes", 4, 2)])
    def test_the_run_is_whole(self, two_nodes, jobs, name, ranks, hosts):
        job, cwd = jobs[name]
        end = two_nodes.show(job)
        assert (end["JobState"], end["ExitCode"]) == ("COMPLETED", "0:0"), two_nodes.output(job)
        assert sorted(path.name for path in cwd.iterdir()) == ["outputs", f"wan-dist-{job}.out"]
        assert [path.name for path in (cwd / "outputs").iterdir()] == [job]
        assert end["NumNodes"] == str(hosts)
        listed = record(cwd / "outputs" / job)["ranks"]
        assert [rank["rank"] for rank in listed] == list(range(ranks))
        assert all(rank["host"] for rank in listed)
        assert str(cwd / "outputs" / job) in two_nodes.output(job)

    def test_the_latents_are_the_workstations(self, jobs, workstation):
        found = {
            name: latents(cwd / "outputs" / job) for name, (job, cwd) in jobs.items() if name.endswith(("node", "s"))
        }
        assert torch.equal(found["two nodes"], workstation["two nodes"])
        for name in ("one node", "two nodes"):
            assert (found[name] - workstation["one rank"]).abs().max() <= 1e-5

    def test_a_config_that_cannot_run_ends_the_job_with_2(self, two_nodes, jobs):
        job, cwd = jobs["refused"]
        end, output = two_nodes.show(job), two_nodes.output(job)
        assert (end["JobState"], end["ExitCode"]) == ("FAILED", "2:0"), output
        assert output.count("video.height=7") == 1, output
        assert not (cwd / "outputs").exists()

    def test_an_array_has_a_seed_a_task(self, jobs, workstation):
        job, cwd = jobs["array"]
        first, second = (cwd / "outputs" / f"{job}_{task}" for task in (1, 2))
        assert [record(folder)["request"]["seed"] for folder in (first, second)] == [1, 2]
        assert torch.equal(latents(first), workstation["one rank"])
        assert not torch.equal(latents(first), latents(second))


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """The latents of the long run, left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    words = typed(tiny, *LONG_RUN, f"output.dir={folder / 'run'}")
    done = wan_dist(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return latents(folder / "run")


def resumed_at(output: str) -> list[int]:
    lines = [line for line in output.splitlines() if line.startswith("wan-dist: resumed at step ")]
    assert all(line.endswith(f" of {LONG}") for line in lines)
    return [int(line.split()[4]) for line in lines]


class TestStoppedJobsGoOn:
    @pytest.fixture(scope="class")
    def requeued(self, two_nodes, submit):
        """Jobs on two nodes, stopped in the midst of denoising, and over; by how, the id and the folder."""

        def stop(how: str) -> tuple[str, Path]:
            job, cwd = submit(["--nodes=2"], *LONG_RUN)
            two_nodes.wait_for_output(job, rf"step \d\d+/{LONG}")
            if how == "requeued by hand":
                two_nodes.requeue(job)
            else:
                two_nodes.signal(job, "USR1")
                two_nodes.release(job)
            two_nodes.wait(job, timeout=120)
            return job, cwd

        ways = ("requeued by hand", "time limit near")
        return dict(zip(ways, together(*(lambda w=w: stop(w) for w in ways)), strict=True))

    @pytest.mark.parametrize("how", ["requeued by hand", "time limit near"])
    def test_a_requeued_job_ends_with_the_same_latents(self, two_nodes, requeued, undisturbed, how):
        job, cwd = requeued[how]
        end, output = two_nodes.show(job), two_nodes.output(job)
        assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1"), output
        (step,) = resumed_at(output)
        assert 5 <= step < LONG
        assert torch.equal(latents(cwd / "outputs" / job), undisturbed)
        assert [path.name for path in (cwd / "outputs").iterdir()] == [job]

    def test_a_node_that_is_lost(self, two_hosts, tiny, tmp_path, undisturbed):
        """Slurm notices in about 15 s, requeues the job, and starts it when there are two nodes again."""
        job = two_hosts.submit(["--nodes=2", str(SBATCH), *typed(tiny, *LONG_RUN)], tmp_path)
        two_hosts.wait_for_output(job, rf"step \d\d+/{LONG}")
        two_hosts.cut_off("node2")
        two_hosts.wait_until(job, lambda shown: shown["JobState"] != "RUNNING", timeout=60)
        two_hosts.restore("node2")
        two_hosts.release(job, timeout=120)
        end = two_hosts.wait(job, timeout=120)
        output = two_hosts.output(job)
        assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1"), output
        (step,) = resumed_at(output)
        assert 5 <= step < LONG
        folder = tmp_path / "outputs" / job
        assert torch.equal(latents(folder), undisturbed)
        assert {rank["host"] for rank in record(folder)["ranks"]} == {"node1", "node2"}


@dataclass
class Killed:
    """How a job ended of which one process was killed; `seconds` until the job was over, `left` of its processes."""

    end: dict[str, str]
    seconds: float
    left: list[str]
    output: str


@pytest.fixture(scope="module")
def killed(two_nodes, submit, tmp_path_factory):
    """Jobs that would denoise for minutes; in each, one process is killed with SIGKILL."""

    def kill(name: str) -> Killed:
        folder = tmp_path_factory.mktemp("killed")
        job, _ = submit(["--nodes=2"], "parallelism.ulysses=2", "sampler.steps=100000", f"output.dir={folder}")
        two_nodes.wait_for_output(job, r"step \d+/100000", timeout=120)
        os.kill(processes_of(folder, name)[-1].pid, signal.SIGKILL)
        begin = time.monotonic()
        end = two_nodes.wait(job, timeout=60)
        left = processes_about(str(folder), within=max(0.0, 15 - (time.monotonic() - begin)))
        return Killed(end, time.monotonic() - begin, left, two_nodes.output(job))

    names = ("slurm_script", "wan-dist", "worker")
    return dict(zip(names, together(*(lambda n=n: kill(n) for n in names)), strict=True))


@pytest.mark.parametrize("name", ["slurm_script", "wan-dist", "worker"])
def test_a_killed_process_ends_the_job_and_leaves_nothing(killed, name):
    job = killed[name]
    assert job.end["JobState"] == "FAILED" and job.seconds <= 15, job.output
    assert job.end["ExitCode"] == ("0:9" if name == "slurm_script" else "1:0")
    assert job.left == []
