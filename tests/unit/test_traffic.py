"""Predicted traffic of a step is what rank 0 of a fake world counts where it sends, to the byte, on any mesh."""

from contextlib import contextmanager, nullcontext
from math import prod
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from support.tiers import ALL
from wan_dist.bench import scale
from wan_dist.bench.random_transformer import TransformerShape
from wan_dist.config.schema import BenchConfig, Config, FsdpConfig, ParallelismConfig, RuntimeConfig
from wan_dist.models import wan_transformer
from wan_dist.models.wan_transformer import forget_block_text
from wan_dist.planning.traffic import (
    StepShape,
    bytes_sent,
    crosses_nodes,
    first_rank_share,
    forwards_per_step,
    gather_bytes_sent,
)
from wan_dist.planning.video_shape import WAN_2_1
from wan_dist.sampling.denoise import guided_prediction
from wan_dist.sampling.schedule import Step

HEAD_DIM, OUT_FEATURES, IMAGE_TOKENS, IMAGE_DIM, TEXT_DIM = 8, 64, 257, 12, 10
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
ON = {"enabled": "on"}
VIDEO, PRIME = (9, 32, 48), (49, 16, 16)  # frames, height, width: 18 and 13 tokens

# Degrees, then what differs from an unsharded bf16 model of one block and 12 heads, unguided, at 18 tokens.
GUIDED = {"guidance": True}
MESHES = {
    "dp alone": ({"dp": 3}, GUIDED),
    "cfg alone": ({"cfg": 2}, GUIDED),
    "cfg, unguided": ({"cfg": 2}, {}),
    "ulysses, both branches, fp32": ({"ulysses": 2}, {**GUIDED, "dtype": "float32"}),
    "5 heads over ulysses 2": ({"ulysses": 2}, {"heads": 5}),
    "5 heads over ulysses 3, prime tokens": ({"ulysses": 3}, {"heads": 5, "video": PRIME}),
    "12 heads over ulysses 8": ({"ulysses": 8}, {"video": PRIME}),
    "fewer tokens than ranks": ({"ring": 4, "ulysses": 5}, {"video": PRIME, "heads": 7}),
    "one token": ({"cfg": 2, "ring": 2, "ulysses": 2}, {**GUIDED, "video": (1, 16, 16)}),
    "ring 2": ({"ring": 2}, GUIDED),
    "ring 4": ({"ring": 4}, {"video": PRIME}),
    "ring 3 x ulysses 5": ({"ring": 3, "ulysses": 5}, {"video": PRIME, "dtype": "float32"}),
    "three blocks": ({"ring": 2, "ulysses": 2}, {"blocks": 3}),
    "tp": ({"tp": 2}, GUIDED),
    "tp 3, ffn does not divide": ({"tp": 3}, {"ffn": 100, "blocks": 2, "dtype": "float32"}),
    "tp 5, fewer features than ranks": ({"tp": 5}, {"ffn": 3, "heads": 5}),
    "tp 7, rows padded": ({"ring": 2, "tp": 7}, {"ffn": 64, "heads": 7, "video": PRIME}),
    "tp x ulysses that does not divide its heads": ({"ulysses": 4, "tp": 2}, {"video": PRIME}),
    "everything": ({"dp": 2, "cfg": 2, "ring": 2, "ulysses": 3, "tp": 3}, {**GUIDED, "ffn": 100, "video": PRIME}),
    "large world": ({"cfg": 2, "ring": 4, "ulysses": 8}, {**GUIDED, "video": (81, 480, 832)}),
    "fsdp over ulysses": ({"ulysses": 3}, {**GUIDED, "fsdp": ON}),
    "fsdp over cfg": ({"cfg": 2}, {**GUIDED, "fsdp": ON, "dtype": "float32"}),
    "fsdp off": ({"cfg": 2, "ulysses": 2}, {**GUIDED, "fsdp": {"enabled": "off"}}),
    "fsdp, nothing to shard over": ({"tp": 2}, {"fsdp": ON}),
    "hsdp": ({"cfg": 2, "ring": 2, "ulysses": 3}, {**GUIDED, "fsdp": {**ON, "replicate": 2}, "blocks": 2}),
    "hsdp of one shard": ({"ulysses": 4}, {"fsdp": {**ON, "replicate": 4}}),
    "hsdp, unguided, tp": ({"cfg": 2, "ulysses": 3, "tp": 3}, {"fsdp": {**ON, "replicate": 2}, "ffn": 100}),
}


