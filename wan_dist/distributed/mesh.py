"""The device mesh: five named axes, and what one rank knows of each.

A size-1 axis is an axis like any other: its collectives return at once, so callers never ask whether they are alone.
"""

from collections import Counter
from dataclasses import dataclass, field
from math import prod

import torch.distributed as dist

AXES = ("dp", "cfg", "ring", "ulysses", "tp")  # tp is fastest: neighbouring ranks share it


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
class Mesh:
    """All axes of this rank. `world` spans every rank."""

    axes: dict[str, Axis]
    world: Axis
    traffic: Counter[str]

    def __getitem__(self, name: str) -> Axis:
        return self.axes[name]


def build_mesh(degrees: dict[str, int], device_type: str) -> Mesh:
    """The mesh of `degrees` over the default process group, whose size must be their product.

    With one rank no process group is needed.
    """
    traffic: Counter[str] = Counter()
    if prod(degrees.values()) == 1:
        return Mesh({name: Axis(name, traffic=traffic) for name in AXES}, Axis("world", traffic=traffic), traffic)
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device_type, tuple(degrees[name] for name in AXES), mesh_dim_names=AXES)
    axes = {}
    for name in AXES:
        sub = mesh[name]
        group = sub.get_group() if degrees[name] > 1 else None
        axes[name] = Axis(name, sub.get_local_rank(), degrees[name], group, traffic)
    world = Axis("world", dist.get_rank(), dist.get_world_size(), dist.group.WORLD, traffic)
    return Mesh(axes, world, traffic)
