"""Environment variables and device files -> values: who this process is, and what this node has. Imports no torch."""

import glob
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RankEnv:
    """What torchrun tells a rank."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    run_id: str
    host: str
    nodes: int = 1


def rank_env(env: Mapping[str, str] = os.environ) -> RankEnv | None:
    """This process as a rank of torchrun, or None where torchrun did not start it."""
    if "TORCHELASTIC_RUN_ID" not in env or "RANK" not in env:
        return None
    return RankEnv(
        rank=int(env["RANK"]),
        local_rank=int(env["LOCAL_RANK"]),
        world_size=int(env["WORLD_SIZE"]),
        local_world_size=int(env["LOCAL_WORLD_SIZE"]),
        node_rank=int(env.get("GROUP_RANK", "0")),
        run_id=env["TORCHELASTIC_RUN_ID"],
        host=socket.gethostname(),
        nodes=int(env.get("GROUP_WORLD_SIZE", "1")),
    )


def slurm_step(env: Mapping[str, str] = os.environ) -> str | None:
    """`JOB.STEP` inside `srun`, else None (a batch shell or `salloc` may start several runs under one job id)."""
    if "SLURM_JOB_ID" in env and "SLURM_STEP_ID" in env:
        return f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}"
    return None


def visible_gpus() -> int:
    """GPUs that torch would use on this node; torch is imported only where a device file says it is worth it."""
    device_files = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")  # CUDA, ROCm, WSL
    if not any(glob.glob(pattern) for pattern in device_files):  # noqa: PTH207
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def usable_cores() -> int:
    """CPU cores this process may run on (its affinity mask, which containers and Slurm narrow)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
