"""The device mesh: five named axes, the axes made of several of them, and what one rank knows of each.

A size-1 axis is an axis like any other: its collectives return at once, so callers never ask whether they are alone.
"""

from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from math import prod
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("dp", "cfg", "ring", "ulysses", "tp")  # tp is fastest: neighbouring ranks share it

# Axes made of several: the token sequence is split over `sp`; the weights are the same on every rank of `fsdp`, so
# that is what can be sharded; a video is decoded by all ranks that made it, `vae`.
COMBINED_AXES = {
    "sp": ("ring", "ulysses"),
    "fsdp": ("cfg", "ring", "ulysses"),
    "vae": ("cfg", "ring", "ulysses", "tp"),
}


@dataclass(frozen=True)
class Axis:
    """One axis as seen from this rank: `rank` of `size` in `group` (None where the size is 1).

    traffic counts the bytes this rank sent, by collective; it is shared by all axes of a mesh.
    """

    name: str
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    traffic: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class FsdpMesh:
    """The FSDP axis as `fully_shard` takes it: `shard` is this rank's place among the ranks that hold one replica
    between them, `device_mesh` is `(shard,)`, or `(replicate, shard)` where there is more than one replica."""

    shard: Axis
    device_mesh: DeviceMesh


@dataclass(frozen=True)
class Mesh:
    """All axes of this rank, also the combined ones, by name. `world` spans every rank; `fsdp` is None where there is
    nothing to shard over, `store` (what all ranks can leave a word in) where there is one rank."""

    axes: dict[str, Axis]
    world: Axis
    traffic: Counter[str]
    fsdp: FsdpMesh | None = None
    store: dist.Store | None = None

    def __getitem__(self, name: str) -> Axis:
        return self.axes[name]


def build_mesh(
    degrees: dict[str, int], device_type: str, *, fsdp_replicas: int = 1, timeout_s: float | None = None
) -> Mesh:
    """The mesh of `degrees` over the default process group, whose size must be their product.

    fsdp_replicas: into how many replicas the FSDP axis is divided (HSDP), outermost; a divisor of its size. timeout_s:
    of the axes' groups, which do not take over the default group's; None is torch's own (minutes to half an hour).
    With one rank no process group is needed.
    """
    traffic: Counter[str] = Counter()
    if prod(degrees.values()) == 1:
        axes = {name: Axis(name, traffic=traffic) for name in (*AXES, *COMBINED_AXES)}
        return Mesh(axes, Axis("world", traffic=traffic), traffic)
    mesh = init_device_mesh(
        device_type,
        tuple(degrees[name] for name in AXES),
        mesh_dim_names=AXES,
        backend_override={name: _backend(degrees[name], timeout_s) for name in AXES},
    )
    axes = {name: _axis(name, mesh[name], traffic) for name in AXES}
    flat = {name: _combined(mesh, name, timeout_s) for name in COMBINED_AXES}
    axes |= {name: _axis(name, sub, traffic) for name, sub in flat.items()}
    world = Axis("world", dist.get_rank(), dist.get_world_size(), dist.group.WORLD, traffic)
    return Mesh(axes, world, traffic, _fsdp_mesh(flat["fsdp"], fsdp_replicas, timeout_s, traffic))


def _combined(mesh: DeviceMesh, name: str, timeout_s: float | None) -> DeviceMesh:
    """A combined axis; where only one of its parts has ranks, that one, whose group exists already."""
    parts = COMBINED_AXES[name]
    several = [part for part in parts if mesh[part].size() > 1]
    if len(several) < 2:
        return mesh[several[0] if several else parts[0]]
    size = prod(mesh[part].size() for part in parts)
    return mesh[parts]._flatten(name, backend_override=_backend(size, timeout_s))


def _backend(size: int, timeout_s: float | None) -> tuple[str | None, Any]:
    """The default group's backend with a timeout, for one axis of that size: each wants options of its own, since NCCL
    writes the group's ranks into them. (Set on a group afterwards, gloo's messages between two ranks do not heed it.)
    An axis over the whole world needs none: DeviceMesh gives it the default group itself."""
    if timeout_s is None or size in (1, dist.get_world_size()):
        return None, None
    name = dist.get_backend()
    options = dist.ProcessGroupNCCL.Options() if name == "nccl" else dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=timeout_s)
    return name, options


def _axis(name: str, sub: DeviceMesh, traffic: Counter[str]) -> Axis:
    group = sub.get_group() if sub.size() > 1 else None
    return Axis(name, sub.get_local_rank(), sub.size(), group, traffic)


def _fsdp_mesh(flat: DeviceMesh, replicas: int, timeout_s: float | None, traffic: Counter[str]) -> FsdpMesh | None:
    shards, over = divmod(flat.size(), replicas)
    assert over == 0, f"{replicas} replicas of an FSDP axis of {flat.size()}"
    if shards == 1:
        return None
    if replicas == 1:
        return FsdpMesh(_axis("fsdp_shard", flat, traffic), flat)
    sizes = {"fsdp_replicate": replicas, "fsdp_shard": shards}
    backends = {name: _backend(size, timeout_s) for name, size in sizes.items()}
    both = flat._unflatten(0, tuple(sizes.values()), tuple(sizes), backend_override=backends)
    return FsdpMesh(_axis("fsdp_shard", both["fsdp_shard"], traffic), both)
