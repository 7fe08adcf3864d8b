"""`bench=load`: loading a checkpoint's transformers over the mesh, against diffusers' own loading on as many ranks.

Two cases take turns: `wan_dist` (each rank reads what it keeps) and `diffusers` (`from_pretrained`, then `.to(device)`;
on a CPU, where that leaves mapped pages of the file behind, each tensor is copied as `.to` would). The files are in
the page cache from the first, uncounted turn on: what is measured is the loading, not the disk.
"""

import gc
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from wan_dist.bench.random_transformer import TransformerShape
from wan_dist.config.schema import Config
from wan_dist.distributed.collectives import barrier, gather_objects
from wan_dist.distributed.fsdp import kept_bytes
from wan_dist.distributed.mesh import AXES, Axis, Mesh
from wan_dist.distributed.process_group import process_group
from wan_dist.layers.attention_kernels import attention_kernel
from wan_dist.loading.checkpoint import Checkpoint, open_checkpoint
from wan_dist.loading.components import match_transformer
from wan_dist.loading.tensor_files import read_component
from wan_dist.loading.weights import fill, on_every_rank, replicas_of, sharding_of
from wan_dist.models.random_weights import randomise
from wan_dist.output.memory import PeakHostMemory, return_free_memory
from wan_dist.output.record import source_commit
from wan_dist.topology import RankEnv


@dataclass(frozen=True)
class Measured:
    """One load on one rank. Peaks are over what was there before; peak_device_bytes is None on a CPU."""

    seconds: float
    bytes_read: int
    kept_bytes: int
    peak_host_bytes: int
    peak_device_bytes: int | None


# Loads the transformers: the modules, and the bytes read from files.
Load = Callable[[], tuple[list[torch.nn.Module], int]]


@torch.no_grad()
def bench_load(config: Config, env: RankEnv, device: torch.device) -> None:
    """Print one JSON line a case on rank 0's stdout, and one table on its stderr.

    `seconds` are the slowest rank's, a median over turns, and `ratio` is theirs over diffusers'; the other figures are
    each rank's. diffusers wants `accelerate` for these models: without it, its case is left out.
    """
    degrees = {axis: getattr(config.parallelism, axis) for axis in AXES}
    fsdp = config.parallelism.fsdp
    with process_group(env, degrees, device, config.runtime.timeout_s, fsdp_replicas=replicas_of(fsdp)) as mesh:
        facts = _facts(config, {**degrees, "fsdp": sharding_of(fsdp, mesh) is not None})
        on_disk, turns = _take_turns(config, mesh, device)
    if env.rank == 0:
        _report({**facts, "bytes_on_disk": on_disk}, turns)


def _take_turns(config: Config, mesh: Mesh, device: torch.device) -> tuple[int, dict[str, list[list[Measured]]]]:
    """Bytes on disk, and each case's turns: what every rank measured."""
    with _checkpoint(config, mesh.world) as checkpoint:
        cases: dict[str, Load] = {"wan_dist": partial(_ours, config, checkpoint, mesh, device)}
        if find_spec("accelerate") is not None:
            cases["diffusers"] = partial(_theirs, config, checkpoint, device)
        turns: dict[str, list[list[Measured]]] = {name: [] for name in cases}
        for turn in range(config.bench.repeats + 1):
            for name, load in cases.items():
                barrier(mesh.world)
                measured = gather_objects(mesh.world, _measure(load, device))
                if turn > 0:
                    turns[name].append(measured)
        return _bytes_on_disk(checkpoint), turns


@contextmanager
def _checkpoint(config: Config, world: Axis) -> Iterator[Checkpoint]:
    """The checkpoint that the config names; else a random one of the bench's shape, written by rank 0 to a temporary
    folder of its node."""
    if config.model.path is not None:
        yield on_every_rank(world, lambda: open_checkpoint(Path(str(config.model.path))))
        return
    shape = TransformerShape(**{name: getattr(config.bench, name) for name in TransformerShape.__dataclass_fields__})
    with tempfile.TemporaryDirectory(prefix="wan-dist-bench-") as scratch:
        folder = Path(gather_objects(world, scratch)[0])
        if world.rank == 0:
            _write_random(folder / "transformer", shape, getattr(torch, str(config.runtime.dtype)))
        barrier(world)
        yield Checkpoint(folder, {}, {"transformer": shape.config()})
        barrier(world)


