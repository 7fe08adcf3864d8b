"""Safetensors files that are cut short, mixed up or lying are refused by file and tensor before anything is read."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from wan_dist.loading.tensor_files import CheckpointError, read_component, read_exactly, read_header, weight_files

SINGLE = "diffusion_pytorch_model.safetensors"
SHARDS = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
A, B = torch.arange(6, dtype=torch.float32).view(2, 3), torch.ones(4, dtype=torch.bfloat16)


@pytest.fixture
def single(tmp_path):
    save_file({"a": A, "b": B}, tmp_path / SINGLE, metadata={"format": "pt"})
    return tmp_path / SINGLE


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": A}, tmp_path / SHARDS[0])
    save_file({"b": B}, tmp_path / SHARDS[1])
    write_index(tmp_path, {"a": SHARDS[0], "b": SHARDS[1]})
    return tmp_path


def write_index(folder, weight_map) -> None:
    (folder / f"{SINGLE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(folder, header: bytes | dict, data: bytes = bytes(16)):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + data)
    return folder / SINGLE


def refusal(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_component(folder)
    return str(caught.value)


def test_a_sound_file_is_described_as_it_is(single):
    entries = read_header(single)
    assert {name: (e.dtype, e.shape, e.nbytes) for name, e in entries.items()} == {
        "a": ("F32", (2, 3), 24),
        "b": ("BF16", (4,), 8),
    }
    buffer = bytearray(24)
    with single.open("rb") as stream:
        read_exactly(stream.fileno(), memoryview(buffer), entries["a"].start, entries["a"])
    assert torch.equal(torch.frombuffer(buffer, dtype=torch.float32).view(2, 3), A)


def test_shards_are_one_component(sharded):
    entries = read_component(sharded)
    assert {name: entry.file.name for name, entry in entries.items()} == {"a": SHARDS[0], "b": SHARDS[1]}


def test_transformers_file_name_and_a_scalar_and_an_empty_tensor(tmp_path):
    save_file({"s": torch.tensor(3.0), "e": torch.empty(0, 5)}, tmp_path / "model.safetensors")
    entries = read_component(tmp_path)
    assert (entries["s"].shape, entries["s"].nbytes, entries["e"].shape, entries["e"].nbytes) == ((), 4, (0, 5), 0)


@pytest.mark.parametrize("keep", [0, 4, 8, 20])
def test_a_file_cut_in_its_header(single, keep):
    os.truncate(single, keep)
    assert refusal(single.parent) == f"{single}: truncated or not a safetensors file ({keep} bytes)"


def test_a_file_cut_in_its_data_names_the_tensor(single):
    os.truncate(single, single.stat().st_size - 1)
    message = refusal(single.parent)
    assert message.startswith(f"{single}: truncated: tensor '")
    assert f"the file has {single.stat().st_size}" in message


def test_a_file_that_is_cut_while_it_is_read(single):
    entry = read_header(single)["a"]
    with single.open("rb") as stream:
        os.truncate(single, entry.start + 5)
        with pytest.raises(CheckpointError, match=f"{SINGLE}: ends in the middle of tensor 'a'"):
            read_exactly(stream.fileno(), memoryview(bytearray(24)), entry.start, entry)


def test_a_shard_is_missing(sharded):
    (sharded / SHARDS[1]).unlink()
    assert refusal(sharded) == (
        f"{sharded / SHARDS[1]}: this shard is missing; {SINGLE}.index.json places tensor 'b' in it"
    )


def test_a_tensor_is_absent_from_its_shard(sharded):
    write_index(sharded, {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]})
    assert refusal(sharded) == f"{sharded / SHARDS[1]}: tensor 'c' is missing; the index places it there"


def test_the_index_places_a_tensor_elsewhere(sharded):
    write_index(sharded, {"a": SHARDS[1], "b": SHARDS[0]})
    assert refusal(sharded) == f"{sharded / SHARDS[0]}: tensor 'a' is here, but the index places it in {SHARDS[1]}"


def test_a_tensor_is_in_two_shards(sharded):
    save_file({"a": A, "b": B}, sharded / SHARDS[1])
    assert refusal(sharded) == f"{sharded / SHARDS[1]}: tensor 'a' is there twice, also in {SHARDS[0]}"


def test_a_tensor_is_twice_in_one_header(tmp_path):
    spec = b'{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
    file = write_raw(tmp_path, b'{"a":' + spec + b',"a":' + spec + b"}")
    assert refusal(tmp_path) == f"{file}: tensor 'a' is there twice"


@pytest.mark.parametrize("offsets", [[0, 12], [0, 20], [16, 0]])
def test_offsets_that_do_not_fit_the_shape(tmp_path, offsets):
    file = write_raw(tmp_path, {"a": {"dtype": "F32", "shape": [4], "data_offsets": offsets}})
    assert refusal(tmp_path).startswith(f"{file}: tensor 'a' should take 16 bytes")


@pytest.mark.parametrize(
    "spec",
    [
        {"dtype": "F32", "shape": [4]},
        {"dtype": "F3", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": None, "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0]},
        {"dtype": "F32", "shape": [4], "data_offsets": ["0", "16"]},
        {"dtype": "F32", "shape": [4], "data_offsets": [None, 16]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]},
        [],
        "F32",
    ],
)
def test_header_entries_that_make_no_sense(tmp_path, spec):
    file = write_raw(tmp_path, {"a": spec})
    assert refusal(tmp_path).startswith(f"{file}: tensor 'a'")


@pytest.mark.parametrize("header", [b"{]", b"\xff\xfe{}", b"[]", b"12", b'"text"'])
def test_headers_that_are_no_table(tmp_path, header):
    file = write_raw(tmp_path, header)
    assert refusal(tmp_path).startswith(f"{file}: ")


def test_a_header_that_claims_gigabytes(tmp_path):
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    assert "truncated or not a safetensors file" in refusal(tmp_path)


def test_pickles_are_never_loaded(tmp_path):
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"x")
    message = refusal(tmp_path)
    assert "diffusion_pytorch_model.bin" in message
    assert "only pickled weights" in message


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert refusal(tmp_path).startswith(f"{tmp_path}: no safetensors file")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "."])
def test_an_index_must_not_leave_its_folder(tmp_path, shard):
    write_index(tmp_path, {"a": shard})
    message = refusal(tmp_path)
    assert "'a'" in message
    assert str(tmp_path) in message


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": []}']
)
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / f"{SINGLE}.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: not a safetensors index"):
        weight_files(tmp_path)


def test_two_tensors_on_the_same_bytes(tmp_path):
    specs = {name: {"dtype": "F32", "shape": [3], "data_offsets": at} for name, at in (("a", [0, 12]), ("b", [4, 16]))}
    write_raw(tmp_path, specs)
    assert "tensors 'a' and 'b' lie on the same bytes" in refusal(tmp_path)
