"""Where streamed blocks live: an aligned buffer per block and dtype, in shared memory, read straight from files."""

import gc
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from support.streaming import Block, Stack, is_within, match_stack, noise, save_stack, stream_one, whole_stack
from wan_dist.distributed.mesh import Axis
from wan_dist.loading.slices import SliceReader
from wan_dist.loading.tensor_files import read_header
from wan_dist.loading.weights import HostTensors, fill, match_weights
from wan_dist.offload import host_blocks
from wan_dist.offload.host_blocks import BlockLayout, HostBlocks, block_layout, shared_memory
from wan_dist.offload.layerwise import host_tensors, streamed_blocks

CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16
ONE = Axis("alone")


class Odd(torch.nn.Module):
    """Two dtypes, odd sizes, a scalar, empty tensors, and a parameter under two names."""

    def __init__(self, rows: int = 3) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(rows, 5))
        self.rounded = torch.nn.Parameter(torch.zeros(7, dtype=BF16))
        self.scalar = torch.nn.Parameter(torch.zeros(()))
        self.empty = torch.nn.Parameter(torch.zeros(0, 4))
        self.inner = torch.nn.Linear(33, 1)
        self.tied = self.inner
        self.one = torch.nn.Parameter(torch.zeros(1, dtype=BF16))
        self.last = torch.nn.Parameter(torch.zeros(4, 0))

    def forward(self) -> torch.Tensor:
        return self.tied.weight.clone()


def layouts(*rows: int) -> list[BlockLayout]:
    return [block_layout(Odd(count)) for count in rows]


def test_tensors_lie_at_multiples_of_64_bytes_and_buffers_end_where_the_last_one_does():
    with torch.device("meta"):
        found = block_layout(Odd())
    places = {name: (span.dtype, span.begin) for name, span in found.spans.items()}
    assert places == {
        "a": (F32, 0),
        "rounded": (BF16, 0),
        "scalar": (F32, 64),
        "empty": (F32, 128),
        "one": (BF16, 64),
        "last": (F32, 128),
        "inner.weight": (F32, 128),
        "inner.bias": (F32, 320),
    }
    assert {name: tuple(span.shape) for name, span in found.spans.items()} == {
        name: tuple(parameter.shape) for name, parameter in Odd().named_parameters()
    }
    assert found.nbytes == {F32: 324, BF16: 66}
    assert found.total == 390
    assert found == block_layout(Odd())


def test_a_block_without_weights_has_no_buffers():
    empty = block_layout(torch.nn.Identity())
    assert (empty.spans, empty.nbytes, empty.total) == ({}, {}, 0)
    host = HostBlocks([empty, *layouts(3)], ONE, "it")
    assert host.blocks[0].buffers == {} and host.blocks[1].buffers[F32].numel() == 324


def test_every_tensor_of_every_block_has_aligned_memory_of_its_own():
    host = HostBlocks(layouts(3, 1001, 1), ONE, "it")
    assert host.is_filler
    by_block = [block.tensors() for block in host.blocks]
    for number, tensors in enumerate(by_block):
        for index, tensor in enumerate(tensors.values()):
            tensor.fill_(10 * number + index)
    for number, (block, tensors) in enumerate(zip(host.blocks, by_block, strict=True)):
        assert {dtype: buffer.numel() for dtype, buffer in block.buffers.items()} == block.layout.nbytes
        assert block.buffers[F32].data_ptr() % os.sysconf("SC_PAGE_SIZE") == 0
        for index, (name, tensor) in enumerate(tensors.items()):
            assert tensor.dtype == block.layout.spans[name].dtype
            assert tensor.data_ptr() % 64 == 0
            assert is_within(tensor, host.memory) and is_within(tensor, block.buffers[tensor.dtype])
            assert torch.all(tensor == 10 * number + index), (number, name)


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("/memfd:wan_dist blocks")


def test_memory_of_one_rank_is_zeroed_mapped_once_and_gone_with_its_last_tensor():
    gc.collect()
    maps, handles = mapped(), len(os.listdir("/proc/self/fd"))
    memory, is_filler = shared_memory(100_001, ONE, "it")
    assert is_filler and memory.shape == (100_001,) and memory.dtype == torch.uint8 and not memory.any()
    part = memory[5000:5010]
    assert mapped() == maps + 1 and len(os.listdir("/proc/self/fd")) == handles
    del memory
    part.fill_(1)
    assert mapped() == maps + 1
    del part
    assert mapped() == maps
    nothing, _ = shared_memory(0, ONE, "it")
    assert nothing.shape == (0,)


