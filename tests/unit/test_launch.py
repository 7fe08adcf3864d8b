"""What the agent says of a failure: the rank that the others followed, where it ran and where to read on."""

import json
import pickle
import signal
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from wan_dist.agent.failures import (
    RankFailure,
    account_path,
    collect,
    describe,
    describe_stop,
    root_cause,
    stopped_by_request,
)
from wan_dist.agent.launch import RunFailedError, StoppedRunError, _tell, environment, exit_codes
from wan_dist.agent.prepare import run_id
from wan_dist.log import rank_log_path
from wan_dist.topology import SlurmStep, rank_env, slurm_step

RUN = Path("/runs/.run/video")


def account(rank: int, time: float, **more) -> dict:
    text = "Traceback (most recent call last):\n  ...\nValueError: wrong\n"
    log = str(rank_log_path(RUN, rank))
    base = {"time": time, "rank": rank, "host": "node1", "phase": "load", "message": "ValueError: wrong"}
    return {**base, "traceback": text, "expected": False, "log": log, **more}


TOLD_LATE = RankFailure(0, 1, account(0, 20.0), "node1")
TOLD_EARLY = RankFailure(2, 1, account(2, 10.0), "node1")
TERMINATED = RankFailure(1, -15, None)
ENDED = RankFailure(1, 143, None)  # as the agent ends ranks that listen
CONSEQUENCE = RankFailure(0, 1, account(0, 1.0, consequence=True), "node1")
STOPPED = RankFailure(0, 75, {"time": 5.0, "stopped": True, "signal": "SIGTERM", "saved": 7, "steps": 20}, "node1")
STOPPED_LOADING = RankFailure(1, 75, {"time": 5.0, "stopped": True, "signal": "SIGUSR1", "saved": None, "steps": 0})
KILLED = RankFailure(3, -9, None)
SILENT = RankFailure(4, 1, None)


