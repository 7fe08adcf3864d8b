"""How much a component takes once served, told from its headers: every shard once, one variant, the serving dtype."""

import json
import logging
import os

import pytest
import torch
from safetensors.torch import save_file

from support.checkpoints import WAN_SHAPES
from wan_dist.loading.sizes import served_bytes

STEM = "diffusion_pytorch_model"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def write(folder, name: str, elements: int = 10, dtype: torch.dtype = F32, tensor: str = "w") -> None:
    save_file({tensor: torch.zeros(elements, dtype=dtype)}, folder / name)


def write_index(folder, weight_map: dict[str, str], name: str = f"{STEM}.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_shards(folder, sizes: list[int], stem: str = STEM) -> list[str]:
    names = [f"{stem}-{n:05}-of-{len(sizes):05}.safetensors" for n in range(1, len(sizes) + 1)]
    for n, (name, size) in enumerate(zip(names, sizes, strict=True)):
        write(folder, name, size, tensor=f"w{n}")
    return names


def served(folder, dtype_bytes: int = 2, keep_fp32=()) -> int | None:
    return served_bytes(folder, dtype_bytes=dtype_bytes, keep_fp32=keep_fp32)


@pytest.mark.parametrize("stored", [F32, F16, BF16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype_bytes", [2, 4])
def test_the_serving_dtype_counts_not_the_files(tmp_path, stored, dtype_bytes):
    write(tmp_path, f"{STEM}.safetensors", 10, stored)
    assert served(tmp_path, dtype_bytes) == 10 * dtype_bytes


@pytest.mark.parametrize(("stored", "size"), [(torch.int64, 8), (torch.int32, 4), (torch.uint8, 1), (torch.bool, 1)])
def test_whole_numbers_keep_their_own(tmp_path, stored, size):
    write(tmp_path, f"{STEM}.safetensors", 10, stored)
    assert served(tmp_path) == 10 * size


def test_fp32_islands_by_whole_parts_of_the_name(tmp_path):
    names = {"norm1.weight": 4, "blocks.0.norm1.bias": 4, "blocks.0.norm10.weight": 2, "xnorm1": 2, "table": 4, "w": 2}
    save_file({name: torch.zeros(8, dtype=BF16) for name in names}, tmp_path / f"{STEM}.safetensors")
    assert served(tmp_path, 2, ["norm1", "table"]) == 8 * sum(names.values())


def test_a_scalar_an_empty_tensor_and_transformers_file_name(tmp_path):
    save_file({"s": torch.tensor(1.0), "e": torch.empty(0, 7)}, tmp_path / "model.safetensors")
    assert served(tmp_path) == 2


def test_the_shards_that_the_index_names_and_no_stray_one(tmp_path):
    names = write_shards(tmp_path, [10, 20])
    write(tmp_path, f"{STEM}-00003-of-00003.safetensors", 1000, tensor="stray")
    write_index(tmp_path, {"w0": names[0], "w1": names[1]})
    assert served(tmp_path) == 60


def test_a_variant_beside_the_plain_file_is_not_counted(tmp_path):
    write(tmp_path, f"{STEM}.safetensors", 10, F32)
    write(tmp_path, f"{STEM}.fp16.safetensors", 10, F16)
    assert served(tmp_path) == 20


def test_a_sharded_variant_beside_plain_shards_is_not_counted(tmp_path):
    names, fp16 = write_shards(tmp_path, [10, 20]), write_shards(tmp_path, [10, 20], f"{STEM}.fp16")
    write_index(tmp_path, {"w0": names[0], "w1": names[1]})
    write_index(tmp_path, {"w0": fp16[0], "w1": fp16[1]}, f"{STEM}.safetensors.index.fp16.json")
    assert served(tmp_path) == 60


@pytest.mark.parametrize("variants", [["fp16"], ["fp16", "bf16"], ["non_ema", "fp16", "fp32"]])
def test_variants_alone_are_counted_once(tmp_path, variants):
    for variant in variants:
        write(tmp_path, f"{STEM}.{variant}.safetensors", 10, F16)
    assert served(tmp_path) == 20


@pytest.mark.parametrize("variants", [["fp16"], ["fp16", "bf16"]])
def test_sharded_variants_alone_are_counted_once_with_all_their_shards(tmp_path, variants):
    for variant in variants:
        names = write_shards(tmp_path, [10, 20], f"{STEM}.{variant}")
        write_index(tmp_path, {"w0": names[0], "w1": names[1]}, f"{STEM}.safetensors.index.{variant}.json")
    assert served(tmp_path) == 60


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth"])
def test_pickles_count_as_long_as_they_are(tmp_path, suffix):
    (tmp_path / f"{STEM}.{suffix}").write_bytes(bytes(1234))
    (tmp_path / f"{STEM}.fp16.{suffix}").write_bytes(bytes(617))
    assert served(tmp_path) == 1234


def test_shards_of_pickles_are_one_variant(tmp_path):
    for n in (1, 2):
        (tmp_path / f"pytorch_model-0000{n}-of-00002.bin").write_bytes(bytes(100 * n))
    assert served(tmp_path) == 300


def test_safetensors_win_over_pickles(tmp_path):
    (tmp_path / f"{STEM}.bin").write_bytes(bytes(9999))
    write(tmp_path, f"{STEM}.safetensors", 10)
    assert served(tmp_path) == 20


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0[]" + bytes(30), b"\x10" + bytes(7)])
def test_a_header_that_cannot_be_read_counts_as_long_as_the_file_with_a_warning(tmp_path, caplog, content):
    names = write_shards(tmp_path, [10, 20])
    (tmp_path / names[1]).write_bytes(content)
    write_index(tmp_path, {"w0": names[0], "w1": names[1]})
    with caplog.at_level(logging.WARNING):
        assert served(tmp_path) == 20 + len(content)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert names[1] in caplog.text


def test_a_missing_shard_is_unknown_not_smaller(tmp_path):
    names = write_shards(tmp_path, [10, 20])
    write_index(tmp_path, {"w0": names[0], "w1": names[1]})
    os.unlink(tmp_path / names[1])
    assert served(tmp_path) is None


def test_nothing_is_unknown(tmp_path):
    assert served(tmp_path) is None
    assert served(tmp_path / "absent") is None
    (tmp_path / "config.json").write_text("{}")
    assert served(tmp_path) is None


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_a_real_component_in_fp32_is_the_data_of_its_file(component):
    (file,) = (WAN_SHAPES / component).glob("*.safetensors")
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(header))
    elements = sum(torch.Size(entry["shape"]).numel() for name, entry in entries.items() if name != "__metadata__")
    assert served(WAN_SHAPES / component, 4) == 4 * elements
    assert served(WAN_SHAPES / component, 2) == 2 * elements
