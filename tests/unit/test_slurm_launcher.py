"""hydra/launcher=slurm without a Slurm: what is refused, when a job is over, and what its tasks' results amount to."""

import gc
import pickle
import sys

import pytest

from wan_dist.cli import slurm_jobs
from wan_dist.cli.slurm_jobs import (
    FAILED,
    GRACE_S,
    REFUSED,
    Outcome,
    Submitted,
    await_jobs,
    job_outcome,
    parse_states,
    read_result,
    slurm_states,
    told,
)
from wan_dist.cli.slurm_launcher import SlurmLauncher, _has_plugin, launcher_refusals, same_target

DONE = Outcome(0)


def refused(*, has_plugin=True, missing=(), **options):
    return {r.key: str(r) for r in launcher_refusals(options, has_plugin=has_plugin, missing=missing)}


def test_what_cannot_be_submitted_is_refused_by_name():
    assert refused(nodes=2, partition="gpu", tasks_per_node=1) == {}
    found = refused(partitoin="gpu", tasks_per_node=2, nodes=0)
    assert set(found) == {f"hydra.launcher.{key}" for key in ("partitoin", "tasks_per_node", "nodes")}
    assert "did you mean partition?" in found["hydra.launcher.partitoin"]
    assert "wan_dist[slurm]" in refused(has_plugin=False)["hydra/launcher"]
    assert "no sbatch and no srun on PATH" in refused(missing=["sbatch", "srun"])["hydra/launcher"]


def test_the_plugin_is_missed(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert not _has_plugin()


def test_jobs_that_would_write_over_each_other():
    assert same_target([(0, None, "video"), (1, None, "video"), (2, "out", "a"), (3, "out", "b")]) == []
    (refusal,) = same_target([(0, "out", "video"), (1, "./out/", "video")])
    assert refusal.key == "output.dir" and "jobs 0 and 1" in refusal.why


def test_squeue_is_read():
    assert parse_states("12_0|RUNNING\n12_1|PENDING\n 13|CANCELLED by 0\n\n") == {
        "12_0": "RUNNING",
        "12_1": "PENDING",
        "13": "CANCELLED by 0",
    }


@pytest.mark.parametrize(
    ("script", "states"),
    [
        ("echo '12_0|RUNNING'", {"12_0": "RUNNING"}),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", {}),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", None),
    ],
)
def test_squeue_that_fails_tells_nothing_but_of_forgotten_jobs(tmp_path, monkeypatch, script, states):
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert slurm_states(["12_0", "12_1"]) == states


@pytest.mark.parametrize(
    ("tasks", "code", "text"),
    [
        ([DONE, DONE], 0, ""),
        ([Outcome(REFUSED, "no room"), DONE], REFUSED, "no room"),
        ([Outcome(REFUSED, "no room"), Outcome(FAILED, "peer lost")], FAILED, "no room"),
        ([Outcome(FAILED, ""), Outcome(FAILED, "disk full")], FAILED, "disk full"),
        ([Outcome(FAILED, "peer lost"), None], FAILED, "peer lost\ntask 1 vanished"),
        ([None, None], FAILED, "task 0 vanished"),
    ],
)
def test_the_worst_task_decides_and_one_account_is_given(tasks, code, text):
    vanished = {n: f"task {n} vanished" for n, task in enumerate(tasks) if task is None}
    assert job_outcome(tasks, vanished) == Outcome(code, text)


def test_results_of_tasks(tmp_path):
    path = tmp_path / "result.pkl"
    assert read_result(path) is None
    path.write_bytes(pickle.dumps(("success", (1, "disk full"))))
    assert read_result(path) == Outcome(1, "disk full")
    path.write_bytes(pickle.dumps(("error", "Traceback ...\nModuleNotFoundError: No module named 'wan_dist'")))
    assert read_result(path).text.endswith("ModuleNotFoundError: No module named 'wan_dist'")
    path.write_bytes(b"\x80")
    assert read_result(path).code == FAILED and str(path) in read_result(path).text


