"""The life of the process group: made from torchrun's store, and taken down so that the exit is clean."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from wan_dist.distributed.collectives import barrier
from wan_dist.distributed.mesh import Mesh, build_mesh
from wan_dist.topology import RankEnv


def agent_store(timeout_s: float) -> dist.Store:
    """The key-value store that the elastic agent serves to its ranks."""
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    return store


@contextmanager
def process_group(
    env: RankEnv, degrees: dict[str, int], device: torch.device, timeout_s: float, *, fsdp_replicas: int = 1
) -> Iterator[Mesh]:
    """The mesh of a run, for as long as its process group lives.

    A DeviceMesh that outlives its group aborts the interpreter at exit ("terminate called without an active
    exception"), so the caller must not keep the mesh; a rank that fails skips the barrier and just leaves.
    """
    if env.world_size == 1:
        yield build_mesh(degrees, device.type)
        return
    store = agent_store(timeout_s)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"wan_dist/{env.run_id}", store),  # a sweep's jobs share one server
        rank=env.rank,
        world_size=env.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    mesh = build_mesh(degrees, device.type, fsdp_replicas=fsdp_replicas, timeout_s=timeout_s)
    # A connection of its own: who waits in a store blocks its connection, and the process group's threads need theirs.
    mesh = replace(mesh, store=dist.PrefixStore(f"wan_dist/run/{env.run_id}", store.clone()))
    world = mesh.world
    yield mesh
    del mesh
    barrier(world)
    dist.destroy_process_group()
    gc.collect()
