"""`bench=scale`: rank 0 of a large world, run without the world.

torch's fake process group and fake tensors run the very code of a step (mesh, taught model, collectives) on shapes
alone, so bytes are counted where they are sent, not estimated. Seconds are predicted from stated rates.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from wan_dist.bench.live_bytes import PeakLiveBytes
from wan_dist.bench.random_transformer import TransformerShape, random_transformer
from wan_dist.config.schema import BenchConfig, Config
from wan_dist.distributed.fsdp import kept_bytes, reshard
from wan_dist.distributed.mesh import AXES, Mesh, build_mesh
from wan_dist.loading.weights import replicas_of, sharding_of
from wan_dist.models.text_encoder import MAX_TEXT_TOKENS
from wan_dist.output.record import source_commit
from wan_dist.planning.cost import Flops, Rates, forward_flops, predicted_step
from wan_dist.planning.degrees import choose_degrees
from wan_dist.planning.traffic import crosses_nodes, first_rank_share, forwards_per_step
from wan_dist.planning.video_shape import WAN_2_1, parse_video
from wan_dist.sampling.denoise import guided_prediction
from wan_dist.sampling.schedule import Step


@torch.no_grad()
def bench_scale(config: Config) -> None:
    """Print one JSON line for each world and video on stdout, and then one table on stderr."""
    lines = []
    for world in config.bench.worlds:
        degrees, _ = choose_degrees(
            config.parallelism,
            world,
            guided=config.bench.guidance,
            source="bench.worlds",
            heads=int(config.bench.heads or 0),
        )
        with _fake_world(config, world, degrees) as (mesh, model, parameter_bytes):
            for video in config.bench.videos:
                line = _measure(config, mesh, model, video)
                lines.append({**_facts(config, degrees, mesh), **line, "parameter_bytes": parameter_bytes})
                print(json.dumps(lines[-1]), flush=True)
    print(table(lines), file=sys.stderr, flush=True)


@contextmanager
def _fake_world(config: Config, world: int, degrees: dict[str, int]) -> Iterator[tuple[Mesh, Any, int]]:
    """The mesh of rank 0 of `world`, its part of the model, and the bytes of that: made once for all videos."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    bench, fsdp, cpu = config.bench, config.parallelism.fsdp, torch.device("cpu")
    shape = TransformerShape(**{name: getattr(bench, name) for name in TransformerShape.__dataclass_fields__})
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        # outside the fake mode: it computes with real ranks
        mesh = build_mesh(degrees, "cpu", fsdp_replicas=replicas_of(fsdp))
        with FakeTensorMode(allow_non_fake_inputs=True):
            dtype = getattr(torch, str(config.runtime.dtype))
            model = random_transformer(
                shape,
                dtype=dtype,
                device=cpu,
                mesh=mesh,
                attention=config.runtime.attention,
                sharding=sharding_of(fsdp, mesh),
            )
            yield mesh, model, kept_bytes(model)
    finally:
        dist.destroy_process_group()


