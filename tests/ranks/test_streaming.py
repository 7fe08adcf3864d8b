"""Streaming changes no bit of a video, on any mesh; ranks of one machine hold and read one copy of what they stream."""

import gc
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from support.ranks import generate_all, run_cases
from support.sharded import load, match, mesh_of, save_transformer
from support.streaming import Streamed, is_within, noise, stream_one
from support.tiers import in_all
from wan_dist.distributed.collectives import gather_objects
from wan_dist.models.wan_transformer import forget_block_text
from wan_dist.offload import host_blocks
from wan_dist.offload.host_blocks import HostBlocks
from wan_dist.offload.lockstep import in_lockstep
from wan_dist.offload.slots import SlotRing
from wan_dist.pipeline import generate as generating
from wan_dist.pipeline import streaming

ONE_EXPERT = {"layers": 4}
TWO_EXPERTS = {"layers": 5, "experts": 2, "boundary_ratio": 0.9, "seed": 2}
FIRST_GUIDED = {"sampler.guidance_scale": 4.0, "sampler.guidance_scale_2": 1.0}
SECOND_GUIDED = {"sampler.guidance_scale": 1.0, "sampler.guidance_scale_2": 4.0}
BOTH_GUIDED = {"sampler.guidance_scale": 4.0, "sampler.guidance_scale_2": 3.0}
SHORT = {"video.num_frames": 5}
IMAGE = {"image": "picture", **SHORT}
TI2V = {"sampler.guidance_scale": 4.0, "video.width": 64}
FRAMES = {"output.formats": ["latents", "frames"]}

RESIDENT = {"offload.transformer": "resident"}
LAYERWISE = {"offload.transformer": "layerwise"}
TWO_AHEAD = {**LAYERWISE, "offload.prefetch": "2"}
NONE_AHEAD = {**LAYERWISE, "offload.prefetch": "0"}
ONE_STAYS = {**LAYERWISE, "offload.prefetch": "1", "offload.resident_blocks": "1"}
ALL_STAY = {**LAYERWISE, "offload.resident_blocks": "5"}
TEXT = {"offload.text_encoder": "layerwise"}
MEMORY = {"offload.mode": "memory"}
COMPONENT = {"offload.transformer": "component", "offload.text_encoder": "component"}
EVERYTHING_ELSE = {**LAYERWISE, **TEXT, "offload.image_encoder": "component", "offload.vae": "component"}
SHARDED = {"parallelism.fsdp.enabled": "on"}

MESHES: dict[str, dict[str, int]] = {
    "one": {},
    "cfg": {"cfg": 2},
    "ulysses": {"ulysses": 2},
    "ring": {"ring": 2},
    "tp": {"tp": 2},
    "halves": {"cfg": 2, "ulysses": 2},
}

# model, request, mesh -> what is ordered beside residence; all must give the same bits
CASES: list[tuple[Any, dict[str, Any], str, list[dict[str, Any]]]] = [
    (ONE_EXPERT, SHORT, "one", [LAYERWISE, {**NONE_AHEAD, **TEXT}, ONE_STAYS, MEMORY, COMPONENT]),
    (TWO_EXPERTS, {**SHORT, **FIRST_GUIDED}, "one", [LAYERWISE, ONE_STAYS, ALL_STAY, COMPONENT]),
    (TWO_EXPERTS, {**SHORT, **SECOND_GUIDED}, "one", [TWO_AHEAD]),
    (TWO_EXPERTS, {**SHORT, **BOTH_GUIDED}, "one", [NONE_AHEAD]),
    ("wan2.1", {**IMAGE, **FRAMES}, "one", [EVERYTHING_ELSE, {**LAYERWISE, "offload.vae": "resident"}]),
    *in_all(("wan2.2 a14b", {**IMAGE, **BOTH_GUIDED}, "one", [ONE_STAYS])),
    ("wan2.2 a14b", {**IMAGE, **BOTH_GUIDED}, "tp", [LAYERWISE]),
    ("wan2.2 ti2v", {**IMAGE, **TI2V}, "ring", [LAYERWISE]),
    *((TWO_EXPERTS, {**SHORT, **FIRST_GUIDED}, mesh, [LAYERWISE]) for mesh in ("ring", *in_all("halves"))),
    *((TWO_EXPERTS, {**SHORT, **SECOND_GUIDED}, mesh, [ONE_STAYS]) for mesh in ("cfg", "tp", *in_all("ulysses"))),
    (ONE_EXPERT, SHORT, "ulysses", [{**SHARDED, **MEMORY}]),
]


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("picture") / "it.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(file)
    return str(file)


