"""A text encoder that the plan divides is run by all ranks together, from shards: the same embeddings, from half the
bytes. What the rank with the least room has decides for all."""

import gc
import json
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from support.ranks import frozen, run_cases, run_generation, run_ranks, text_encoder_divided
from support.sharded import CPU, mesh_of
from support.tiers import in_all
from wan_dist.pipeline import generate as screen
from wan_dist.pipeline import plan, text
from wan_dist.planning.footprint import Machine

FSDP = {"parallelism.fsdp.enabled": "on"}
BF16 = {"runtime.dtype": "bfloat16"}
# settings, and the number of shards of one replica
CASES = [
    ({"parallelism.ring": 2, **FSDP}, 2),
    ({"parallelism.ring": 2, **FSDP, **BF16}, 2),
    ({"parallelism.ring": 3, **FSDP}, 3),
    ({"parallelism.tp": 2, "parallelism.ulysses": 2, **FSDP}, 2),
    ({"parallelism.cfg": 2, "parallelism.ring": 2, **FSDP, "parallelism.fsdp.replicate": 2}, 2),
]


def generate_divided(env, config, divided: bool) -> dict[str, str]:
    with text_encoder_divided() if divided else nullcontext():
        return run_generation(env, config)


def runs(folder: Path, path: Path, requests: list[tuple[dict, bool]]) -> list[tuple[torch.Tensor, dict]]:
    """Latents and record for settings and whether the encoder is divided; all requests on equally many ranks."""
    configs = [
        frozen(folder, path, **{"parallelism.cfg": 1, "output.name": f"video{number}", **settings})
        for number, (settings, _) in enumerate(requests)
    ]
    (ranks,) = {int(config.runtime.ranks) for config in configs}
    cases = [(config, divided) for config, (_, divided) in zip(configs, requests, strict=True)]
    outputs = [by_rank[0] for by_rank in run_cases(ranks, generate_divided, cases)]
    return [
        (load_file(files["latents"])["latents"], json.loads(Path(files["record"]).read_text())) for files in outputs
    ]


def placement(record: dict) -> str:
    return next(row["placement"] for row in record["plan"] if row["component"] == "text_encoder")


def bytes_read(record: dict) -> list[int]:
    return [rank["bytes_read"].get("text_encoder", 0) for rank in record["ranks"]]


@pytest.mark.parametrize("ranks", [3, *in_all(2, 4)])
def test_it_gives_the_same_video_from_a_share_of_the_bytes_each(tmp_path, tiny, ranks):
    weights = load_file(next((tiny / "text_encoder").glob("*.safetensors"))).values()
    whole = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    cases = [case for case in CASES if torch.Size(
        [degree for key, degree in case[0].items() if key.count(".") == 1 and key.startswith("parallelism")]
    ).numel() == ranks]  # fmt: skip
    results = iter(runs(tmp_path, tiny, [(settings, how) for settings, _ in cases for how in (False, True)]))
    for settings, shards in cases:
        (latents, record), (shared_latents, shared_record) = next(results), next(results)
        assert placement(record) == "resident" and bytes_read(record) == [whole] + [0] * (ranks - 1)
        assert placement(shared_record) == "fsdp"
        assert torch.equal(shared_latents, latents), settings
        read = bytes_read(shared_record)
        assert sum(read) == whole * ranks // shards
        assert max(read) <= 1.1 * whole / shards, settings


def machine_with_uneven_ranks(env) -> Machine:
    with mesh_of(env, ulysses=env.world_size) as mesh, pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "free_host_memory", lambda: 100 + 10 * (env.rank - 1) ** 2)
        patch.setattr(plan, "machine_identity", lambda: "a" if env.rank < 2 else "b")
        return plan.common_machine(mesh, CPU, 5e9)


def test_every_rank_plans_for_the_least_that_any_has():
    assert run_ranks(3, machine_with_uneven_ranks) == [Machine("cpu", None, 100, 2)] * 3


def encoder_after_encoding(env, config) -> tuple[bool, bool]:
    """Whether any of the encoder is still gathered when it has run, and whether it is there when the experts load."""
    encoders, seen = [], []
    encode_prompts, load_experts = text.encode_prompts, screen.load_experts

    def watched_encode(encoder, *rest):
        encoded = encode_prompts(encoder, *rest)
        encoders.append(weakref.ref(encoder))
        seen.append(not all(isinstance(parameter, DTensor) for parameter in encoder.parameters()))
        return encoded

    def watched_load(*args):
        seen.append(encoders[0]() is not None)
        return load_experts(*args)

    with pytest.MonkeyPatch.context() as patch, text_encoder_divided():
        patch.setattr(text, "encode_prompts", watched_encode)
        patch.setattr(screen, "load_experts", watched_load)
        gc.disable()
        run_generation(env, config)
    return tuple(seen)


def test_it_is_never_kept_gathered_and_is_gone_before_the_experts_come(tmp_path, tiny):
    """Though the transformers' keys say to keep gathered, and name conditions that none of its modules meets."""
    keys = {"parallelism.fsdp.reshard_after_forward": False, "parallelism.fsdp.shard_conditions": ["is_block"]}
    config = frozen(tmp_path, tiny, **{"parallelism.cfg": 1, "parallelism.ring": 2, **FSDP, **keys})
    assert run_ranks(2, encoder_after_encoding, config) == [(False, False)] * 2
