"""Two agents on this machine as two nodes of one run: the result of one node, and every node told when a run ends."""

import json
import re
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from e2e.processes import Running, files_in, processes_about, together
from support.commands import torchrun, wan_dist
from support.tiers import ALL, in_all

LATENTS = "video.latents.safetensors"
LONG_STEPS = 20000  # minutes, in which something can happen
TWO = ["parallelism.cfg=2", "output.formats=[latents]"]


@dataclass
class Ended:
    """How both nodes ended, and what they left."""

    codes: list[int]
    said: list[str]
    seconds: float
    files: set[str]
    processes: list[str]
    run_folder: Path


Nodes = list[Running]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_nodes(
    typed: list[str],
    folder: Path,
    act: Callable[[Nodes], None] = lambda nodes: None,
    second: Sequence[str] = (),
    fresh: bool = False,
) -> Ended:
    """A run of two nodes, to which `act` is done while it is under way. second: what node 1 alone is told."""
    where = ["launch.nodes=2", "launch.head=127.0.0.1", f"launch.port={free_port()}", f"output.dir={folder}"]
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(
                Running(
                    ["wan-dist", *typed, *where, f"launch.node_rank={node}", *(second if node else ())],
                    folder,
                    fresh=fresh,
                )
            )
            for node in range(2)
        ]
        act(nodes)
        begin = time.monotonic()
        codes = [node.finish() for node in nodes]
        seconds = time.monotonic() - begin
    left = processes_about(str(folder))
    return Ended(codes, [node.err for node in nodes], seconds, files_in(folder), left, folder / ".run" / "video")


def in_mid_run(send: Callable[[Nodes], None]) -> Callable[[Nodes], None]:
    def act(nodes: Nodes) -> None:
        nodes[0].wait_for(rf"^step \d+/{LONG_STEPS}")
        send(nodes)

    return act


ACTIONS = {
    "agent 1 killed": lambda nodes: nodes[1].process.kill(),
    "rank 1 killed": lambda nodes: nodes[1].rank(1).send_signal(signal.SIGKILL),
    "node 0 asked": lambda nodes: nodes[0].process.send_signal(signal.SIGTERM),
}


@pytest.fixture(scope="module")
def request_of(tiny):
    return ["model=tiny", f"model.path={tiny}", "prompt=x"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: tmp_path_factory.mktemp("nodes") for name in ("one node", "two nodes", *ACTIONS)}


@pytest.fixture(scope="module")
def ran(folders, request_of):
    """Everything that takes ranks: name -> end; `one node` is a command that is done."""
    long = [*request_of, *TWO, f"sampler.steps={LONG_STEPS}"]

    def one_node():
        return wan_dist(*request_of, *TWO, f"output.dir={folders['one node']}", cwd=folders["one node"])

    calls = [one_node, lambda: two_nodes([*request_of, *TWO], folders["two nodes"], fresh=ALL)]
    calls += [lambda n=n, act=act: two_nodes(long, folders[n], in_mid_run(act)) for n, act in ACTIONS.items()]
    return dict(zip(folders, together(*calls), strict=True))


def test_two_nodes_give_the_latents_of_one(ran, folders):
    assert ran["one node"].returncode == 0, ran["one node"].stderr
    end = ran["two nodes"]
    assert end.codes == [0, 0], end.said
    assert end.processes == [] and end.files == {LATENTS, "video.json"}
    ours, theirs = (load_file(folders[name] / LATENTS)["latents"] for name in ("two nodes", "one node"))
    assert torch.equal(ours, theirs)


def test_two_nodes_are_one_run(ran, folders):
    end = ran["two nodes"]
    assert [path.name for path in (folders["two nodes"] / ".run").iterdir()] == ["video"]
    names = {path.name for path in end.run_folder.iterdir()}
    assert {"config.yaml", "config.node1.yaml", "rank0.log", "rank1.log"} <= names
    record = json.loads((folders["two nodes"] / "video.json").read_text())
    assert [rank["rank"] for rank in record["ranks"]] == [0, 1]
    assert record["mesh"]["cfg"] == 2 and record["config"]["launch"]["nodes"] == 2
    assert "step 4/4" in end.said[0] and end.said[1] == ""  # the run is shown once