def settings(request: dict[str, Any], mesh: str, picture: str) -> dict[str, Any]:
    degrees = {f"parallelism.{axis}": degree for axis, degree in {"ulysses": 1, **MESHES[mesh]}.items()}
    return {**request, **degrees, **({"image": picture} if "image" in request else {})}


def finishing(run, *args):
    """`finish_run`, which also leaves on disk what each of this rank's rings has done."""
    order = run.plan.streaming("transformer") or run.plan.streaming("transformer_2")
    note = {
        "experts": [step.expert for step in run.schedule],
        "rings": [(len(ring.slots), ring.copies, ring.late) for ring in Ring.all],
        "order": None if order is None else (order.prefetch, order.blocks - order.resident_blocks),
    }
    file = Path(run.config.output.dir, f"{run.config.output.name}.{run.mesh.world.rank}.ring")
    file.write_text(json.dumps(note))
    Ring.all.clear()
    return finish_run(run, *args)


finish_run = generating.finish_run


class Ring(SlotRing):
    all: ClassVar[list[SlotRing]] = []

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.all.append(self)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, checkpoints, picture) -> list[list[dict[str, Any]]]:
    """By case: the resident run, then the others. `notes` are the ranks'."""
    asked = []
    for model, request, mesh, orders in CASES:
        path = checkpoints.of_images(model) if isinstance(model, str) else checkpoints(**model)
        asked += [(path, {**settings(request, mesh, picture), **order}) for order in (RESIDENT, *orders)]
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generating, "finish_run", finishing)
        patch.setattr(streaming, "SlotRing", Ring)
        finished = generate_all(folder, asked)
    for number, run in enumerate(finished):
        files = [folder / f"video{number}.{rank['rank']}.ring" for rank in run["record"]["ranks"]]
        run["notes"] = [json.loads(file.read_text()) for file in files]
    done = iter(finished)
    return [[next(done) for _ in range(1 + len(orders))] for *_, orders in CASES]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_placement_gives_the_same_bits(runs, number):
    resident, *others = runs[number]
    for order, run in zip(CASES[number][3], others, strict=True):
        assert torch.equal(run["latents"], resident["latents"]), order
        if "frames" in resident:
            assert torch.equal(run["frames"], resident["frames"]), order
    assert resident["latents"].isfinite().all()


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_record_says_what_was_ordered(runs, number):
    for order, run in zip((RESIDENT, *CASES[number][3]), runs[number], strict=True):
        placements = {row["component"]: row["placement"] for row in run["record"]["plan"]}
        for name, how in placements.items():
            key = "transformer" if name.startswith("transformer") else name
            wanted = order.get(f"offload.{key}")
            if order.get("offload.mode") == "memory":
                encoder = "fsdp" if "parallelism.fsdp.enabled" in order else "layerwise"
                wanted = {"transformer": encoder, "text_encoder": encoder}.get(key, "component")
                assert how in (wanted, "component"), (order, placements)
            elif "parallelism.fsdp.enabled" in order and key == "transformer":
                assert how == "fsdp"
            elif wanted is not None:
                assert how == wanted, (order, placements)
        assert all(row["reason"] for row in run["record"]["plan"])


def read_of(run: dict[str, Any], name: str) -> list[int]:
    return [rank["bytes_read"].get(name, 0) for rank in run["record"]["ranks"]]


def test_of_ranks_that_share_a_copy_one_reads_it(runs):
    for (_model, _request, mesh, orders), (resident, *others) in zip(CASES, runs, strict=True):
        for order, run in zip(orders, others, strict=True):
            placements = {row["component"]: row["placement"] for row in run["record"]["plan"]}
            for name in placements.keys() - {"vae"}:
                before, now = read_of(resident, name), read_of(run, name)
                shared = name.startswith("transformer") and placements[name] == "layerwise"
                if shared and mesh not in ("one", "tp"):  # tp's ranks have slices of their own
                    assert now[0] == before[0]
                    assert len(set(now[1:])) == 1 and now[1] < before[1]
                elif placements[name] != "fsdp":
                    assert now == before, (name, mesh, order)


