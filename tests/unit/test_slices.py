"""Slices of checkpoint tensors: the elements torch would cut out, read with the slice's bytes and no others."""

import os
import random
from itertools import pairwise
from math import prod

import pytest
import torch
from safetensors.torch import save_file

from wan_dist.distributed.fsdp import shard_rows
from wan_dist.layers.weight_loader import WeightLoader, capture_weight_loaders, weight_loader, whole_loader
from wan_dist.loading.slices import SliceReader, contiguous_runs, rows_within
from wan_dist.loading.tensor_files import CheckpointError, read_header

DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def cut(tensor: torch.Tensor, ranges) -> torch.Tensor:
    return tensor[tuple(slice(begin, end) for begin, end in ranges)] if tensor.ndim else tensor


def random_ranges(shape, rng: random.Random):
    ranges = []
    for size in shape:
        begin, end = sorted((rng.randint(0, size), rng.randint(0, size)))
        ranges.append(rng.choice([(0, size), (0, size), (begin, end), (begin, min(begin + 1, size))]))
    return tuple(ranges)


def random_cases(count: int, seed: int):
    """`(shape, ranges)` of tensors of 0 to 5 dims; every third without empty dims."""
    rng = random.Random(seed)
    for n in range(count):
        shape = tuple(rng.choice([1, 2, 3, 5] if n % 3 else [0, 1, 2, 4]) for _ in range(n % 6))
        yield shape, random_ranges(shape, rng)


def numbered(shape, dtype: torch.dtype) -> torch.Tensor:
    count = torch.arange(prod(shape)).view(shape) % 120
    return (count % 2 == 0) if dtype is torch.bool else count.to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    as_bytes = (x.contiguous().view(-1).view(torch.uint8) for x in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*as_bytes)


def test_runs_are_the_slices_elements_in_order_and_as_few_as_can_be():
    for shape, ranges in random_cases(600, 0):
        runs = list(contiguous_runs(shape, ranges))
        found = [first + n for first, count in runs for n in range(count)]
        elements = cut(torch.arange(prod(shape)).view(shape), ranges).flatten().tolist()
        assert found == elements, (shape, ranges)
        gaps = sum(after - before != 1 for before, after in pairwise(elements))
        assert len(runs) == (gaps + 1 if elements else 0), (shape, ranges)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_slice_is_torchs_and_exactly_its_bytes_are_read(tmp_path, dtype):
    cases = list(random_cases(48, DTYPES.index(dtype)))
    tensors = {str(n): numbered(shape, dtype) for n, (shape, _) in enumerate(cases)}
    save_file(tensors, tmp_path / "model.safetensors")
    entries = read_header(tmp_path / "model.safetensors")
    with SliceReader() as reader:
        for n, (shape, ranges) in enumerate(cases):
            before = reader.bytes_read
            found = reader.read(entries[str(n)], ranges)
            expected = cut(tensors[str(n)], ranges)
            assert same_bits(found, expected), (shape, ranges)
            assert found.is_contiguous()
            assert found.storage_offset() == 0
            assert reader.bytes_read - before == expected.numel() * dtype.itemsize
            assert found.untyped_storage().nbytes() == expected.numel() * dtype.itemsize


def test_files_are_opened_once_and_closed_at_the_end(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    entry = read_header(tmp_path / "model.safetensors")["a"]
    before = len(os.listdir("/proc/self/fd"))
    with SliceReader() as reader:
        for _ in range(3):
            reader.read(entry, ((1, 2),))
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("ranges", [((0, 8), (0, 8)), ((7, 8), (0, 8)), ((0, 8), (7, 8))])
def test_a_file_that_ends_early_names_file_and_tensor(tmp_path, ranges):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(8, 8)}, file)
    entry = read_header(file)["a"]
    os.truncate(file, file.stat().st_size - 1)
    with SliceReader() as reader:
        assert reader.read(entry, ((0, 7), (0, 8))).sum() == 56
        with pytest.raises(CheckpointError, match=r"model\.safetensors: ends in the middle of tensor 'a'"):
            reader.read(entry, ranges)
    os.unlink(file)
    with SliceReader() as reader, pytest.raises(OSError, match=r"model\.safetensors"):
        reader.read(entry, ranges)


