"""`bench=step`: the denoising step of a random transformer, against diffusers' own and against one rank.

Three cases: `diffusers` (its unchanged model), `one_rank` (ours, on rank 0 alone) and, with more than one rank,
`mesh`. They take turns in one process with the same threads, so that a machine that slows down slows all of them.
Weights are random; the text is encoded already, as it is in a run after its first step.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch

from wan_dist.bench.random_transformer import TransformerShape, random_transformer
from wan_dist.config.schema import BenchConfig, Config
from wan_dist.distributed.collectives import barrier, gather_objects
from wan_dist.distributed.mesh import AXES, Axis, build_mesh
from wan_dist.distributed.process_group import process_group
from wan_dist.loading.weights import replicas_of, sharding_of
from wan_dist.models.text_encoder import MAX_TEXT_TOKENS
from wan_dist.output.record import source_commit
from wan_dist.sampling.denoise import guided_prediction, initial_noise
from wan_dist.sampling.schedule import Step
from wan_dist.topology import RankEnv

_GUIDANCE = 5.0


@dataclass(frozen=True)
class StepShape:
    """The random transformer and its input."""

    transformer: TransformerShape
    frames: int
    rows: int
    columns: int
    guidance: bool
    repeats: int


@torch.no_grad()
def bench_step(config: Config, env: RankEnv, device: torch.device) -> None:
    """Time the step and print one JSON line a case on rank 0.

    `ratio` is the time over diffusers' (below 1 is faster), `speedup` one rank's time over the mesh's; both are medians
    over turns. `bytes_sent` is what each rank sent in one step, by collective, as counted.
    """
    dtype = getattr(torch, str(config.runtime.dtype))
    degrees = {axis: getattr(config.parallelism, axis) for axis in AXES}
    shape = _shape(config.bench)
    replicas = replicas_of(config.parallelism.fsdp)
    alone = build_mesh(dict.fromkeys(AXES, 1), device.type)
    with process_group(env, degrees, device, config.runtime.timeout_s, fsdp_replicas=replicas) as mesh:
        make = partial(
            random_transformer, shape.transformer, dtype=dtype, device=device, attention=config.runtime.attention
        )
        runs: dict[str, Callable[[], torch.Tensor] | None] = dict.fromkeys(("diffusers", "one_rank"))
        if env.rank == 0:
            runs["diffusers"] = _step(make(), shape, dtype, device, alone["cfg"])
            runs["one_rank"] = _step(make(mesh=alone), shape, dtype, device, alone["cfg"])
        if mesh.world.size > 1:
            model = make(mesh=mesh, sharding=sharding_of(config.parallelism.fsdp, mesh))
            runs["mesh"] = _step(model, shape, dtype, device, mesh["cfg"])
        times = _alternate(runs, shape.repeats, device, mesh.world)
        sent = {name: total // shape.repeats for name, total in mesh.traffic.items() if total}
        sent_by_rank = gather_objects(mesh.world, sent)
        fsdp = config.parallelism.fsdp.enabled == "on" and mesh.fsdp is not None
        del mesh, runs
    if env.rank == 0:
        _report(_facts(shape, dtype, device), {**degrees, "fsdp": fsdp}, times, sent_by_rank)


def _report(
    facts: dict[str, Any], mesh: dict[str, int], times: dict[str, list[float]], sent: list[dict[str, int]]
) -> None:
    """One JSON line a case on stdout."""
    for case, seconds in times.items():
        line = {"case": case, **facts, "ranks": 1, "bytes_sent": [{}]}
        if case == "mesh":
            speedup = _median_ratio(times["one_rank"], seconds)
            line |= {"ranks": len(sent), "mesh": mesh, "bytes_sent": sent, "speedup": speedup}
        ratio = _median_ratio(seconds, times["diffusers"])
        print(
            json.dumps({**line, "ratio": ratio, "median_s": statistics.median(seconds), "all_s": seconds}), flush=True
        )


def _shape(bench: BenchConfig) -> StepShape:
    """From a config whose every null is filled in."""
    values = asdict(bench)
    transformer = TransformerShape(**{f.name: values[f.name] for f in fields(TransformerShape)})
    others = {f.name: values[f.name] for f in fields(StepShape) if f.name != "transformer"}
    return StepShape(transformer, **others)


def _facts(shape: StepShape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return {
        "bench": "step",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        **asdict(shape.transformer),
        "tokens": shape.frames * (shape.rows // 2) * (shape.columns // 2),
        "forwards_per_step": 2 if shape.guidance else 1,
        "torch": torch.__version__,
        "commit": source_commit(),
    }


def _step(
    model: Any, shape: StepShape, dtype: torch.dtype, device: torch.device, cfg_axis: Axis
) -> Callable[[], torch.Tensor]:
    """One guided (or plain) prediction: what a denoising step costs but for the solver's few elementwise passes."""
    latents = initial_noise((1, 16, shape.frames, shape.rows, shape.columns), 0).to(device)
    text = [initial_noise((1, MAX_TEXT_TOKENS, shape.transformer.text_dim), 1 + n).to(device, dtype) for n in range(2)]
    timestep = torch.tensor([500], device=device)
    step = Step(0, 500.0, "transformer", _GUIDANCE, shape.guidance)

    def predict(
        latents: torch.Tensor, timestep: torch.Tensor, _step: Step, branches: Sequence[int]
    ) -> list[torch.Tensor]:
        return [model(latents.to(dtype), timestep, text[branch], return_dict=False)[0] for branch in branches]

    return lambda: guided_prediction(predict, latents, timestep, step, cfg_axis)


def _alternate(
    runs: dict[str, Callable[[], Any] | None], repeats: int, device: torch.device, world: Axis
) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times in turn, after one turn that counts neither in them nor in the traffic.

    All ranks start a turn together; one that has no part in it (None) waits for the others without using a core.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        if turn == 1:
            world.traffic.clear()  # the first turn also computes what later ones remember
        for name, run in runs.items():
            barrier(world)
            if run is None:
                continue
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn > 0:
                times[name].append(time.perf_counter() - start)
    return times


def _median_ratio(above: list[float], below: list[float]) -> float:
    """The median of the ratios of neighbouring measurements: drift of the machine's speed cancels."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