@pytest.mark.parametrize("broken", ["_anonymous_file", "_mapped"])
def test_where_memory_cannot_be_shared_it_is_a_ranks_own(monkeypatch, broken):
    monkeypatch.setattr(host_blocks, broken, lambda *_args: None)
    memory, is_filler = shared_memory(1000, ONE, "it")
    assert is_filler and memory.shape == (1000,) and memory.dtype == torch.uint8 and not memory.any()


def test_where_the_kernel_refuses_shared_memory_it_is_a_ranks_own(monkeypatch, caplog):
    def refuse(_name: str) -> int:
        raise PermissionError("not permitted")

    monkeypatch.setattr(os, "memfd_create", refuse)
    memory, is_filler = shared_memory(1000, ONE, "it")
    assert is_filler and memory.shape == (1000,) and "not permitted" in caplog.text


def test_pages_are_pinned_as_far_as_the_budget_goes_and_released(monkeypatch, caplog):
    pinned: list[torch.Tensor] = []
    released: list[torch.Tensor] = []
    monkeypatch.setattr(host_blocks, "_register", lambda region: pinned.append(region) or True)
    monkeypatch.setattr(host_blocks, "_unregister", released.extend)
    host = HostBlocks(layouts(3, 1001, 1), ONE, "it")
    assert host.pin(float("inf")) == sum(block.layout.total for block in host.blocks)
    for block, region in zip(host.blocks, pinned, strict=True):
        assert region.data_ptr() % os.sysconf("SC_PAGE_SIZE") == 0
        assert all(is_within(buffer, region) for buffer in block.buffers.values())
    ends = [region.data_ptr() + region.numel() for region in pinned]
    assert all(region.data_ptr() >= end for region, end in zip(pinned[1:], ends, strict=False))
    assert not caplog.records and not released
    del host, block
    gc.collect()
    assert len(released) == 3 and all(a is b for a, b in zip(released, pinned, strict=True))

    host = HostBlocks(layouts(3, 1001, 1), ONE, "it")
    first, second, _ = (block.layout.total for block in host.blocks)
    assert host.pin(first + second) == first + second
    assert "the host memory budget ends" in caplog.text
    caplog.clear()
    monkeypatch.setattr(host_blocks, "_register", lambda region: region.numel() < 1000)
    assert host.pin(float("inf")) == first
    assert "the driver refuses more" in caplog.text


@pytest.mark.parametrize("count", [1, 5, 8])
def test_blocks_that_stay_are_spread_evenly(count):
    stack = Stack(blocks=count)
    for resident in range(count + 1):
        found = streamed_blocks(stack, "blocks", resident)
        assert all(stack.get_submodule(name) is block for name, block in found.items())
        streamed = [int(name.removeprefix("blocks.")) for name in found]
        assert streamed == sorted(streamed) and len(streamed) == count - resident
        stays = [number for number in range(count) if number not in streamed]
        gaps = [after - before for before, after in zip([-1, *stays], stays, strict=False)]
        assert max(gaps, default=0) - min(gaps, default=0) <= 1
    for resident in (-1, count + 1):
        with pytest.raises(AssertionError, match=f"of {count} blocks"):
            streamed_blocks(stack, "blocks", resident)


def test_which_blocks_stay():
    assert list(streamed_blocks(Stack(blocks=6), "blocks", 2)) == [f"blocks.{number}" for number in (0, 1, 3, 4)]


def test_only_the_entries_of_the_list_itself_are_blocks():
    model = Stack(blocks=2)
    model.blocks[0].blocks = torch.nn.ModuleList(Block(4) for _ in range(2))
    model.token_refiner = Stack(blocks=3)
    model.xblocks = torch.nn.ModuleList([Block(4)])
    assert list(streamed_blocks(model, "blocks", 0)) == ["blocks.0", "blocks.1"]
    assert list(streamed_blocks(model, "token_refiner.blocks", 1)) == [
        "token_refiner.blocks.0",
        "token_refiner.blocks.1",
    ]
    names = host_tensors(streamed_blocks(model, "blocks", 0), hosted(model)).keys()
    assert names == {name for name, _ in model.named_parameters() if name.startswith("blocks.")}


def hosted(model: torch.nn.Module, resident: int = 0) -> HostBlocks:
    blocks = streamed_blocks(model, "blocks", resident)
    return HostBlocks([block_layout(block) for block in blocks.values()], ONE, "it")