def _write_random(folder: Path, shape: TransformerShape, dtype: torch.dtype) -> None:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**shape.config())
    randomise(model, 0)
    for name, parameter in model.named_parameters():
        if not set(model._keep_in_fp32_modules).intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)


def _ours(config: Config, checkpoint: Checkpoint, mesh: Mesh, device: torch.device) -> tuple[list[Any], int]:
    dtype, kernel = getattr(torch, str(config.runtime.dtype)), attention_kernel(config.runtime.attention)
    sharding = sharding_of(config.parallelism.fsdp, mesh)
    models, read = [], Counter[str]()
    for name in checkpoint.experts:
        matched = match_transformer(checkpoint, name, mesh=mesh, kernel=kernel, dtype=dtype)
        filled = fill(
            matched.weights, device=device, axis=mesh.world, sharding=sharding, bytes_read=read, component=name
        )
        models.append(filled)
    return models, read.total()


def _theirs(config: Config, checkpoint: Checkpoint, device: torch.device) -> tuple[list[Any], int]:
    from diffusers import WanTransformer3DModel

    dtype = getattr(torch, str(config.runtime.dtype))
    models = []
    for name in checkpoint.experts:
        model = WanTransformer3DModel.from_pretrained(checkpoint.path / name, torch_dtype=dtype).to(device)
        if device.type == "cpu":
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        models.append(model)
    return models, _bytes_on_disk(checkpoint)


def _bytes_on_disk(checkpoint: Checkpoint) -> int:
    folders = [checkpoint.path / name for name in checkpoint.experts]
    return sum(entry.nbytes for folder in folders for entry in read_component(folder).values())


def _measure(load: Load, device: torch.device) -> Measured:
    gc.collect()
    return_free_memory()  # of the case before: reused, it would not count
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    memory, start = PeakHostMemory(interval_s=0.002), time.perf_counter()
    models, read = load()
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    kept = sum(kept_bytes(model) for model in models)
    peak_on_gpu = torch.cuda.max_memory_allocated(device) - before if on_gpu else None
    return Measured(seconds, read, kept, memory.stop() - memory.base, peak_on_gpu)


def _facts(config: Config, mesh: dict[str, Any]) -> dict[str, Any]:
    return {
        "bench": "load",
        "model": config.model.path or "random",
        "ranks": config.runtime.ranks,
        "mesh": mesh,
        "device": config.runtime.device,
        "dtype": config.runtime.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": source_commit(),
    }


def _report(facts: dict[str, Any], turns: dict[str, list[list[Measured]]]) -> None:
    """One JSON line a case on stdout, and one table on stderr."""
    medians = {
        name: statistics.median(max(m.seconds for m in measured) for measured in runs) for name, runs in turns.items()
    }
    rows = [
        "| case | ranks | seconds | over diffusers | read GB, all ranks | peak host GB a rank |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in turns.items():
        ranks = [asdict(measured) for measured in runs[-1]]
        for rank, entry in enumerate(ranks):
            del entry["seconds"]
            entry["peak_host_bytes"] = max(measured[rank].peak_host_bytes for measured in runs)
        ratio = medians[name] / medians["diffusers"] if "diffusers" in medians else None
        all_s = [max(m.seconds for m in measured) for measured in runs]
        print(
            json.dumps(
                {"case": name, **facts, "median_s": medians[name], "ratio": ratio, "all_s": all_s, "by_rank": ranks}
            )
        )
        read, peak = sum(r["bytes_read"] for r in ranks) / 1e9, max(r["peak_host_bytes"] for r in ranks) / 1e9
        shown = "" if ratio is None else f"{ratio:.2f}"
        rows.append(f"| {name} | {len(ranks)} | {medians[name]:.2f} | {shown} | {read:.2f} | {peak:.2f} |")
    print("\n".join(rows), file=sys.stderr, flush=True)
    sys.stdout.flush()
