"""Which node of a run this is: by `launch.*`, by Slurm's variables; what nodes agree on before ranks start."""

import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from support.tiers import ALL
from wan_dist.agent import line, nodes
from wan_dist.agent.nodes import Arrival, Meeting, Node, find_node, interface_towards, slurm_address, typed_node
from wan_dist.config.schema import LaunchConfig, ParallelismConfig
from wan_dist.planning.degrees import choose_degrees
from wan_dist.planning.refusal import RefusedError
from wan_dist.planning.refusals import node_refusals
from wan_dist.planning.traffic import crossing_warning
from wan_dist.topology import SlurmStep

STEP = SlurmStep(job=70, step=1, nodes=2, tasks=2, node_rank=1, hosts="node[3-4]")


def find(step=None, **launch):
    return find_node(LaunchConfig(**launch), step, lambda hosts: f"address of {hosts}")


def refused(step=None, **launch) -> dict[str, str]:
    with pytest.raises(RefusedError) as error:
        find(step, **launch)
    return {refusal.key: f"{refusal.value}: {refusal.why}; {refusal.remedy}" for refusal in error.value.refusals}


def test_one_node_serves_itself_on_any_port():
    assert find() == Node(0, 1, "127.0.0.1", 0)
    assert find(port=4321).port == 4321
    assert find(node_rank=0).count == 1


def test_launch_keys_name_the_node():
    assert find(nodes=3, node_rank=2, head="h") == Node(2, 3, "h", 29500)
    assert find(nodes=3, node_rank=0, head="h", port=4321) == Node(0, 3, "h", 4321)


def test_slurm_names_the_node_and_the_job_the_port():
    node = find(STEP)
    assert (node.rank, node.count, node.head) == (1, 2, "address of node[3-4]")
    assert 20000 <= node.port < 32000
    assert find(replace(STEP, job=71)).port != node.port != find(replace(STEP, step=2)).port
    assert find(STEP, port=4321, head="h") == Node(1, 2, "h", 4321)
    assert find(replace(STEP, nodes=1, tasks=1, node_rank=0)) == Node(0, 1, "127.0.0.1", 0)


def test_a_node_must_say_which_it_is_and_where_node_0_is():
    found = refused(nodes=2)
    assert set(found) == {"launch.node_rank", "launch.head"}
    assert "0 to 1" in found["launch.node_rank"]
    assert "0 to 1" in refused(nodes=2, node_rank=2, head="h")["launch.node_rank"]
    assert "launch.nodes" in refused(head="h")["launch.head"]


def test_slurm_is_not_contradicted():
    assert "4 tasks on 2" in refused(replace(STEP, tasks=4))["launch"]
    assert "2 node" in refused(STEP, nodes=3)["launch.nodes"]
    assert "node 1" in refused(STEP, node_rank=0)["launch.node_rank"]
    assert find(STEP, nodes=2, node_rank=1).rank == 1


@pytest.mark.parametrize(
    ("words", "node"),
    [
        ("launch.nodes=2 launch.node_rank=1 launch.head=h-1.x", Node(1, 2, "h-1.x", 29500)),
        ("launch.nodes=2 launch.node_rank=0 launch.head=::1 launch.port=7", Node(0, 2, "::1", 7)),
        ("launch.nodes=2 launch.head=h", None),
        ("launch.nodes=1 launch.node_rank=0", None),
        ("launch.nodes=2 launch.node_rank=2 launch.head=h", None),
        ("launch.nodes=two launch.node_rank=0 launch.head=h", None),
        ("launch.nodes=${x} launch.node_rank=0 launch.head=h", None),
        ("prompt=launch.nodes=2", None),
    ],
)
def test_a_command_line_names_its_node_before_it_is_composed(words, node):
    assert typed_node(words.split()) == node


def test_an_early_arrival_is_the_nodes_only_where_it_is_that_node():
    arrival = Arrival(Node(0, 2, "127.0.0.1", 0))
    assert arrival.reception_for(Node(0, 2, "127.0.0.1", 0)) is arrival.reception_for(Node(0, 2, "127.0.0.1", 0))
    assert arrival.reception_for(Node(0, 3, "127.0.0.1", 0)) is not arrival.reception_for(Node(0, 2, "127.0.0.1", 0))


def test_ranks_divide_over_nodes():
    assert node_refusals(8, 2) == node_refusals(3, 1) == []
    (refusal,) = node_refusals(3, 2)
    assert "3 = 2 x 1 + 1" in refusal.why and "2 or 4" in refusal.remedy
    assert "2 or 4" not in node_refusals(1, 4)[0].remedy and "4" in node_refusals(1, 4)[0].remedy


@pytest.mark.parametrize(
    ("ranks", "per_node", "heads", "mesh"),
    [
        (16, 8, 40, (2, 1, 8, 1)),  # cfg crosses
        (32, 8, 40, (2, 2, 8, 1)),  # and the ring
        (12, 4, 12, (2, 3, 2, 1)),  # 6 of 4 would not fit
        (4, 2, 12, (2, 1, 2, 1)),
        (6, 3, 12, (2, 1, 3, 1)),
        (4, 1, 12, (2, 2, 1, 1)),
        (16, 16, 40, (2, 1, 8, 1)),
    ],
)
def test_the_mesh_that_is_chosen_keeps_ulysses_inside_a_node(ranks, per_node, heads, mesh):
    degrees, found = choose_degrees(
        ParallelismConfig(), ranks, guided=True, source="", heads=heads, ranks_per_node=per_node
    )
    assert found == [] and tuple(degrees[axis] for axis in ("cfg", "ring", "ulysses", "tp")) == mesh
    assert crossing_warning(degrees, per_node) is None