def test_host_tensors_are_the_blocks_parameters_in_their_buffers():
    model = Stack(blocks=4)
    blocks, host = streamed_blocks(model, "blocks", 1), hosted(model, 1)
    found = host_tensors(blocks, host)
    parameters = dict(model.named_parameters())
    assert list(found) == [name for name in parameters if name.startswith(("blocks.0", "blocks.1", "blocks.2"))]
    for name, tensor in found.items():
        assert tensor.shape == parameters[name].shape and is_within(tensor, host.memory)
    number = list(blocks).index("blocks.2")
    again = host.blocks[number].tensors()["linear.weight"]
    assert found["blocks.2.linear.weight"].data_ptr() == again.data_ptr()


def read_into(monkeypatch) -> list[tuple[int, int]]:
    """Addresses and lengths of the memory that `os.preadv` will be handed."""
    reads, preadv = [], os.preadv

    def watched(handle, buffers, start):
        reads.extend((torch.frombuffer(part, dtype=torch.uint8).data_ptr(), len(part)) for part in buffers)
        return preadv(handle, buffers, start)

    monkeypatch.setattr(os, "preadv", watched)
    return reads


@pytest.mark.parametrize("on_disk", [F32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_slice_is_read_straight_into_memory_that_is_there(tmp_path, monkeypatch, on_disk, dtype):
    tensors = {"matrix": noise(6, 10), "scalar": noise(1)[0], "empty": noise(0, 3), "vector": noise(7)}
    save_file({name: tensor.to(on_disk) for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    entries = read_header(tmp_path / "model.safetensors")
    slices = {"matrix": ((1, 4), (2, 7)), "scalar": (), "empty": ((0, 0), (0, 3)), "vector": ((2, 3),)}
    reads = read_into(monkeypatch)
    for name, ranges in slices.items():
        with SliceReader() as fresh:
            expected = fresh.read(entries[name], ranges, dtype=dtype)
        buffer = torch.full((4096,), 77, dtype=torch.uint8)
        into = buffer[64 : 64 + expected.numel() * dtype.itemsize].view(dtype).view(expected.shape)
        reads.clear()
        with SliceReader() as reader:
            assert reader.read(entries[name], ranges, dtype=dtype, into=into) is into
            assert reader.bytes_read == expected.numel() * on_disk.itemsize == sum(length for _, length in reads)
        assert torch.equal(into, expected), name
        around = torch.cat([buffer[:64], buffer[64 + expected.numel() * dtype.itemsize :]])
        assert torch.all(around == 77)
        if dtype == on_disk:
            begin, end = into.data_ptr(), into.data_ptr() + into.numel() * dtype.itemsize
            assert all(begin <= address and address + length <= end for address, length in reads)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_streamed_weights_are_read_once_into_host_memory(tmp_path, dtype):
    folder = save_stack(tmp_path / "stack")
    it = stream_one(match_stack(folder, dtype), resident=2)
    state = whole_stack().state_dict()
    assert it.bytes_read == sum(tensor.numel() * 4 for tensor in state.values())
    for name, parameter in it.model.named_parameters():
        assert parameter.dtype == (F32 if "norm1" in name else dtype)
        assert torch.equal(parameter, state[name].to(parameter.dtype)), name
        assert is_within(parameter, it.host.memory) == name.startswith(("blocks.0", "blocks.1", "blocks.3", "blocks.4"))


def test_who_is_not_the_filler_reads_the_rest_alone(tmp_path):
    folder = save_stack(tmp_path / "stack")
    filled, other = match_stack(folder), match_stack(folder)
    blocks = streamed_blocks(filled.module, "blocks", 0)
    host = HostBlocks([block_layout(block) for block in blocks.values()], ONE, "it")
    views, read = host_tensors(blocks, host), Counter()
    fill(filled, device=CPU, bytes_read=read, component="filler", host=HostTensors(views, True))
    fill(other, device=CPU, bytes_read=read, component="other", host=HostTensors(views, False))
    state = whole_stack().state_dict()
    outside = sum(tensor.numel() * 4 for name, tensor in state.items() if not name.startswith("blocks."))
    assert read == {"filler": sum(tensor.numel() * 4 for tensor in state.values()), "other": outside}
    for model in (filled.module, other.module):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, state[name])
            assert is_within(parameter, host.memory) == name.startswith("blocks.")


def test_tied_parameters_of_a_block_stay_tied_in_host_memory(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(Odd() for _ in range(2))

    with torch.device("meta"):
        model = Tied().requires_grad_(False)
    tensors = {name: noise(*p.shape, seed=n).to(p.dtype) for n, (name, p) in enumerate(model.named_parameters())}
    save_file(tensors, tmp_path / "model.safetensors")
    it = stream_one(match_weights(model, tmp_path))
    for number, block in enumerate(it.model.blocks):
        assert torch.equal(block(), tensors[f"blocks.{number}.inner.weight"])
        assert block.tied.weight is block.inner.weight
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in it.model.named_parameters())
