"""The bytes that a plan counts, without reading weights, are those that the real model holds and reads on rank 0."""

import json
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from support.checkpoints import KINDS, TINY
from wan_dist.distributed.fsdp import kept_bytes
from wan_dist.distributed.mesh import AXES, build_mesh
from wan_dist.layers.attention_kernels import attention_kernel
from wan_dist.loading.checkpoint import open_checkpoint
from wan_dist.loading.components import match_image_encoder, match_text_encoder, match_transformer, match_vae
from wan_dist.loading.published import published
from wan_dist.loading.sizes import served_bytes
from wan_dist.loading.weights import Sharding, fill
from wan_dist.models.architecture import KEEP_FP32, transformer_tensors
from wan_dist.planning.weights import Stored, component_weights, weights_of

BF16, F32, CPU = torch.bfloat16, torch.float32, torch.device("cpu")
WAN_14B, A14B, SMALL = (f"Wan-AI/{name}-Diffusers" for name in ("Wan2.1-T2V-14B", "Wan2.2-T2V-A14B", "Wan2.1-T2V-1.3B"))


@contextmanager
def rank_0(*, tp: int = 1, shards: int = 1):
    """The mesh of rank 0 of `tp x shards` ranks, the others not there."""
    if tp * shards == 1:
        yield build_mesh(dict.fromkeys(AXES, 1), "cpu")
        return
    dist.init_process_group("fake", rank=0, world_size=tp * shards, store=FakeStore())
    try:
        yield build_mesh({**dict.fromkeys(AXES, 1), "tp": tp, "ring": shards}, "cpu")
    finally:
        dist.destroy_process_group()


def real_transformer(folder, *, tp: int, shards: int, dtype: torch.dtype) -> tuple[torch.nn.Module, int]:
    """The filled model of rank 0, and the bytes it read."""
    read: Counter[str] = Counter()
    with rank_0(tp=tp, shards=shards) as mesh:
        matched = match_transformer(
            open_checkpoint(folder), "transformer", mesh=mesh, kernel=attention_kernel("math"), dtype=dtype
        )
        sharding = Sharding(mesh.fsdp) if shards > 1 else None
        model = fill(matched.weights, device=CPU, sharding=sharding, bytes_read=read, component="transformer")
    return model, read["transformer"]


def flat_bytes(block: torch.nn.Module) -> int:
    """By hand: parameters of one dtype behind each other, each at the next multiple of 64."""
    ends: dict[torch.dtype, int] = {}
    for parameter in block.parameters():
        begin = (ends.get(parameter.dtype, 0) + 63) // 64 * 64
        ends[parameter.dtype] = begin + parameter.nbytes
    return sum(ends.values())


def planned(folder, name: str = "transformer", *, dtype: torch.dtype = BF16, **plan):
    weights = component_weights(open_checkpoint(folder), name, dtype_bytes=dtype.itemsize, **plan)
    assert weights is not None
    return weights


def without_files(folder, target: Path) -> Path:
    return shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))


@pytest.fixture(scope="module")
def divisible(checkpoints):
    """12 heads divide by all of 1 to 4; 50 features do so by few, and rows of 18 by no 4."""
    return checkpoints(heads=12, layers=2, ffn=50)


@pytest.mark.parametrize(
    ("tp", "shards", "dtype"),
    [(1, 1, F32), (4, 3, F32), *((tp, shards, BF16) for tp in (1, 2, 3, 4) for shards in (1, 2, 3))],
)
def test_transformer_is_what_rank_0_holds_and_reads(divisible, tmp_path, tp, shards, dtype):
    weights = planned(divisible, tp=tp, shards=shards, dtype=dtype)
    model, read = real_transformer(divisible, tp=tp, shards=shards, dtype=dtype)
    if shards == 1:
        assert (weights.total, weights.sharded) == (kept_bytes(model), kept_bytes(model))
        assert (weights.file_bytes, weights.sharded_file_bytes) == (read, read)
        assert weights.blocks == tuple(flat_bytes(block) for block in model.blocks)
        inside = sum(kept_bytes(block) for block in model.blocks)
        assert weights.outside == kept_bytes(model) - inside
        assert weights.largest_unit == max(weights.outside, *(kept_bytes(block) for block in model.blocks))
    else:
        assert (weights.sharded, weights.sharded_file_bytes) == (kept_bytes(model), read)
        alone = planned(divisible, tp=tp, dtype=dtype)
        assert alone.sharded == weights.total == alone.total
        assert (alone.blocks, alone.outside, alone.largest_unit) == (
            weights.blocks, weights.outside, weights.largest_unit,
        )  # fmt: skip
    bare = planned(without_files(divisible, tmp_path / "bare"), tp=tp, shards=shards, dtype=dtype)
    same = ("total", "sharded", "largest_unit", "blocks", "outside")
    assert [getattr(bare, field) for field in same] == [getattr(weights, field) for field in same]