@pytest.fixture(autouse=True)
def _no_memory_is_followed(monkeypatch):
    """Which would take a third of the time."""
    monkeypatch.setattr(scale, "PeakLiveBytes", lambda: nullcontext(SimpleNamespace(peak=0)))


def config_of(dtype="bfloat16", fsdp=None, **bench) -> Config:
    shape = {"blocks": 1, "heads": 12, "head_dim": HEAD_DIM, "ffn": 128, "text_dim": TEXT_DIM}
    return Config(
        bench=BenchConfig(**{**shape, "guidance": False, **bench}),
        parallelism=ParallelismConfig(fsdp=FsdpConfig(**(fsdp or {"enabled": "off"}))),
        runtime=RuntimeConfig(dtype=dtype),
    )


@contextmanager
def world_of(config: Config, degrees: dict[str, int]):
    """`(mesh, model, predict)` of rank 0; `predict(tokens, first=...)` is of that world and model."""
    with torch.no_grad(), scale._fake_world(config, prod(degrees.values()), degrees) as (mesh, model, _):
        fsdp, shards = config.parallelism.fsdp, mesh.fsdp.shard.size if mesh.fsdp else 1
        sharded = [(tuple(tensor.shape), tensor.element_size()) for tensor in model.parameters()]

        def predict(
            tokens: int, *, first: bool, image_tokens: int = 0, device: str = "cpu", streamed_blocks: int = 0
        ) -> dict[str, int]:
            bench = config.bench
            shape = {name: getattr(bench, name) for name in ("blocks", "heads", "head_dim", "ffn")}
            return bytes_sent(
                StepShape(**shape, tokens=tokens, out_features=OUT_FEATURES, image_tokens=image_tokens),
                degrees,
                dtype_bytes=DTYPE_BYTES[config.runtime.dtype],
                guided=bench.guidance,
                device=device,
                first=first,
                streamed_blocks=streamed_blocks,
                gather_bytes=gather_bytes_sent(sharded, shards) if fsdp.enabled == "on" else 0,
                reshard_after_forward=fsdp.reshard_after_forward,
            )

        yield mesh, model, predict


def degrees_of(**degrees: int) -> dict[str, int]:
    return {axis: degrees.get(axis, 1) for axis in scale.AXES}


def measured(config: Config, mesh, model, video: tuple[int, int, int]) -> dict:
    frames, height, width = video
    return scale._measure(config, mesh, model, f"{height}x{width}x{frames}")


SLOW = {"three blocks", "hsdp of one shard", "hsdp, unguided, tp", "fsdp over ulysses", "fsdp over cfg", "everything"}
assert MESHES.keys() > SLOW


@pytest.mark.parametrize("name", [name for name in MESHES if ALL or name not in SLOW])
def test_bytes_that_bench_scale_counts(name):
    degrees, settings = MESHES[name]
    degrees, config = degrees_of(**degrees), {key: value for key, value in settings.items() if key != "video"}
    config, video = config_of(**config), settings.get("video", VIDEO)
    with world_of(config, degrees) as (mesh, model, predict):
        line = measured(config, mesh, model, video)
        assert line["bytes_sent"] == predict(WAN_2_1.tokens(*video), first=True)
        assert line["forwards"] == forwards_per_step(degrees, guided=config.bench.guidance)


def test_every_video_of_a_world_computes_its_text_and_gathers_anew():
    config = config_of(fsdp={**ON, "reshard_after_forward": False}, **GUIDED)
    with world_of(config, degrees_of(cfg=2, ring=2, tp=2)) as (mesh, model, predict):
        for video in (VIDEO, PRIME):
            assert measured(config, mesh, model, video)["bytes_sent"] == predict(WAN_2_1.tokens(*video), first=True)


def test_rows_are_not_padded_on_a_gpu(monkeypatch):
    monkeypatch.setattr(wan_transformer, "rows_for", lambda count, width, device: count)
    degrees, config = degrees_of(ring=2, tp=3), config_of(ffn=100)
    with world_of(config, degrees) as (mesh, model, predict):
        line = measured(config, mesh, model, PRIME)
        assert line["bytes_sent"] == predict(WAN_2_1.tokens(*PRIME), first=True, device="cuda")
        assert line["bytes_sent"] != predict(WAN_2_1.tokens(*PRIME), first=True, device="cpu")