def test_a_node_that_is_lost_ends_the_other(ran):
    end = ran["agent 1 killed"]
    assert end.codes[1] == -signal.SIGKILL and end.codes[0] == 1
    assert end.seconds < 15 and end.processes == [] and end.files == set()
    assert end.said[0].count("wan-dist: ") == 1 and "node 1 is gone" in end.said[0]


def test_a_killed_rank_is_named_on_both_nodes(ran):
    end = ran["rank 1 killed"]
    assert end.codes == [1, 1] and end.seconds < 15 and end.processes == [] and end.files == set()
    who = f"rank 1 on {socket.gethostname()} ended without an account: killed by SIGKILL"
    for said in end.said:
        assert said.count("wan-dist: ") == 1 and said.count(who) == 1 and "Traceback" not in said, said
        assert f"its log: {end.run_folder}/rank1.log" in said


def test_a_killed_rank_shows_its_last_words(ran):
    last = (ran["rank 1 killed"].run_folder / "rank1.log").read_text().splitlines()[-1]
    assert "the last lines of its log:" in ran["rank 1 killed"].said[1] and last in ran["rank 1 killed"].said[1]


def test_what_one_node_is_asked_all_do(ran):
    end = ran["node 0 asked"]
    assert end.codes == [75, 75], end.said
    assert end.seconds < 15 and end.processes == [] and end.files == set()
    assert (end.run_folder / "state.safetensors").exists()
    steps = set()
    for said in end.said:
        assert said.count("wan-dist: ") == 1 and "Traceback" not in said
        steps |= set(re.findall(rf"after step (\d+) of {LONG_STEPS}; its state is saved", said))
    assert len(steps) == 1


def test_nodes_that_are_told_different_things_are_refused(request_of, tmp_path):
    end = two_nodes([*request_of, *TWO], tmp_path, second=["sampler.seed=5", "prompt=y"])
    assert end.codes == [2, 2]
    assert "sampler.seed=0: node 1 has 5; give the same on every node" in end.said[0]
    assert "prompt=y: node 0 has x; give the same on every node" in end.said[1]
    assert end.files == set()


def test_what_cannot_run_runs_on_no_node(request_of, tmp_path):
    end = two_nodes([*request_of, *TWO, "video.height=7"], tmp_path)
    assert end.codes == [2, 2]
    assert "video.height=7: not a multiple of 16" in end.said[0]
    assert end.said[1] == "wan-dist: node 0 cannot run this; its own output says why\n"
    assert end.files == set() and not end.run_folder.exists()


@pytest.mark.parametrize(("killed", "words"), [(1, "node 1 has left before"), *in_all((0, "node 0 left before"))])
def test_a_node_that_dies_while_it_starts_is_missed(request_of, tmp_path, killed, words):
    """As soon as it has connected, which is before it imports torch and long before it has a rank."""

    def act(nodes: Nodes) -> None:
        agent, give_up = psutil.Process(nodes[1].process.pid), time.monotonic() + 30
        while not any(link.status == psutil.CONN_ESTABLISHED for link in agent.net_connections("tcp")):
            assert time.monotonic() < give_up and nodes[1].process.poll() is None
        time.sleep(0.3)  # for it to be greeted
        nodes[killed].process.kill()

    end = two_nodes([*request_of, *TWO], tmp_path, act, fresh=True)
    assert end.codes[killed] == -signal.SIGKILL and end.codes[1 - killed] == 1
    assert end.seconds < 15 and end.processes == [] and end.files == set()
    assert end.said[1 - killed].count("wan-dist: ") == 1 and words in end.said[1 - killed]


def test_a_run_of_two_nodes_must_be_told_where_they_meet(request_of, tmp_path):
    done = wan_dist(*request_of, "launch.nodes=2", cwd=tmp_path)
    assert done.returncode == 2 and "(2 reasons)" in done.stderr
    assert "launch.node_rank=null" in done.stderr and "launch.head=null" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_torchrun_knows_its_nodes_itself(request_of, tmp_path):
    done = torchrun(1, *request_of, "launch.nodes=2", "launch.node_rank=0", "launch.head=127.0.0.1", cwd=tmp_path)
    assert done.returncode != 0
    for key in ("launch.nodes=2", "launch.node_rank=0", "launch.head=127.0.0.1"):
        assert done.stderr.count(f"  {key}: ") == 1
    assert list(tmp_path.iterdir()) == []