def test_the_planner_says_when_ulysses_or_tp_cross_nodes():
    words = crossing_warning({"ulysses": 4, "tp": 2, "ring": 1, "cfg": 1}, 4)
    assert "ulysses 4 x tp 2" in words and "8 neighbouring ranks" in words and "the 4 of a node" in words
    assert crossing_warning({"ulysses": 3, "tp": 1, "ring": 1, "cfg": 2}, 4) is not None
    assert crossing_warning({"ulysses": 1, "tp": 1, "ring": 8, "cfg": 2}, 4) is None


def test_an_address_without_slurm_is_the_name(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm_address("node7") == "node7"


def test_the_interface_of_an_address():
    loopback = interface_towards("127.0.0.1", 1)
    assert loopback is not None and (Path("/sys/class/net") / loopback).exists()
    assert interface_towards("no.such.host.invalid", 1) is None


def test_nodes_take_over_the_first_ones_word_and_hear_all_answers():
    first = Meeting(Node(0, 2, "127.0.0.1", 0))
    heard = {}

    def second():
        other = Meeting(Node(1, 2, "127.0.0.1", first.port))
        heard["words"] = [other.first_says("mine") for _ in range(2)]
        other.answer({"mesh": 2})
        heard["answers"] = other.answers()

    thread = threading.Thread(target=second)
    thread.start()
    assert [first.first_says(word) for word in ("one", "two")] == ["one", "two"]
    first.answer({"mesh": 1})
    answers = first.answers()
    thread.join(10)
    assert answers == heard["answers"] == [{"mesh": 1}, {"mesh": 2}]
    assert heard["words"] == ["one", "two"]


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(RefusedError, match=r"launch\.port"):
        Meeting(Node(0, 1, "127.0.0.1", server.getsockname()[1]))


def test_a_number_that_another_node_has_is_refused():
    first = Meeting(Node(0, 3, "127.0.0.1", 0))
    first.store.set("wan_dist/node/1", "host9, process 7")
    with pytest.raises(RefusedError, match=r"launch\.node_rank=1: another wan-dist .*host9, process 7"):
        Meeting(Node(1, 3, "127.0.0.1", first.port))


def test_something_else_that_answers_at_the_head_is_refused(monkeypatch):
    monkeypatch.setattr(nodes, "_ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(RefusedError, match="something else answers"):
        Meeting(Node(1, 2, "127.0.0.1", server.getsockname()[1]))


class TestTheLine:
    @pytest.fixture
    def lines(self, monkeypatch):
        """Those of two nodes, with a clock of their own: a beat every 20 ms."""
        from torch import distributed as dist

        monkeypatch.setattr(line, "BEAT_S", 0.02)
        monkeypatch.setattr(line, "SILENT_S", 0.4)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        both = [line.Line(store, rank, 2) for rank in range(2)]
        for one in both:
            one.begin(1)
        wait(lambda: all(one.joined == {0, 1} for one in both))
        return both

    def test_a_request_to_stop_is_heard(self, lines):
        lines[1].asked = "SIGTERM"
        wait(lambda: lines[0].heard == "SIGTERM")
        assert lines[0].lost is None

    def test_what_was_asked_of_an_earlier_job_is_past(self, lines):
        lines[1].asked = "SIGTERM"
        wait(lambda: lines[0].heard is not None)
        for one in lines:
            one.begin(2)
        time.sleep(0.1)
        assert lines[0].heard is None

    def test_a_failure_is_heard_and_is_the_jobs(self, lines):
        lines[0].fail()
        wait(lambda: lines[1].lost is not None)
        assert lines[1].lost == "node 0 has failed; its own output says why"
        for one in lines:
            one.begin(2)
        time.sleep(0.1)
        assert lines[1].lost is None

    def test_a_silent_node_is_gone(self, lines, monkeypatch):
        monkeypatch.setattr(lines[1], "_hear", lambda *_: time.sleep(3600))  # its thread beats no more
        wait(lambda: lines[0].lost is not None)
        assert lines[0].wait_for_loss().startswith("node 1 is gone")

    def test_one_node_has_nobody_to_lose(self):
        alone = line.Line(None, 0, 1)
        alone.begin(1)
        alone.fail()
        assert alone.wait_for_loss() is None and alone.lost is None


def wait(condition, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_head_that_no_one_knows_is_refused():
    with pytest.raises(RefusedError, match=r"launch\.head"):
        Meeting(Node(1, 2, "no.such.host.invalid", 29500))


LEAVES = """
import sys, time
from wan_dist.agent import line
line.BEAT_S = 0.0  # so that its thread is inside the store's calls most of the time
from wan_dist.agent.nodes import Meeting, Node
from wan_dist.cli.main import leave
meeting = Meeting(Node(0, 2, "127.0.0.1", 0))
time.sleep(0.3)
{}(3)
"""


PAIRS = 2 if ALL else 1


def test_an_agent_leaves_while_its_thread_is_in_the_store():
    """Where the interpreter unwinds that thread, about every third such process aborts."""
    ends = [subprocess.Popen([sys.executable, "-c", LEAVES.format(way)]) for way in ("sys.exit", "leave") * PAIRS]
    assert [end.wait(60) for end in ends] == [3] * 2 * PAIRS