def _measure(config: Config, mesh: Mesh, model: Any, video: str) -> dict[str, Any]:
    """One step on fake tensors: bytes sent by collective, activations, and the prediction that follows."""
    bench, start = config.bench, time.perf_counter()
    height, width, num_frames = parse_video(video)
    dtype = getattr(torch, str(config.runtime.dtype))
    latents = torch.empty(WAN_2_1.latent_shape(num_frames, height, width))
    text = [torch.empty(1, MAX_TEXT_TOKENS, int(bench.text_dim or 0), dtype=dtype) for _ in range(2)]
    timestep, step = torch.tensor([500]), Step(0, 500.0, "transformer", 5.0, bench.guidance)

    def predict(
        latents: torch.Tensor, timestep: torch.Tensor, _step: Step, branches: Sequence[int]
    ) -> list[torch.Tensor]:
        return [model(latents.to(dtype), timestep, text[branch], return_dict=False)[0] for branch in branches]

    reshard(model)  # what the last video left gathered is this one's to gather
    mesh.traffic.clear()
    with PeakLiveBytes() as live:
        guided_prediction(predict, latents, timestep, step, mesh["cfg"])
    degrees = {axis: mesh[axis].size for axis in AXES}
    forwards = forwards_per_step(degrees, guided=bench.guidance)
    tokens, sent = WAN_2_1.tokens(num_frames, height, width), dict(mesh.traffic)
    flops = _flops(bench, degrees, tokens)
    shards = mesh.fsdp.shard.size if mesh.fsdp else 1
    leaves_node = crosses_nodes(degrees, bench.ranks_per_node, fsdp_shards=shards)
    crosses = {name: leaves_node[name] for name in sent}
    rates = Rates(*(value * unit for value, unit in zip(_stated(bench).values(), (1e12, 1e12, 1e9, 1e9), strict=True)))
    return {
        "video": video,
        "tokens": tokens,
        "forwards": forwards,
        "activation_bytes": live.peak,
        "bytes_sent": sent,
        "crosses_nodes": crosses,
        "flops": {"linear": forwards * flops.linear, "attention": forwards * flops.attention},
        "predicted_s": predicted_step(flops, forwards, sent, crosses, rates),
        "took_s": time.perf_counter() - start,
    }


def _flops(bench: BenchConfig, degrees: dict[str, int], tokens: int) -> Flops:
    """Rank 0's, which has the most of everything that does not divide."""
    assert bench.blocks and bench.heads and bench.head_dim and bench.ffn, "resolved before"
    share = first_rank_share(tokens, bench.heads, degrees)
    return forward_flops(
        blocks=bench.blocks,
        heads=bench.heads,
        head_dim=bench.head_dim,
        ffn=bench.ffn,
        tokens=tokens,
        rank_tokens=share.tokens,
        group_tokens=share.groups[0],
        group_heads=share.heads,
        tp=degrees["tp"],
    )


def _stated(bench: BenchConfig) -> dict[str, float]:
    names = ("matmul_tflops", "attention_tflops", "node_gb_s", "network_gb_s")
    return {name: getattr(bench, name) for name in names}


def _facts(config: Config, degrees: dict[str, int], mesh: Mesh) -> dict[str, Any]:
    bench = config.bench
    shape = {name: getattr(bench, name) for name in TransformerShape.__dataclass_fields__}
    return {
        "bench": "scale",
        "ranks": prod(degrees.values()),
        "mesh": {
            **{axis: degrees[axis] for axis in AXES},
            "fsdp": sharding_of(config.parallelism.fsdp, mesh) is not None,
        },
        **shape,
        "dtype": config.runtime.dtype,
        "stated": {**_stated(bench), "ranks_per_node": bench.ranks_per_node},
        "torch": torch.__version__,
        "commit": source_commit(),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """The lines as one Markdown table."""
    head = [
        "ranks",
        "mesh",
        "video",
        "weights GB",
        "activations GB",
        "sent GB a step",
        "predicted s/step",
        "of the first world's rate a rank",
    ]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        mesh = " x ".join(f"{axis} {line['mesh'][axis]}" for axis in AXES if line["mesh"][axis] > 1)
        sent = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in sorted(line["bytes_sent"].items()))
        total = line["predicted_s"]["total"]
        base = next(other for other in lines if other["video"] == line["video"])
        scaling = base["predicted_s"]["total"] * base["ranks"] / (total * line["ranks"])
        rows.append(
            [
                str(line["ranks"]),
                mesh + (", fsdp" if line["mesh"]["fsdp"] else ""),
                line["video"],
                f"{line['parameter_bytes'] / 1e9:.2f}",
                f"{line['activation_bytes'] / 1e9:.2f}",
                sent,
                f"{total:.3f}",
                f"{100 * scaling:.0f} %",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
