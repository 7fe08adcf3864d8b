"""What the agent says of a failure: the rank that the others followed, where it ran and where to read on."""

import json
import pickle
from datetime import datetime
from pathlib import Path

import pytest

from wan_dist.agent.launch import RankFailure, RunFailedError, describe, environment, root_cause
from wan_dist.agent.prepare import run_id
from wan_dist.log import rank_log_path
from wan_dist.topology import rank_env, slurm_step

RUN = Path("/runs/.run/video")


def account(rank: int, time: float, **more) -> dict:
    text = "Traceback (most recent call last):\n  ...\nValueError: wrong\n"
    log = str(rank_log_path(RUN, rank))
    base = {"time": time, "rank": rank, "host": "node1", "phase": "load", "message": "ValueError: wrong"}
    return {**base, "traceback": text, "expected": False, "log": log, **more}


TOLD_LATE = RankFailure(0, 1, account(0, 20.0))
TOLD_EARLY = RankFailure(2, 1, account(2, 10.0))
TERMINATED = RankFailure(1, -15, None)
KILLED = RankFailure(3, -9, None)
SILENT = RankFailure(4, 1, None)


@pytest.mark.parametrize(
    ("failures", "cause"),
    [
        ([TOLD_LATE, TOLD_EARLY], TOLD_EARLY),
        ([TOLD_LATE, TERMINATED, KILLED], KILLED),
        ([TERMINATED, TOLD_LATE], TOLD_LATE),
        ([SILENT, TOLD_LATE], TOLD_LATE),
        ([TERMINATED, SILENT], SILENT),
        ([RankFailure(0, -6, None), TOLD_LATE], TOLD_LATE),
        ([RankFailure(0, 1, account(0, 5.0, consequence=True)), TOLD_LATE], TOLD_LATE),
        ([RankFailure(0, 1, account(0, 5.0, consequence=True)), RankFailure(1, -6, None)], RankFailure(1, -6, None)),
        ([SILENT], SILENT),
        ([RankFailure(0, -6, account(0, 5.0)), TOLD_EARLY], RankFailure(0, -6, account(0, 5.0))),
    ],
)
def test_root_cause(failures, cause):
    assert root_cause(failures) == cause


def test_an_unexpected_failure_shows_its_traceback_once():
    text = describe(TOLD_EARLY, RUN)
    assert text.splitlines()[0] == "rank 2 on node1 failed in phase load"
    assert text.count("Traceback") == 1
    assert text.endswith("ValueError: wrong")


def test_an_expected_failure_shows_only_its_message():
    failure = RankFailure(0, 1, account(0, 1.0, expected=True, message="CheckpointError: a.safetensors: truncated"))
    assert describe(failure, RUN) == (
        f"rank 0 on node1 failed in phase load: CheckpointError: a.safetensors: truncated\nits log: {RUN / 'rank0.log'}"
    )


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (KILLED, "rank 3 ended without an account: killed by SIGKILL (out of memory?)"),
        (RankFailure(1, -11, None), "rank 1 ended without an account: killed by SIGSEGV"),
        (SILENT, "rank 4 ended without an account: exit code 1"),
    ],
)
def test_a_rank_that_could_not_tell(failure, words):
    assert describe(failure, RUN) == f"{words}\nits log: {rank_log_path(RUN, failure.rank)}"


def test_the_error_can_be_pickled_and_the_account_is_json():
    assert str(pickle.loads(pickle.dumps(RunFailedError("rank 3 failed")))) == "rank 3 failed"
    assert json.loads(json.dumps(TOLD_EARLY.account)) == TOLD_EARLY.account


def test_environment_is_put_back(monkeypatch):
    import os

    monkeypatch.setenv("WAN_DIST_A", "old")
    monkeypatch.delenv("WAN_DIST_B", raising=False)
    with pytest.raises(KeyError), environment(WAN_DIST_A="new", WAN_DIST_B="new"):
        assert (os.environ["WAN_DIST_A"], os.environ["WAN_DIST_B"]) == ("new", "new")
        raise KeyError
    assert os.environ["WAN_DIST_A"] == "old"
    assert "WAN_DIST_B" not in os.environ


@pytest.fixture
def no_slurm(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_run_id_is_torchruns_else_slurms_else_the_time(no_slurm):
    assert run_id("my-run") == "my-run"
    for nothing in (None, "", "none"):
        assert datetime.strptime(run_id(nothing), "%Y%m%d-%H%M%S-%f")
    no_slurm.setenv("SLURM_JOB_ID", "12")
    assert run_id("none").startswith("20")
    no_slurm.setenv("SLURM_STEP_ID", "0")
    assert run_id("none") == "12.0"
    assert run_id("my-run") == "my-run"


@pytest.mark.parametrize(
    ("env", "step"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7"}, None),
        ({"SLURM_STEP_ID": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"}, "7.1"),
    ],
)
def test_slurm_step(env, step):
    assert slurm_step(env) == step


TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "r1",
}  # fmt: skip


def test_rank_env():
    env = rank_env(TORCHRUN)
    assert (env.rank, env.local_rank, env.world_size, env.local_world_size, env.node_rank) == (5, 1, 8, 4, 1)
    assert env.run_id == "r1"
    assert env.host
    assert rank_env({name: value for name, value in TORCHRUN.items() if name != "GROUP_RANK"}).node_rank == 0


@pytest.mark.parametrize("missing", ["RANK", "TORCHELASTIC_RUN_ID"])
def test_a_process_that_torchrun_did_not_start_is_no_rank(missing):
    assert rank_env({name: value for name, value in TORCHRUN.items() if name != missing}) is None
    assert rank_env({}) is None