def test_without_files_their_dtype_is_the_serving_one_unless_it_is_told(divisible, tmp_path):
    bare = without_files(divisible, tmp_path / "bare")
    in_fp32 = planned(divisible).file_bytes
    assert planned(divisible, dtype=F32).file_bytes == in_fp32 == planned(bare, dtype=F32).file_bytes
    assert planned(bare).file_bytes == in_fp32 // 2
    assert planned(bare, on_disk={"transformer": "F32"}).file_bytes == in_fp32


@pytest.mark.parametrize("kind", KINDS)
def test_image_to_video(checkpoints, kind):
    folder = checkpoints.of_images(kind)
    for tp, shards in ((1, 1), (2, 1), (2, 2)):
        model, read = real_transformer(folder, tp=tp, shards=shards, dtype=BF16)
        weights = planned(folder, tp=tp, shards=shards)
        assert (weights.sharded, weights.sharded_file_bytes) == (kept_bytes(model), read)


@pytest.mark.parametrize("published_names", [False, True])
def test_image_encoder(checkpoints, tmp_path, published_names):
    folder = checkpoints.of_images("wan2.1", published_names=published_names)
    weights = planned(folder, "image_encoder", dtype=F32, tp=2)  # which does not divide it
    assert (
        weights.total
        == weights.file_bytes
        == kept_bytes(fill(match_image_encoder(open_checkpoint(folder)), device=CPU))
    )
    assert len(weights.blocks) == 3
    assert planned(without_files(folder, tmp_path / "bare"), "image_encoder", dtype=F32, tp=2) == weights


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_text_encoder(tiny, tmp_path, dtype):
    model = fill(match_text_encoder(open_checkpoint(tiny), dtype=dtype), device=CPU)
    weights = planned(tiny, "text_encoder", dtype=dtype, tp=2)
    assert weights.total == kept_bytes(model)
    assert weights.file_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert weights.blocks == tuple(flat_bytes(block) for block in model.encoder.block)
    bare = planned(without_files(tiny, tmp_path / "bare"), "text_encoder", dtype=dtype)
    assert (bare.total, bare.blocks, bare.outside) == (weights.total, weights.blocks, weights.outside)


@pytest.mark.parametrize("names", [["shared.weight"], ["encoder.embed_tokens.weight"], None])
def test_a_tied_embedding_counts_once_under_any_name(tiny, tmp_path, names):
    folder = shutil.copytree(tiny, tmp_path / "tied")
    tensors = {}
    for file in (folder / "text_encoder").glob("*.safetensors*"):
        tensors |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    tied = ["shared.weight", "encoder.embed_tokens.weight"]
    embedding = next(tensors[name] for name in tied if name in tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in tied}
    save_file(tensors | {name: embedding.clone() for name in names or tied}, folder / "text_encoder/model.safetensors")
    assert planned(folder, "text_encoder") == planned(tiny, "text_encoder")


@pytest.mark.parametrize("kind", [None, "wan2.2 ti2v"])
@pytest.mark.parametrize("encoder", [True, False])
def test_vae(checkpoints, tmp_path, kind, encoder):
    folder = checkpoints.of_images(kind) if kind else checkpoints()
    weights = planned(folder, "vae", dtype=F32, encoder=encoder)
    model = fill(match_vae(open_checkpoint(folder), dtype=F32, encoder=encoder), device=CPU)
    assert weights.total == weights.file_bytes == weights.outside == kept_bytes(model)
    assert weights.blocks == ()
    assert planned(without_files(folder, tmp_path / "bare"), "vae", dtype=F32, encoder=encoder) == weights


def test_the_same_as_served_bytes(tiny):
    for name, islands in (("transformer", KEEP_FP32), ("text_encoder", ()), ("vae", ())):
        served = served_bytes(tiny / name, dtype_bytes=2, keep_fp32=islands)
        assert planned(tiny, name).total == served


def test_leftovers_that_the_class_does_not_load_are_not_counted(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "leftover")
    index = next((folder / "transformer").glob("*.index.json"))
    told = json.loads(index.read_text())
    name = "blocks.0.attn2.norm_added_q.weight"
    shard = folder / "transformer" / next(iter(told["weight_map"].values()))
    save_file(load_file(shard) | {name: torch.zeros(96)}, shard)
    told["weight_map"][name] = shard.name
    index.write_text(json.dumps(told))
    assert planned(folder) == planned(tiny)


def unknown(folder, name: str = "transformer") -> bool:
    return component_weights(open_checkpoint(folder), name, dtype_bytes=2) is None