def test_a_step_brings_each_block_once_whatever_it_computes_and_only_the_first_is_late(runs):
    """Over both experts, and for both branches of guidance."""
    seen = set()
    for (_model, _request, mesh, orders), (resident, *others) in zip(CASES, runs, strict=True):
        assert not any(note["rings"] for note in resident["notes"])
        for order, run in zip(orders, others, strict=True):
            for note in run["notes"]:
                if note["order"] is None:
                    continue
                (slots, copies, late), (prefetch, blocks) = note["rings"][-1], note["order"]
                assert prefetch == int(order.get("offload.prefetch", prefetch))
                assert slots == min(prefetch + 1, blocks * len(set(note["experts"])))
                # as many blocks as there are slots stay where they are
                steps = set(note["experts"]) if blocks <= slots else note["experts"]
                assert copies == len(steps) * blocks, (mesh, order)
                assert late == (copies if prefetch == 0 else min(1, blocks)), (mesh, order)
                seen.add((prefetch, blocks, len(set(note["experts"]))))
    assert seen >= {(1, 4, 1), (0, 4, 1), (1, 3, 1), (2, 5, 2), (1, 4, 2), (0, 5, 2), (2, 0, 2), (2, 2, 2)}


def test_the_text_encoder_is_streamed_on_the_first_rank_alone(runs):
    for (_model, _request, _mesh, orders), (_resident, *others) in zip(CASES, runs, strict=True):
        for order, run in zip(orders, others, strict=True):
            placements = {row["component"]: row["placement"] for row in run["record"]["plan"]}
            names = {name.split("_2")[0] for name, how in placements.items() if how == "layerwise"}
            expected = [len(names)] + [len(names - {"text_encoder"})] * (len(run["notes"]) - 1)
            assert [len(note["rings"]) for note in run["notes"]] == expected, order


def mappings() -> dict[str, int]:
    """Of this process's memory that holds streamed blocks, bytes: `Size`, `Rss`, and `Pss`, where a page that n
    processes have counts as the nth part."""
    sums, inside = {"Size": 0, "Rss": 0, "Pss": 0}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, rest = line.partition(":")
        if "-" in key and " " in key:
            inside = "/memfd:wan_dist blocks" in line
        elif inside and key in sums:
            sums[key] += 1024 * int(rest.split()[0])
    return sums


def handles() -> int:
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum("wan_dist blocks" in os.readlink(link) for link in links if link.is_symlink())


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        logging.getLogger("wan_dist").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def forward(model, seed: int) -> torch.Tensor:
    latents, text = noise(1, 16, 2, 8, 8, seed=seed), noise(1, 512, 32, seed=seed + 10)
    return model(latents, torch.tensor([500 + seed]), text, return_dict=False)[0]


def right(it: Streamed, whole) -> bool:
    expected = [forward(whole, seed) for seed in range(2)]
    together = in_lockstep(it.stream, [lambda: forward(it.model, 0), lambda: forward(it.model, 1)])
    return all(map(torch.equal, together, expected)) and torch.equal(forward(it.model, 1), expected[1])


def lagging(host: HostBlocks, seconds: float) -> Callable[[], None]:
    """`host.meet`, after which the rank that writes is in no hurry the first time."""
    lags, meet = [seconds * host.is_filler, 0.0], host.meet

    def met() -> None:
        meet()
        time.sleep(lags.pop(0))

    return met