class Slurm:
    """A queue by script: `states[i]` is what the i-th look finds; the last one stays. A pause is a second."""

    def __init__(self, folder, *states, results=None):
        self.folder, self.states, self.results = folder, list(states), results or {}
        self.time = 0.0

    def jobs(self, count, tasks=1):
        return [
            Submitted(n, f"seed={n}", f"7_{n}", tuple(self.folder / f"7_{n}_{t}.pkl" for t in range(tasks)), ())
            for n in range(count)
        ]

    def look(self, _ids):
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def pause(self, seconds):
        self.time += seconds
        for name in self.results.get(self.time, ()):
            (self.folder / name).touch()

    def ends(self, jobs):
        """`{job: (second, state)}`."""
        waiting = await_jobs(jobs, self.look, pause=self.pause, clock=lambda: self.time)
        return {job.number: (self.time, state) for job, state in waiting}


def test_a_job_is_over_when_all_its_tasks_have_left_results(tmp_path):
    slurm = Slurm(tmp_path, {"7_0": "RUNNING"}, results={2: ["7_0_1.pkl"], 4: ["7_0_0.pkl"]})
    assert slurm.ends(slurm.jobs(1, tasks=2)) == {0: (4, "RUNNING")}


def test_a_job_without_a_result_is_given_up_after_a_while_and_holds_up_no_other(tmp_path):
    running, cancelled = {"7_0": "RUNNING", "7_1": "RUNNING"}, {"7_0": "RUNNING", "7_1": "CANCELLED"}
    slurm = Slurm(tmp_path, running, cancelled, results={30: ["7_0_0.pkl"]})
    assert slurm.ends(slurm.jobs(2)) == {1: (1 + GRACE_S, "CANCELLED"), 0: (30, "RUNNING")}


def test_a_late_result_counts(tmp_path):
    slurm = Slurm(tmp_path, {"7_0": "COMPLETED"}, results={GRACE_S - 1: ["7_0_0.pkl"]})
    assert slurm.ends(slurm.jobs(1)) == {0: (GRACE_S - 1, "COMPLETED")}


def test_requeued_jobs_and_an_unreachable_controller_are_waited_for(tmp_path):
    gone = [{"7_0": "NODE_FAIL"}] * 5
    back = [{"7_0": state} for state in ("REQUEUED", "PENDING", "REQUEUE_HOLD", "PENDING", "RUNNING")]
    slurm = Slurm(tmp_path, *gone, *back * 4, *[None] * 100, {}, results={200: ["7_0_0.pkl"]})
    (end,) = slurm.ends(slurm.jobs(1)).values()
    assert end == (25 + 100 + GRACE_S, "RUNNING")


def test_a_failed_job_is_told_with_its_output(tmp_path):
    logs = (tmp_path / "7_0_0_log.out", tmp_path / "7_0_0_log.err")
    logs[1].write_text("line\n" * 50 + "Killed\n")
    job = Submitted(0, "sampler.seed=1", "7_0", (tmp_path / "result",), (logs,))
    message = told(job, Outcome(FAILED, slurm_jobs._no_result(job, 0, "OUT_OF_MEMORY")))
    assert message.startswith("job 0 (sampler.seed=1), Slurm job 7_0, failed:\n  it ended without a result")
    assert "OUT_OF_MEMORY" in message and "Killed" in message and str(logs[1]) in message
    assert "no longer knows it (last PENDING)" in slurm_jobs._no_result(job, 0, "PENDING")
    assert message.count("line") < 20 and str(logs[0]) not in message


def test_garbage_is_collected_while_a_sweep_waits_for_its_jobs():
    """It was not until here."""
    gc.disable()
    try:
        with pytest.raises(AttributeError, match="config"):  # nothing has set it up, so it can launch nothing
            SlurmLauncher().launch([], 0)
        assert gc.isenabled()
    finally:
        gc.enable()