def test_what_cannot_be_known_is_none(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "broken")
    first = min((folder / "transformer").glob("*.safetensors"))
    content = first.read_bytes()
    first.unlink()
    assert unknown(folder)  # a shard is missing
    first.write_bytes(content[:100])
    assert unknown(folder)  # truncated
    first.write_bytes(content)
    assert not unknown(folder)
    for file in (folder / "transformer").glob("*.safetensors*"):
        file.unlink()
    assert not unknown(folder)  # nothing is here: the config tells
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(bytes(1000))
    assert unknown(folder)  # a pickle
    for file in (folder / "vae").glob("*.safetensors*"):
        file.unlink()
    save_file({"blocks.0.w": torch.zeros(3)}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert unknown(folder, "vae")  # another class's
    assert unknown(folder, "image_encoder")  # not part of it


def test_an_index_alone_is_a_component_not_fetched_yet(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    assert list((folder / "transformer").glob("*.index.json"))
    assert planned(folder).total == planned(tiny).total


@pytest.mark.parametrize("change", [{"num_layers": "two"}, {"ffn_dim": -1}])
def test_a_config_that_is_none_is_unknown(tmp_path, change):
    folder = shutil.copytree(TINY, tmp_path / "odd")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert unknown(folder)


def test_classes_that_do_not_run_are_unknown(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "odd")
    index = folder / "model_index.json"
    told = json.loads(index.read_text())
    told["transformer"] = ["diffusers", "WanVACETransformer3DModel"]
    index.write_text(json.dumps(told))
    assert unknown(folder)


def test_the_figures_of_the_published_models():
    def weights(hub_id: str, name: str, dtype_bytes: int = 2, **plan):
        return component_weights(published(hub_id), name, dtype_bytes=dtype_bytes, **plan)

    def giga(nbytes: int) -> float:
        return round(nbytes / 1e9, 1)

    of_14b = weights(WAN_14B, "transformer", tp=1, shards=8)
    assert giga(of_14b.total) == 28.6
    assert {round(block / 1e6) for block in of_14b.blocks} == {703}
    assert len(of_14b.blocks) == 40
    assert of_14b.outside + sum(of_14b.blocks) - of_14b.total < 40 * 64 * 32
    assert giga(of_14b.sharded) == 3.6
    assert giga(of_14b.file_bytes) == 57.2
    assert giga(weights(A14B, "transformer_2").file_bytes) == 57.2
    assert giga(weights(A14B, "text_encoder").total) == giga(weights(A14B, "text_encoder").file_bytes) == 11.4
    assert giga(weights(SMALL, "text_encoder").file_bytes) == 22.7
    assert giga(weights(SMALL, "vae", 4).file_bytes) == 0.5


def test_a_block_of_another_list_is_outside():
    shape = Stored((10, 3), "F32")
    names = ("blocks.0.w", "blocks.10.w", "blocks.2.w", "token_refiner.blocks.0.w", "xblocks.0.w", "blocks.a.w", "w")
    weights = weights_of(dict.fromkeys(names, shape), dtype_bytes=4)
    assert weights.blocks == (120, 120, 120)
    assert weights.outside == weights.largest_unit == 4 * 120
    none = weights_of(dict.fromkeys(names, shape), dtype_bytes=4, block_list=None)
    assert (none.blocks, none.outside, none.largest_unit) == ((), 7 * 120, 7 * 120)


def test_blocks_in_the_order_of_their_numbers():
    table = {f"blocks.{n}.w": Stored((n + 1,), "F32") for n in (10, 2, 0)}
    assert weights_of(table, dtype_bytes=4).blocks == (4, 12, 44)


def test_a_buffer_for_each_dtype_each_tensor_at_a_multiple_of_64():
    table = {
        "blocks.0.a": Stored((5,), "F32"),  # bf16, from 0
        "blocks.0.norm2.weight": Stored((3,), "BF16"),  # fp32, from 0
        "blocks.0.b": Stored((33,), "BF16"),  # bf16, from 64
        "blocks.0.ids": Stored((2,), "I64"),  # its own
        "blocks.0.c": Stored((1,), "F8_E4M3"),  # bf16, from 192
        "blocks.0.norm2.bias": Stored((3,), "BF16"),  # fp32, from 64
    }
    weights = weights_of(table, dtype_bytes=2, keep_fp32=KEEP_FP32)
    assert weights.blocks == ((192 + 2) + (64 + 12) + 16,)
    assert weights.total == weights.largest_unit == 10 + 12 + 66 + 16 + 2 + 12
    assert weights.file_bytes == 20 + 6 + 66 + 16 + 1 + 6


def test_scalars_and_empty_tensors():
    weights = weights_of({"s": Stored((), "F32"), "e": Stored((0, 7), "F32")}, dtype_bytes=2, shards=4)
    assert (weights.total, weights.sharded, weights.file_bytes, weights.blocks) == (2, 2, 4, ())


def test_rank_0_keeps_the_most():
    table = {name: Stored(shape, "F32") for name, shape in transformer_tensors({"num_layers": 1}).items()}
    for shards in (2, 3, 7):
        weights = weights_of(table, dtype_bytes=4, shards=shards)
        assert shards * weights.sharded >= weights.total