class WithImageBranch(TransformerShape):
    def config(self):
        heads = self.heads * self.head_dim
        return {**super().config(), "image_dim": IMAGE_DIM, "added_kv_proj_dim": heads, "in_channels": 36}


@pytest.mark.parametrize(
    ("cfg", "reshard", "image_tokens"),
    [(1, False, IMAGE_TOKENS), (2, True, 0)],
)
def test_later_steps_have_the_text_and_what_fsdp_keeps(cfg, reshard, image_tokens, monkeypatch):
    """With and without an image, whose keys' mean square is summed over tp too, once a prompt like the text's."""
    if image_tokens:
        monkeypatch.setattr(scale, "TransformerShape", WithImageBranch)
    config = config_of(fsdp={**ON, "reshard_after_forward": reshard}, ffn=100, blocks=2, **GUIDED)
    latents = torch.empty(1, 36 if image_tokens else 16, 13, 2, 2)
    with world_of(config, degrees_of(cfg=cfg, ring=2, tp=3)) as (mesh, model, predict):
        texts = [torch.empty(1, 512, TEXT_DIM, dtype=torch.bfloat16) for _ in range(2)]
        image = torch.empty(1, image_tokens, IMAGE_DIM, dtype=torch.bfloat16) if image_tokens else None

        def velocities(latents, timestep, _step, branches):
            return [
                model(latents.bfloat16(), timestep, texts[branch], image, return_dict=False)[0] for branch in branches
            ]

        def sent() -> dict[str, int]:
            mesh.traffic.clear()
            guided_prediction(velocities, latents, torch.tensor([500]), Step(0, 500.0, "t", 5.0, True), mesh["cfg"])
            return dict(mesh.traffic)

        assert sent() == predict(13, first=True, image_tokens=image_tokens)
        assert sent() == predict(13, first=False, image_tokens=image_tokens)
        forget_block_text(model.blocks[0])  # as streaming does
        assert sent() == predict(13, first=False, image_tokens=image_tokens, streamed_blocks=1)


NODES = {
    "one rank": ({}, 1),
    "all axes": ({"dp": 2, "cfg": 2, "ring": 2, "ulysses": 3, "tp": 2}, 1),
    "replicas": ({"cfg": 2, "ring": 3, "ulysses": 2, "tp": 2}, 3),
    "cfg outside": ({"cfg": 2, "tp": 4}, 1),
    "ring outside": ({"ring": 4, "ulysses": 2}, 2),
}


@pytest.mark.parametrize("name", NODES)
def test_what_leaves_the_node_is_what_torchs_groups_say(name, monkeypatch):
    monkeypatch.setattr(scale, "random_transformer", lambda *_args, **_kwargs: torch.nn.Identity())
    degrees, replicas = NODES[name]
    degrees, config = degrees_of(**degrees), config_of(fsdp={**ON, "replicate": replicas})
    with world_of(config, degrees) as (mesh, _, _):
        axes = {"all_to_all": mesh["ulysses"], "p2p": mesh["ring"], "all_reduce": mesh["tp"]}
        axes["all_gather"] = mesh["sp"] if mesh["sp"].size > 1 else mesh["cfg"]
        axes |= {"fsdp_all_gather": mesh.fsdp.shard} if mesh.fsdp else {}
        ranks = {key: dist.get_process_group_ranks(axis.group) if axis.group else [0] for key, axis in axes.items()}
        shards = mesh.fsdp.shard.size if mesh.fsdp else 1
        for per_node in range(1, prod(degrees.values()) + 2):
            crosses = crosses_nodes(degrees, per_node, fsdp_shards=shards)
            assert {key: crosses[key] for key in ranks} == {key: max(of) >= per_node for key, of in ranks.items()}


def test_share_of_the_first_rank():
    share = first_rank_share(13, 12, degrees_of(ring=2, ulysses=4, tp=2))
    assert (share.tokens, share.groups, share.tp_heads, share.heads) == (2, (8, 5), 6, 2)


def test_gathers_of_uneven_rows_are_padded():
    """5 rows over 4 shards: two each, of which one shard holds one and one none; a table of one row goes out whole."""
    assert gather_bytes_sent([((5, 3), 2), ((1, 6, 4), 4), ((8,), 2)], 4) == 3 * (2 * 3 * 2 + 24 * 4 + 2 * 2)
    assert gather_bytes_sent([((5, 3), 2)], 1) == 0