@torch.no_grad()
def shared(
    env, folder, degrees: dict[str, int], apart: tuple[int, ...] = (), slow: tuple[int, ...] = ()
) -> dict[str, Any]:
    """What a rank finds of a streamed transformer, and whether it is right at first and once weights were changed.

    apart: ranks that cannot open another's memory. slow: ranks that still run when others change the
    weights; where there are some, those who write the change are slow too."""
    warnings = Warnings()
    with mesh_of(env, **degrees) as mesh, pytest.MonkeyPatch.context() as patch:
        whole = load(mesh, match(mesh, folder), fsdp=False)
        if env.rank in apart:
            patch.setattr(host_blocks, "_mapped", lambda *_args: None)
        it = stream_one(match(mesh, folder), mesh=mesh, key=mesh["tp"].rank, released=forget_block_text)
        is_right = [right(it, whole)]
        found = {"filler": it.host.is_filler, "read": it.bytes_read, "host": it.host.memory.numel()}
        found["streamed"] = sum(place.layout.total for place in it.host.blocks)
        gather_objects(mesh.world, "all have run")
        found |= {**mappings(), "handles": handles()}
        gather_objects(mesh.world, "all have looked")
        expected = forward(whole, 2)
        lags = it.model.blocks[0].register_forward_pre_hook(lambda *_: time.sleep(0.3 * (env.rank in slow)))
        is_right.append(torch.equal(forward(it.model, 2), expected))
        lags.remove()
        it.host.meet = lagging(it.host, 0.2 * bool(slow))
        with it.stream.disabled():
            for model in (whole, it.model):
                model.blocks[1].attn2.to_v.weight.mul_(1.5)
        is_right.append(right(it, whole))
        state = it.model.state_dict()
        is_right.append(all(torch.equal(state[name], tensor) for name, tensor in whole.state_dict().items()))
        is_right.append(all(is_within(parameter, it.host.memory) for parameter in it.model.blocks.parameters()))
        del it, state, model
        gc.collect()
        found["left"] = mappings()["Size"] + handles()
    logging.getLogger("wan_dist").removeHandler(warnings)
    return {**found, "right": is_right, "warnings": warnings.texts}


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """Four ranks that stream a transformer of some 35 MB; and a small one on another mesh, and where one of them must
    have a copy of its own."""
    folder = tmp_path_factory.mktemp("transformers")
    config = {"num_attention_heads": 8, "attention_head_dim": 32, "ffn_dim": 1024, "num_layers": 8}
    large, small = save_transformer(folder / "large", **config), save_transformer(folder / "small", num_layers=3)
    cases = {
        "four": (large, {"ulysses": 4}),
        "halves": (small, {"tp": 2, "cfg": 2}, (), (2, 3)),
        "one apart": (small, {"ulysses": 4}, (2,)),
    }
    return dict(zip(cases, run_cases(4, shared, list(cases.values())), strict=True))


def test_four_ranks_of_a_machine_hold_one_copy_between_them(copies):
    ranks = copies["four"]
    host = ranks[0]["host"]
    assert 30e6 < host < 60e6 and all(rank["host"] == host for rank in ranks)
    assert all(rank["Rss"] >= 0.99 * host for rank in ranks)
    assert 0.99 * host <= sum(rank["Pss"] for rank in ranks) <= 1.1 * host
    assert [rank["filler"] for rank in ranks] == [True, False, False, False]
    assert all(rank["read"] == ranks[0]["read"] - rank["streamed"] for rank in ranks[1:])
    assert all(rank["handles"] == 0 and rank["left"] == 0 for rank in ranks)
    assert not any("wan_dist" in name for name in os.listdir("/dev/shm"))


def test_ranks_with_other_slices_have_another_copy(copies):
    ranks = copies["halves"]
    assert [rank["filler"] for rank in ranks] == [True, True, False, False]  # tp is fastest
    total = sum(rank["Pss"] for rank in ranks)
    assert 1.9 * ranks[0]["host"] <= total <= 2.1 * ranks[0]["host"] + 16 * 4096


def test_what_the_ranks_share_is_right_at_first_and_after_a_change(copies):
    assert {(name, rank["right"] == [True] * 5) for name, ranks in copies.items() for rank in ranks} == {
        (name, True) for name in copies
    }
    assert all(not rank["left"] for ranks in copies.values() for rank in ranks)


def test_a_rank_that_cannot_open_anothers_memory_has_a_copy_of_its_own_and_says_so(copies):
    ranks = copies["one apart"]
    assert [rank["filler"] for rank in ranks] == [True, False, True, False]
    assert [rank["Size"] > 0 for rank in ranks] == [True, True, False, True]
    first = ranks[0]["read"]
    rest = first - ranks[0]["streamed"]
    assert [rank["read"] for rank in ranks] == [first, rest, first, rest]
    assert [len(rank["warnings"]) for rank in ranks] == [0, 0, 1, 0]
    assert "cannot be shared with rank 0: this rank holds a copy of its own" in ranks[2]["warnings"][0]
    assert not any(rank["warnings"] for rank in copies["four"] + copies["halves"])
