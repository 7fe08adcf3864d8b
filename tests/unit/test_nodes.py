"""Which node of a run this is: by `launch.*`, by Slurm's variables; what nodes agree on before ranks start."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from wan_dist.agent.nodes import Meeting, Node, find_node, interface_towards, slurm_address
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
        heard["answers"] = other.answers({"mesh": 2})

    thread = threading.Thread(target=second)
    thread.start()
    assert [first.first_says(word) for word in ("one", "two")] == ["one", "two"]
    answers = first.answers({"mesh": 1})
    thread.join(10)
    assert answers == heard["answers"] == [{"mesh": 1}, {"mesh": 2}]
    assert heard["words"] == ["one", "two"]


def test_a_port_that_is_taken_is_refused():
    taken = Meeting(Node(0, 1, "127.0.0.1", 0))
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(RefusedError, match=r"launch\.port"):
        Meeting(Node(0, 1, "127.0.0.1", server.getsockname()[1]))
    assert taken.first_says("word") == "word" and taken.answers({"mesh": 1}) == [{"mesh": 1}]


def test_a_head_that_no_one_knows_is_refused():
    with pytest.raises(RefusedError, match=r"launch\.head"):
        Meeting(Node(1, 2, "no.such.host.invalid", 29500))