def test_rows_within_are_rows_of_the_slice():
    rng, tensor = random.Random(1), torch.arange(7 * 3 * 4).view(7, 3, 4)
    for _ in range(100):
        ranges = random_ranges(tensor.shape, rng)
        mine = cut(tensor, ranges)
        begin, end = sorted((rng.randint(0, len(mine)), rng.randint(0, len(mine))))
        assert torch.equal(cut(tensor, rows_within(ranges, begin, end)), mine[begin:end])
    for begin, end in ((0, 4), (-1, 2), (2, 1)):
        with pytest.raises(AssertionError):
            rows_within(((2, 5), (0, 4)), begin, end)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 8, 13, 40, 1536])
@pytest.mark.parametrize("shards", [1, 2, 3, 4, 7, 8, 16])
def test_shard_rows_are_torchs_chunks_and_the_last_may_be_empty(rows, shards):
    chunks = torch.arange(rows).chunk(shards) if rows else ()
    for shard in range(shards):
        begin, end = shard_rows(rows, shards, shard)
        expected = chunks[shard] if shard < len(chunks) else torch.arange(0)
        assert torch.arange(rows)[begin:end].tolist() == expected.tolist()
        assert 0 <= begin <= end <= rows


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_loader_cuts_in_memory_what_is_read_from_the_file(tmp_path, dim):
    tensor = numbered((4, 6, 5), torch.bfloat16)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    entry = read_header(tmp_path / "model.safetensors")["a"]
    with SliceReader() as reader:
        for begin, end in ((0, tensor.shape[dim]), (1, 3), (2, 2)):
            loader = WeightLoader((4, 6, 5), dim, begin, end)
            assert same_bits(loader(tensor), reader.read(entry, loader.ranges()))
    for shape in ((4, 6), (6, 4, 5), (4, 6, 5, 1), (4, 3, 5), ()):
        with pytest.raises(ValueError, match=r"checkpoint's is \(4, 6, 5\)"):
            loader(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 4), (1, 1, 1, 1), ()])
def test_the_default_loader_is_all_of_it(tmp_path, shape):
    tensor = numbered(shape, torch.float32)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    with SliceReader() as reader:
        entry = read_header(tmp_path / "model.safetensors")["a"]
        assert same_bits(reader.read(entry, whole_loader(tensor).ranges()), tensor)
    assert same_bits(whole_loader(tensor)(tensor), tensor)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 6)
        self.tied = self.linear
        self.register_buffer("table", torch.ones(5))
        self.linear.weight.weight_loader = WeightLoader((12, 4), 0, 6, 12)


def test_loaders_are_found_through_wrappers_that_replace_the_parameters():
    model = Model()
    loaders = capture_weight_loaders(model)
    assert set(loaders) == {"linear.weight", "linear.bias", "tied.weight", "tied.bias", "table"}
    assert loaders["linear.weight"] is model.linear.weight.weight_loader
    for parameter in ("weight", "bias"):
        setattr(model.linear, parameter, torch.nn.Parameter(torch.zeros(1)))  # as FSDP does
    for module in (model, torch.nn.DataParallel(model), torch.nn.DataParallel(torch.nn.DataParallel(model))):
        assert weight_loader(module, "linear.weight").ranges() == ((6, 12), (0, 4))
        assert weight_loader(module, "tied.weight").ranges() == ((6, 12), (0, 4))
        assert weight_loader(module, "linear.bias").ranges() == ((0, 6),)
        assert weight_loader(module, "table").ranges() == ((0, 5),)
        with pytest.raises(KeyError, match="absent"):
            weight_loader(module, "absent")


def test_loaders_that_were_not_captured_are_an_error_that_names_the_class():
    with pytest.raises(LookupError, match="Model: its weight loaders were not captured"):
        weight_loader(Model(), "linear.weight")
    with pytest.raises(LookupError, match="DataParallel"):
        weight_loader(torch.nn.DataParallel(Model()), "linear.weight")