@pytest.mark.parametrize(
    ("failures", "cause"),
    [
        ([TOLD_LATE, TOLD_EARLY], TOLD_EARLY),
        ([TOLD_LATE, TERMINATED, KILLED], KILLED),
        ([TERMINATED, TOLD_LATE], TOLD_LATE),
        ([SILENT, TOLD_LATE], TOLD_LATE),
        ([ENDED, SILENT], SILENT),
        ([ENDED, CONSEQUENCE], CONSEQUENCE),
        ([TERMINATED, SILENT], SILENT),
        ([RankFailure(0, -6, None), TOLD_LATE], TOLD_LATE),
        ([CONSEQUENCE, TOLD_LATE], TOLD_LATE),
        ([CONSEQUENCE, RankFailure(1, -6, None)], RankFailure(1, -6, None)),
        ([STOPPED, TOLD_LATE], TOLD_LATE),  # the agent ends the other ranks with the signal that asks for a stop
        ([STOPPED, SILENT], SILENT),
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
    told = account(0, 1.0, expected=True, message="CheckpointError: a.safetensors: truncated")
    failure = RankFailure(0, 1, told, "node1")
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
    there = replace(failure, host="node2")
    assert describe(there, RUN).startswith(f"rank {failure.rank} on node2 ended without an account: ")


def test_the_error_can_be_pickled_and_the_account_is_json():
    assert str(pickle.loads(pickle.dumps(RunFailedError("rank 3 failed")))) == "rank 3 failed"
    assert json.loads(json.dumps(TOLD_EARLY.account)) == TOLD_EARLY.account


def test_another_nodes_failure_is_told_without_its_traceback():
    text = describe(TOLD_EARLY, RUN, elsewhere=True)
    assert text == f"rank 2 on node1 failed in phase load: ValueError: wrong\nits log: {RUN / 'rank2.log'}"


def test_the_step_is_told_where_there_is_one():
    failure = RankFailure(2, 1, account(2, 1.0, phase="denoise", step="step 8 of 20"), "node1")
    assert describe(failure, RUN).startswith("rank 2 on node1 failed in phase denoise, step 8 of 20\n")


def test_the_last_lines_of_the_log_are_shown_up_to_the_account_itself(tmp_path):
    lines = [f"line {number}" for number in range(9)]
    own = ["2026-01-01 rank 3 ERROR wan_dist: failed in phase load", "Traceback (most recent call last):"]
    rank_log_path(tmp_path, 3).write_text("\n".join([*lines, *own]))
    shown = describe(KILLED, tmp_path).splitlines()
    assert [line.strip() for line in shown[1:-1]] == ["the last lines of its log:", *lines[-5:]]


@pytest.mark.parametrize(
    ("failures", "request_", "stopped"),
    [
        ([STOPPED, STOPPED_LOADING], None, True),
        ([STOPPED, CONSEQUENCE, TERMINATED, ENDED], None, True),
        ([TERMINATED], signal.SIGTERM, True),  # it did not listen yet
        ([RankFailure(0, -signal.SIGUSR1, None)], signal.SIGUSR1, True),
        ([CONSEQUENCE], signal.SIGTERM, True),  # of the stop of another node, whose folder is not shared
        ([CONSEQUENCE], None, False),
        ([TERMINATED], None, False),
        ([STOPPED, TOLD_LATE], signal.SIGTERM, False),
        ([STOPPED, KILLED], signal.SIGTERM, False),
        ([STOPPED, SILENT], signal.SIGTERM, False),
    ],
)
def test_what_is_a_clean_stop(failures, request_, stopped):
    assert stopped_by_request(failures, request_) is stopped


@pytest.mark.parametrize(
    ("failures", "words"),
    [
        ([STOPPED_LOADING, STOPPED], "stopped by SIGTERM after step 7 of 20; its state is saved"),
        ([STOPPED_LOADING], "stopped by SIGTERM before the first step; nothing was to be saved"),
        ([TERMINATED], "stopped by SIGTERM before the first step; nothing was to be saved"),
    ],
)
def test_a_stop_says_what_was_done(failures, words):
    assert describe_stop(failures, signal.SIGTERM, RUN).startswith(words)


def test_the_stop_of_a_run_that_is_complete_but_for_decoding():
    done = RankFailure(0, 75, {**STOPPED.account, "saved": 20})
    text = describe_stop([done], None, RUN)
    assert "stopped by SIGTERM after the last step; " in text
    assert text.endswith("with: output.resume=auto output.dir=/runs")
    assert str(pickle.loads(pickle.dumps(StoppedRunError("stopped")))) == "stopped"


def test_which_rank_the_agent_had_to_kill():
    def failure(exitcode: int, timestamp: int) -> SimpleNamespace:
        return SimpleNamespace(exitcode=exitcode, timestamp=timestamp)

    assert exit_codes({0: failure(1, 100), 1: failure(-9, 130)}) == {0: 1, 1: 143}
    assert exit_codes({0: failure(1, 100), 1: failure(-9, 101)}) == {0: 1, 1: -9}
    assert exit_codes({0: failure(1, 130), 1: failure(-9, 100)}) == {0: 1, 1: -9}


def test_what_a_rank_could_not_tell_its_agent_does_for_the_other_nodes(tmp_path):
    (tmp_path / "failure.rank2.json").write_text(json.dumps(account(2, 10.0)))
    (here,) = collect(tmp_path, {3: -9})[:1]
    assert (here.rank, here.exit_code, here.account) == (3, -9, None)
    there = {failure.rank: failure for failure in collect(tmp_path, {2: 1})}
    assert (there[3].exit_code, there[3].account, there[3].host) == (-9, None, here.host)
    assert root_cause(list(there.values())).rank == 3


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
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "WAN_DIST_RUN_ID"):
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
    no_slurm.setenv("WAN_DIST_RUN_ID", "12_1")
    assert run_id("none") == "12_1"
    assert run_id("my-run") == "my-run"


@pytest.mark.parametrize(
    ("env", "step"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7"}, None),
        ({"SLURM_STEP_ID": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "4294967291"}, None),  # the batch shell, where Slurm names it
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"}, SlurmStep(7, 1, 1, 1, 0, "")),
        (
            {
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_ID": "1",
                "SLURM_STEP_NUM_NODES": "2",
                "SLURM_STEP_NUM_TASKS": "4",
                "SLURM_NODEID": "1",
                "SLURM_STEP_NODELIST": "node[1-2]",
            },
            SlurmStep(7, 1, 2, 4, 1, "node[1-2]"),
        ),
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


CRASHED = {0: -signal.SIGSEGV}


@pytest.mark.parametrize(
    ("told", "words"), [({}, "no progress"), ({"message": "ValueError: its own"}, "ValueError: its own")]
)
def test_a_rank_that_crashes_as_it_writes_its_stacks_does_not_hide_the_stall(tmp_path, told, words):
    """But what a rank tells of itself is better than that."""
    if told:
        account_path(tmp_path, 0).write_text(json.dumps(account(0, 1.0, expected=True, **told)))
    stall = SimpleNamespace(message=lambda run_dir: f"no progress in {run_dir}")
    supervision = SimpleNamespace(asked=None, stall=None, ended=False, lost=None, suspected=stall)
    with pytest.raises(RunFailedError, match=words):
        _tell(tmp_path, CRASHED, supervision, SimpleNamespace(line=None))
    supervision.suspected = None
    with pytest.raises(RunFailedError, match=words if told else "killed by SIGSEGV"):
        _tell(tmp_path, CRASHED, supervision, SimpleNamespace(line=None))
