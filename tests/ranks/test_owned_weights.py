"""What each rank owns of a checkpoint: put together over the mesh it is the checkpoint, bit for bit, under tensor
parallelism, FSDP and both; the fp32 islands stay fp32."""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from support.ranks import run_cases
from support.sharded import image_branch, load, local, match, mesh_of, save_transformer
from support.tiers import in_all
from wan_dist.layers.weight_loader import weight_loader

ISLANDS = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}
BF16 = torch.bfloat16

# heads, feed-forward width and image branch of the models; 100 divides by neither 3 nor 8, and 64 rows not by 3
MODELS = {
    "four heads": {},
    "six heads": {"num_attention_heads": 6, "ffn_dim": 100},
    "image": image_branch(4),
    "six heads, image": {**image_branch(6), "ffn_dim": 100},
}
# model, serving dtype, degrees; `replicas` of HSDP
CASES = [
    ("four heads", torch.float32, {"tp": 2}),
    ("six heads", BF16, {"ring": 3}),
    ("image", BF16, {"tp": 2, "ulysses": 2}),
    ("six heads", BF16, {"cfg": 2, "ring": 2, "replicas": 2}),
    ("six heads, image", BF16, {"tp": 3, "ulysses": 2}),
    *in_all(
        ("six heads", torch.float32, {"tp": 3}),
        ("four heads", torch.float32, {"tp": 2, "ulysses": 2}),
        ("image", torch.float32, {"tp": 2, "ulysses": 2}),
        ("four heads", torch.float32, {"cfg": 2, "ring": 2}),
        ("six heads", torch.float32, {"tp": 3, "ulysses": 2}),
        ("four heads", torch.float32, {"tp": 2, "cfg": 2, "ulysses": 2, "replicas": 2}),
        ("image", BF16, {"tp": 2, "cfg": 2, "ulysses": 2, "replicas": 2}),
        ("six heads", torch.float32, {"tp": 2, "ulysses": 4}),
    ),
]


@dataclass(frozen=True)
class Owned:
    """One rank's parameters by name, with the slices that tensor parallelism gave it, and its place."""

    parameters: dict[str, tuple[torch.Tensor, tuple[tuple[int, int], ...]]]
    shard: int
    tp: int


def owned(env, folder, dtype, degrees) -> Owned:
    with mesh_of(env, **degrees) as mesh:
        model = load(mesh, match(mesh, folder, dtype))
        parameters = {
            name: (local(parameter).clone(), weight_loader(model, name).ranges())
            for name, parameter in model.named_parameters()
        }
        return Owned(parameters, mesh.fsdp.shard.rank if mesh.fsdp else 0, mesh["tp"].rank)


def together(ranks: list[Owned], name: str, shape: torch.Size) -> torch.Tensor:
    """The tensor: the rows of the shards one below the other, the tensor-parallel slices side by side. Ranks that are
    replicas of each other must hold the same."""
    held: dict[tuple[int, int], torch.Tensor] = {}
    slices: dict[int, tuple] = {}
    for rank in ranks:
        part, ranges = rank.parameters[name]
        assert torch.equal(held.setdefault((rank.tp, rank.shard), part), part), f"{name}: replicas differ"
        assert slices.setdefault(rank.tp, ranges) == ranges
    whole = torch.full(shape, torch.nan, dtype=next(iter(held.values())).dtype)
    for tp, ranges in slices.items():
        rows = torch.cat([held[place] for place in sorted(held) if place[0] == tp])
        target = whole[tuple(slice(*cut) for cut in ranges)]
        assert rows.shape == target.shape, f"{name}: {tuple(rows.shape)} for {ranges}"
        target.copy_(rows)
    return whole


def checkpoint(folder) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    return {name: save_transformer(folder / name, **config) for name, config in MODELS.items()}


def ranks_of(degrees: dict[str, int]) -> int:
    return torch.Size([degree for axis, degree in degrees.items() if axis != "replicas"]).numel()


@pytest.mark.parametrize("ranks", sorted({ranks_of(degrees) for _, _, degrees in CASES}))
def test_all_ranks_together_own_the_checkpoint(models, ranks):
    cases = [case for case in CASES if ranks_of(case[2]) == ranks]
    results = run_cases(ranks, owned, [(models[model], dtype, degrees) for model, dtype, degrees in cases])
    for (model, dtype, degrees), by_rank in zip(cases, results, strict=True):
        tensors = checkpoint(models[model])
        assert by_rank[0].parameters.keys() == tensors.keys()
        for name, tensor in tensors.items():
            wanted = torch.float32 if ISLANDS & set(name.split(".")) else dtype
            found = together(by_rank, name, tensor.shape)
            assert found.dtype == wanted, (model, degrees, name)
            assert torch.equal(found, tensor.to(wanted)), (model, degrees, name)
        sizes = {name: [rank.parameters[name][0].numel() for rank in by_rank] for name in tensors}
        shards = max(rank.shard for rank in by_rank) + 1
        if shards > 1:  # a table of one row: all of it on the first shard, nothing on the others
            assert {bool(size) for size in sizes["scale_shift_table"]} == {True, False}
        if degrees.get("tp", 1) > 1:
            assert sum(sizes["blocks.0.ffn.net.0.proj.weight"]) < ranks * tensors[
                "blocks.0.ffn.net.0.proj.weight"].numel()  # fmt: skip
