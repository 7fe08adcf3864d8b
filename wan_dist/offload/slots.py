"""A fixed ring of places on the device, one block each, and the stream that copies blocks into them.

Two events keep a slot honest: the computing stream waits until its block has `arrived`, the copying stream waits until
the computing stream is `done` with what was there. On a CPU the same code runs with copies that are finished when they
return, and there is nothing to wait for.
"""

import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from wan_dist.offload.host_blocks import BlockLayout, HostBlock


@dataclass(eq=False)
class Slot:
    """buffers: uint8 by dtype, as large as the largest block's. holds: the block whose weights are here, or on their
    way; in_use: it is bound to its module."""

    buffers: dict[torch.dtype, torch.Tensor]
    arrived: Any = None
    done: Any = None
    holds: HostBlock | None = None
    in_use: bool = False
    _views: dict[int, tuple[BlockLayout, list[torch.Tensor]]] = field(default_factory=dict)

    def tensors(self, layout: BlockLayout) -> list[torch.Tensor]:
        """A block's parameters as they lie here, in the order of its layout; made once, since every visit asks."""
        if id(layout) not in self._views:
            self._views[id(layout)] = layout, [span.of(self.buffers) for span in layout.spans.values()]
        return self._views[id(layout)][1]


class SlotRing:
    """`size` slots for blocks of these layouts, allocated once. Models that take turns may share a ring.

    `copies` and `copied_bytes` count what was brought to the device, `late` the copies that nothing had prefetched.
    """

    def __init__(self, layouts: Iterable[BlockLayout], size: int, device: torch.device) -> None:
        capacity: dict[torch.dtype, int] = {}
        for layout in layouts:
            for dtype, nbytes in layout.nbytes.items():
                capacity[dtype] = max(capacity.get(dtype, 0), nbytes)
        self.device = device
        self.slots = [
            Slot({dtype: torch.empty(n, dtype=torch.uint8, device=device) for dtype, n in capacity.items()})
            for _ in range(size)
        ]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:  # copies that nobody waited for must not outlive what they are written to
            weakref.finalize(self, self._stream.synchronize)
        for slot in self.slots if self._stream is not None else []:
            slot.arrived, slot.done = torch.cuda.Event(), torch.cuda.Event()
            slot.done.record()  # nothing was there: its memory may be written once what ran before is over
        self.copies = self.copied_bytes = self.late = 0

    def acquire(self, block: HostBlock) -> Slot:
        """The slot that holds `block`, in use from now on; loaded on the spot where it was not prefetched. Work that is
        queued after this sees the weights."""
        slot = self._holder(block)
        if slot is None:
            slot = self._victim(keep=())
            self._copy(block, slot)
            self.late += 1
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.arrived)
        slot.in_use = True
        return slot

    def finish(self, slot: Slot) -> None:
        """What was queued so far is the last that reads the slot in this visit."""
        if self._stream is not None:
            slot.done.record(torch.cuda.current_stream(self.device))
        slot.in_use = False

    def prefetch(self, blocks: list[HostBlock]) -> None:
        """Start copying those of `blocks` that are not here, the first needed first, as far as there are slots that
        hold none of them."""
        for position, block in enumerate(blocks):
            if self._holder(block) is not None:
                continue
            victim = self._victim(keep=blocks[:position])
            if victim is None:
                return
            self._copy(block, victim)

    def forget(self) -> None:
        """Nothing that is here will be asked for again as it is; copies under way are waited for."""
        if self._stream is not None:
            self._stream.synchronize()
        for slot in self.slots:
            slot.holds, slot.in_use = None, False

    def _holder(self, block: HostBlock) -> Slot | None:
        return next((slot for slot in self.slots if slot.holds is block), None)

    def _victim(self, keep: Iterable[HostBlock]) -> Any:
        """A slot to write over: an empty one, else the one that was written longest ago, of those not in use."""
        free = [slot for slot in self.slots if not slot.in_use and not any(slot.holds is block for block in keep)]
        return next((slot for slot in free if slot.holds is None), free[0] if free else None)

    def _copy(self, block: HostBlock, slot: Slot) -> None:
        self.slots.remove(slot)
        self.slots.append(slot)  # in the order of writing
        slot.holds = block
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            if self._stream is not None:
                self._stream.wait_event(slot.done)
            for dtype, host in block.buffers.items():
                slot.buffers[dtype][: host.numel()].copy_(host, non_blocking=True)
            if self._stream is not None:
                slot.arrived.record(self._stream)
        self.copies += 1
        self.copied_bytes += block.layout.total
