"""Environment variables and device files -> values: who this process is, and what this node has. Imports no torch."""

import glob
import os
import re
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # asked by these, a run saves its state and ends
EXIT_STOPPED = 75  # then: EX_TEMPFAIL of sysexits.h, try again
EXIT_ENDED = 128 + signal.SIGTERM  # of a rank whose agent ended it, because another one failed
_LAST_COMMON_STEP = 0xFFFFFFF0  # numbers above are Slurm's own: batch shell, interactive shell, extern


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


@dataclass(frozen=True)
class SlurmStep:
    """What `srun` tells a task: its job and step, the step's nodes (a host list, such as `node[1-4]`) and tasks, and
    which of the nodes this one is."""

    job: int
    step: int
    nodes: int
    tasks: int
    node_rank: int
    hosts: str


def slurm_step(env: Mapping[str, str] = os.environ) -> SlurmStep | None:
    """This process as a task of `srun`, else None (a batch shell or `salloc` may start several runs in one job)."""
    try:
        found = SlurmStep(
            job=int(env["SLURM_JOB_ID"]),
            step=int(env["SLURM_STEP_ID"]),
            nodes=int(env.get("SLURM_STEP_NUM_NODES", "1")),
            tasks=int(env.get("SLURM_STEP_NUM_TASKS", "1")),
            node_rank=int(env.get("SLURM_NODEID", "0")),
            hosts=env.get("SLURM_STEP_NODELIST", ""),
        )
    except (KeyError, ValueError):
        return None
    return found if found.step < _LAST_COMMON_STEP else None


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


def threads_per_rank(local_ranks: int, env: Mapping[str, str] = os.environ) -> int:
    """CPU threads that each of a node's ranks computes with: `OMP_NUM_THREADS`, else its share of the cores."""
    asked = env.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else max(1, usable_cores() // local_ranks)


def free_host_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process and its siblings may still take: what the host has available, or less where a cgroup of
    this process (a container's, a Slurm job's), at any level, leaves less. None where the system does not say.

    Page cache counts as free, in a cgroup as on the host: the kernel drops it first. root: of the file system.
    """
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", (root / "proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    limits = [int(found[1]) * 1024] if found else []
    return min([*limits, *_left_by_cgroups(root)], default=None)


def _left_by_cgroups(root: Path) -> list[int]:
    """What each limiting cgroup above this process leaves; version 2 (`0::/path`) and 1 (`N:memory:/path`)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        names = ("memory.max", "memory.current", "inactive_file", "active_file")
        if controllers:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")
        group = mount / path.strip("/")
        # In a container the path may be the host's, which is not there: what is mounted is the container's own group.
        for folder in [group, *group.parents] if group.is_dir() else [mount]:
            if (bytes_left := _left_by(folder, *names)) is not None:
                left.append(bytes_left)
            if folder == mount:
                break
    return left


def _left_by(group: Path, limit_name: str, used_name: str, *cache_names: str) -> int | None:
    try:
        limit = (group / limit_name).read_text().strip()
        used = int((group / used_name).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        if limit == "max":
            return None
        return max(0, int(limit) - used + sum(int(stat.get(name, 0)) for name in cache_names))
    except (OSError, ValueError):
        return None
