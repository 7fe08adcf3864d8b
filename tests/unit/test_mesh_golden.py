"""The exact ranks of every axis of two meshes, written out by hand, over a fake process group."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from wan_dist.distributed.mesh import AXES, COMBINED_AXES, Axis, Mesh, build_mesh

# 8 ranks: tp 2 x ulysses 2 x cfg 2. rank = 4 cfg + 2 ulysses + tp
EIGHT = {"dp": 1, "cfg": 2, "ring": 1, "ulysses": 2, "tp": 2}
EIGHT_GROUPS = {
    "dp": None,
    "cfg": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "ring": None,
    "ulysses": [[0, 2], [1, 3], [4, 6], [5, 7]],
    "tp": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "sp": [[0, 2], [1, 3], [4, 6], [5, 7]],
    "fsdp": [[0, 2, 4, 6], [1, 3, 5, 7]],
    "vae": [[0, 1, 2, 3, 4, 5, 6, 7]],
}
EIGHT_SHARDS = {1: [[0, 2, 4, 6], [1, 3, 5, 7]], 2: [[0, 2], [1, 3], [4, 6], [5, 7]]}
EIGHT_REPLICAS = [[0, 4], [1, 5], [2, 6], [3, 7]]

# 16 ranks: dp 2 x cfg 2 x ring 2 x ulysses 2. rank = 8 dp + 4 cfg + 2 ring + ulysses
SIXTEEN = {"dp": 2, "cfg": 2, "ring": 2, "ulysses": 2, "tp": 1}
SIXTEEN_GROUPS = {
    "dp": [[0, 8], [1, 9], [2, 10], [3, 11], [4, 12], [5, 13], [6, 14], [7, 15]],
    "cfg": [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]],
    "ring": [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]],
    "ulysses": [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12, 13], [14, 15]],
    "tp": None,
    "sp": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
    "fsdp": [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]],
    "vae": [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]],
}
SIXTEEN_SHARDS = {
    1: [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]],
    2: [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
}
SIXTEEN_REPLICAS = [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]]

MESHES = [
    pytest.param(EIGHT, EIGHT_GROUPS, EIGHT_SHARDS, EIGHT_REPLICAS, id="tp2-ulysses2-cfg2"),
    pytest.param(SIXTEEN, SIXTEEN_GROUPS, SIXTEEN_SHARDS, SIXTEEN_REPLICAS, id="dp2-cfg2-ring2-ulysses2"),
]


@contextmanager
def seen_from(rank: int, world: int, degrees: dict[str, int], replicas: int = 1) -> Iterator[Mesh]:
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield build_mesh(degrees, "cpu", fsdp_replicas=replicas)
    finally:
        dist.destroy_process_group()


def holds(axis: Axis, rank: int, groups: list[list[int]] | None) -> None:
    """The axis, seen from `rank`, is the one list of `groups` that `rank` is in."""
    if groups is None:
        assert (axis.rank, axis.size, axis.group) == (0, 1, None), axis.name
        return
    (wanted,) = (group for group in groups if rank in group)
    assert dist.get_process_group_ranks(axis.group) == wanted, (axis.name, rank)
    assert (axis.rank, axis.size) == (wanted.index(rank), len(wanted)), (axis.name, rank)
    assert dist.get_rank(axis.group) == axis.rank


@pytest.mark.parametrize(("degrees", "groups", "shards", "_replicas"), MESHES)
def test_every_axis_from_every_rank(degrees, groups, shards, _replicas):
    world = len(groups["fsdp"]) * len(groups["fsdp"][0])
    assert set(groups) == {*AXES, *COMBINED_AXES}
    for rank in range(world):
        with seen_from(rank, world, degrees) as mesh:
            assert set(mesh.axes) == set(groups)
            for name, wanted in groups.items():
                assert mesh[name].name == name
                holds(mesh[name], rank, wanted)
            assert dist.get_process_group_ranks(mesh.world.group) == list(range(world))
            assert (mesh.world.rank, mesh.world.size) == (rank, world)
            holds(mesh.fsdp.shard, rank, shards[1])
            assert mesh.fsdp.device_mesh.ndim == 1


@pytest.mark.parametrize(("degrees", "_groups", "shards", "replicas"), MESHES)
def test_the_shard_axis_of_two_replicas_and_the_ranks_that_hold_the_same_shard(degrees, _groups, shards, replicas):
    world = len(shards[2]) * len(shards[2][0])
    for rank in range(world):
        with seen_from(rank, world, degrees, 2) as mesh:
            shard, device_mesh = mesh.fsdp.shard, mesh.fsdp.device_mesh
            holds(shard, rank, shards[2])
            assert device_mesh.mesh_dim_names == ("fsdp_replicate", "fsdp_shard")
            assert device_mesh.get_group("fsdp_shard") is shard.group
            (wanted,) = (group for group in replicas if rank in group)
            assert dist.get_process_group_ranks(device_mesh.get_group("fsdp_replicate")) == wanted


@pytest.mark.parametrize(("degrees", "groups", "_shards", "_replicas"), MESHES)
def test_the_order_of_sp_is_that_of_the_token_chunks_ring_major(degrees, groups, _shards, _replicas):
    world = len(groups["fsdp"]) * len(groups["fsdp"][0])
    for rank in range(world):
        with seen_from(rank, world, degrees) as mesh:
            assert mesh["sp"].rank == mesh["ring"].rank * mesh["ulysses"].size + mesh["ulysses"].rank


def test_token_chunks_of_three_by_two():
    """Chunk c of six is rank c's; the groups of two that trade heads hold neighbouring chunks."""
    degrees = {"dp": 1, "cfg": 1, "ring": 3, "ulysses": 2, "tp": 1}
    ring = [[0, 2, 4], [1, 3, 5]]
    ulysses = [[0, 1], [2, 3], [4, 5]]
    for rank in range(6):
        with seen_from(rank, 6, degrees) as mesh:
            holds(mesh["ring"], rank, ring)
            holds(mesh["ulysses"], rank, ulysses)
            holds(mesh["sp"], rank, [[0, 1, 2, 3, 4, 5]])


@pytest.mark.parametrize(
    ("degrees", "replicas"), [({"tp": 4}, 1), ({"cfg": 2, "tp": 2}, 2), ({"ulysses": 4}, 4), ({"dp": 4}, 1)]
)
def test_one_shard_is_no_fsdp(degrees, replicas):
    with seen_from(1, 4, {**dict.fromkeys(AXES, 1), **degrees}, replicas) as mesh:
        assert mesh.fsdp is None


def test_one_rank_needs_no_process_group():
    mesh = build_mesh(dict.fromkeys(AXES, 1), "cpu")
    for name in (*AXES, *COMBINED_AXES):
        holds(mesh[name], 0, None)
    assert (mesh.world.rank, mesh.world.size, mesh.world.group, mesh.fsdp) == (0, 1, None, None)


def test_bytes_of_all_axes_are_counted_together():
    with seen_from(3, 8, EIGHT, 2) as mesh:
        for axis in (*mesh.axes.values(), mesh.world, mesh.fsdp.shard):
            assert axis.traffic is mesh.traffic
