"""`bench=step`: the denoising step of a random transformer, against diffusers' own and against one rank.

Three cases: `diffusers` (its unchanged model), `one_rank` (ours, on rank 0 alone) and, with more than one rank,
`mesh`. They take turns in one process with the same threads, so that a machine that slows down slows all of them.
Weights are random; the text is encoded already, as it is in a run after its first step.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from wan_dist.config.schema import Config
from wan_dist.distributed.collectives import barrier, gather_objects
from wan_dist.distributed.mesh import AXES, Axis, Mesh, build_mesh
from wan_dist.distributed.process_group import process_group
from wan_dist.layers.attention import attention_kernel
from wan_dist.models.random_weights import randomise
from wan_dist.models.text_encoder import MAX_TEXT_TOKENS
from wan_dist.models.wan_transformer import parallelize_wan_transformer
from wan_dist.output.record import source_commit
from wan_dist.sampling.denoise import guided_prediction, initial_noise
from wan_dist.sampling.schedule import Step
from wan_dist.topology import RankEnv

_GUIDANCE = 5.0


@dataclass(frozen=True)
class StepShape:
    """The random transformer and its input: `BenchConfig` with every null filled in."""

    kind: str
    blocks: int
    heads: int
    head_dim: int
    ffn: int
    text_dim: int
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
    shape = StepShape(**asdict(config.bench))
    alone = build_mesh(dict.fromkeys(AXES, 1), device.type)
    with process_group(env, degrees, device, config.runtime.timeout_s) as mesh:
        runs: dict[str, Callable[[], torch.Tensor] | None] = dict.fromkeys(("diffusers", "one_rank"))
        if env.rank == 0:
            runs["diffusers"] = _step(_transformer(shape, dtype, device), shape, dtype, device, alone["cfg"])
            runs["one_rank"] = _step(_parallel(shape, dtype, device, alone, config), shape, dtype, device, alone["cfg"])
        if mesh.world.size > 1:
            runs["mesh"] = _step(_parallel(shape, dtype, device, mesh, config), shape, dtype, device, mesh["cfg"])
        times = _alternate(runs, shape.repeats, device, mesh.world)
        sent = {name: total // (shape.repeats + 1) for name, total in mesh.traffic.items()}
        sent_by_rank = gather_objects(mesh.world, sent)
        del mesh, runs
    if env.rank == 0:
        _report(_facts(shape, dtype, device), degrees, times, sent_by_rank)


def _report(
    facts: dict[str, Any], degrees: dict[str, int], times: dict[str, list[float]], sent: list[dict[str, int]]
) -> None:
    """One JSON line a case on stdout."""
    for case, seconds in times.items():
        line = {"case": case, **facts, "ranks": 1, "bytes_sent": [{}]}
        if case == "mesh":
            speedup = _median_ratio(times["one_rank"], seconds)
            line |= {"ranks": len(sent), "mesh": degrees, "bytes_sent": sent, "speedup": speedup}
        ratio = _median_ratio(seconds, times["diffusers"])
        print(
            json.dumps({**line, "ratio": ratio, "median_s": statistics.median(seconds), "all_s": seconds}), flush=True
        )


def _facts(shape: StepShape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return {
        "bench": "step",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "blocks": shape.blocks,
        "heads": shape.heads,
        "head_dim": shape.head_dim,
        "ffn": shape.ffn,
        "tokens": shape.frames * (shape.rows // 2) * (shape.columns // 2),
        "forwards_per_step": 2 if shape.guidance else 1,
        "torch": torch.__version__,
        "commit": source_commit(),
    }


def _transformer(shape: StepShape, dtype: torch.dtype, device: torch.device) -> Any:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=shape.heads,
        attention_head_dim=shape.head_dim,
        num_layers=shape.blocks,
        ffn_dim=shape.ffn,
        text_dim=shape.text_dim,
    )
    randomise(model, 0)
    for name, parameter in model.named_parameters():
        if not set(model._keep_in_fp32_modules).intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False).to(device)


def _parallel(shape: StepShape, dtype: torch.dtype, device: torch.device, mesh: Mesh, config: Config) -> Any:
    model = _transformer(shape, dtype, device)
    parallelize_wan_transformer(model, mesh["ulysses"], attention_kernel(config.runtime.attention))
    return model


def _step(
    model: Any, shape: StepShape, dtype: torch.dtype, device: torch.device, cfg_axis: Axis
) -> Callable[[], torch.Tensor]:
    """One guided (or plain) prediction: what a denoising step costs but for the solver's few elementwise passes."""
    latents = initial_noise((1, 16, shape.frames, shape.rows, shape.columns), 0).to(device)
    text = [initial_noise((1, MAX_TEXT_TOKENS, shape.text_dim), 1 + n).to(device, dtype) for n in range(2)]
    timestep = torch.tensor([500], device=device)
    step = Step(0, 500.0, "transformer", _GUIDANCE, shape.guidance)

    def predict(latents: torch.Tensor, timestep: torch.Tensor, _step: Step, branch: int) -> torch.Tensor:
        return model(latents.to(dtype), timestep, text[branch], return_dict=False)[0]

    return lambda: guided_prediction(predict, latents, timestep, step, cfg_axis)


def _alternate(
    runs: dict[str, Callable[[], Any] | None], repeats: int, device: torch.device, world: Axis
) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times in turn, after one uncounted turn. All ranks start a turn together; one
    that has no part in it (None) waits for the others without using a core."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
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
