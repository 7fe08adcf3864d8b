"""Where streamed blocks live: one flat host buffer per block and dtype, one copy of them per node.

A block's tensors of one dtype lie back to back, each at an offset that is a multiple of 64 bytes (CPU kernels give
other last bits on unaligned weights), so that a block is one copy per dtype. The memory is an anonymous file of the
kernel's (memfd) that the local ranks map: those that stream the same weights share it, and it is gone with the last of
them.
"""

import mmap
import os
import uuid
import weakref
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from wan_dist.distributed.collectives import gather_objects
from wan_dist.distributed.mesh import Axis
from wan_dist.log import logger

_ALIGNMENT = 64
_PAGE = os.sysconf("SC_PAGE_SIZE")  # blocks begin on pages of their own, since pages are what is pinned


@dataclass(frozen=True)
class Span:
    """A tensor's place in its block's flat buffer of that dtype: from byte `begin`."""

    dtype: torch.dtype
    begin: int
    shape: torch.Size

    def of(self, buffers: dict[torch.dtype, torch.Tensor]) -> torch.Tensor:
        """The tensor in one set of a block's buffers (uint8, by dtype)."""
        nbytes = self.shape.numel() * self.dtype.itemsize
        return buffers[self.dtype][self.begin : self.begin + nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class BlockLayout:
    """The spans of a block's parameters, by their name in the block, and the exact bytes of each dtype's buffer."""

    spans: dict[str, Span]
    nbytes: dict[torch.dtype, int]

    @property
    def total(self) -> int:
        return sum(self.nbytes.values())


def block_layout(block: torch.nn.Module) -> BlockLayout:
    """Of a block, which may be on the meta device."""
    spans: dict[str, Span] = {}
    ends: dict[torch.dtype, int] = {}
    for name, parameter in block.named_parameters():
        begin = _rounded_up(ends.get(parameter.dtype, 0), _ALIGNMENT)
        spans[name] = Span(parameter.dtype, begin, parameter.shape)
        ends[parameter.dtype] = begin + parameter.numel() * parameter.element_size()
    return BlockLayout(spans, ends)


@dataclass(frozen=True, eq=False)
class HostBlock:
    """One block's weights: `buffers` holds uint8 of the layout's exact sizes, by dtype."""

    layout: BlockLayout
    buffers: dict[torch.dtype, torch.Tensor]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: span.of(self.buffers) for name, span in self.layout.spans.items()}


class HostBlocks:
    """The blocks of one component, one after the other in memory that local ranks share.

    axis, key: the ranks that stream together, all of which make this object; those of one machine with the same `key`
    hold the same weights. `is_filler` is whether this rank is the one of them that writes.
    """

    def __init__(self, layouts: Sequence[BlockLayout], axis: Axis, key: Hashable) -> None:
        begins, end = [], 0
        for layout in layouts:
            begins.append(_rounded_up(end, _PAGE))
            end = begins[-1] + sum(_rounded_up(size, _ALIGNMENT) for size in layout.nbytes.values())
        self.memory, self.is_filler = shared_memory(end, axis, key)
        self.blocks = [_cut(self.memory, begin, layout) for begin, layout in zip(begins, layouts, strict=True)]
        self._axis = axis

    def pin(self, budget: float) -> int:
        """Lock the blocks' pages for direct copies to a GPU, as far as `budget` bytes go; returns how many it were.

        Where the budget ends or the driver refuses, the rest stays pageable, with a warning: its copies are several
        times slower and wait for the host. The pages are released with this object.
        """
        pinned: list[torch.Tensor] = []
        weakref.finalize(self, _unregister, pinned)
        done = 0
        for number, block in enumerate(self.blocks):
            region, size = _region(self.memory, block), block.layout.total
            if done + size > budget or not _register(region):
                pageable = sum(other.layout.total for other in self.blocks[number:])
                why = "the driver refuses more" if done + size <= budget else "the host memory budget ends"
                logger.warning("%.1f GB of streamed weights stay pageable, so copying is slow: %s", pageable / 1e9, why)
                break
            pinned.append(region)
            done += size
        return done

    def meet(self) -> None:
        """Returns when every rank of the axis is here: none reads any more what it read before, and what the fillers
        wrote before is everyone's."""
        gather_objects(self._axis, None)


def shared_memory(nbytes: int, axis: Axis, key: Hashable) -> tuple[torch.Tensor, bool]:
    """`nbytes` zero bytes (uint8) that this rank shares with those ranks of `axis` on the same machine that give the
    same `key`, and whether it is the one of them to write. All ranks of the axis call this.

    A rank that cannot open another's memory (a hardened kernel, another container) takes memory of its own.
    """
    me = (machine_identity(), key)
    owner = gather_objects(axis, me).index(me)
    handle = _anonymous_file(nbytes) if owner == axis.rank else None
    path = None if handle is None else f"/proc/{os.getpid()}/fd/{handle}"
    path = gather_objects(axis, path)[owner]
    memory = _mapped(path, nbytes) if path is not None else None
    gather_objects(axis, None)  # all have opened it
    if handle is not None:
        os.close(handle)
    if memory is not None:
        return memory, owner == axis.rank
    if owner != axis.rank:
        logger.warning("host memory cannot be shared with rank %d: this rank holds a copy of its own", owner)
    own = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # on pages of its own
    return torch.frombuffer(own, dtype=torch.uint8)[:nbytes], True


def machine_identity() -> tuple[str, int] | str:
    """What only processes that see each other in /proc have in common: a node, or a container of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return uuid.uuid4().hex  # nobody's but ours


def _anonymous_file(nbytes: int) -> int | None:
    if not hasattr(os, "memfd_create"):
        return None  # not Linux
    try:
        handle = os.memfd_create("wan_dist blocks")
    except OSError as error:
        logger.warning("%s", error)
        return None
    try:
        os.ftruncate(handle, max(nbytes, 1))
    except OSError as error:
        logger.warning("%s", error)
        os.close(handle)
        return None
    return handle


def _mapped(path: str, nbytes: int) -> torch.Tensor | None:
    try:
        return torch.from_file(path, shared=True, size=max(nbytes, 1), dtype=torch.uint8)[:nbytes]
    except RuntimeError as error:
        logger.warning("%s", error)
        return None


def _cut(memory: torch.Tensor, begin: int, layout: BlockLayout) -> HostBlock:
    buffers = {}
    for dtype, size in layout.nbytes.items():
        buffers[dtype] = memory[begin : begin + size]
        begin += _rounded_up(size, _ALIGNMENT)
    return HostBlock(layout, buffers)


def _region(memory: torch.Tensor, block: HostBlock) -> torch.Tensor:
    """All of a block's buffers and what lies between them."""
    buffers = list(block.buffers.values())
    begin = buffers[0].data_ptr() - memory.data_ptr()
    end = buffers[-1].data_ptr() + buffers[-1].numel() - memory.data_ptr()
    return memory[begin:end]


def _register(region: torch.Tensor) -> bool:
    error = torch.cuda.cudart().cudaHostRegister(region.data_ptr(), region.numel(), 0)
    if int(error) == 0:
        return True
    with suppress(RuntimeError):  # the next kernel launch would take the driver's refusal for its own
        torch.zeros(1, device="cuda")
    return False


def _unregister(regions: list[torch.Tensor]) -> None:
    for region in regions:
        torch.cuda.cudart().cudaHostUnregister(region.data_ptr())


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
