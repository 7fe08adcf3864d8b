"""One set of random weights, and taught transformers that have them: resident, streamed by the engine of a run, or
under diffusers' group offloading.

The weights are drawn once and kept in host memory, the blocks' as they are streamed from. Streamed and group-offloaded
blocks do not remember their text keys and values, as in a run: computing those again is part of what offloading costs.
"""

from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial
from math import inf
from typing import Any

import torch

from wan_dist.bench.random_transformer import TransformerShape, random_transformer
from wan_dist.distributed.mesh import AXES, Axis, build_mesh
from wan_dist.layers.attention_kernels import attention_kernel
from wan_dist.loading.weights import put_in_place, serve_in
from wan_dist.models.architecture import BLOCK_LISTS
from wan_dist.models.wan_transformer import forget_block_text, meta_transformer, parallelize_wan_transformer
from wan_dist.offload.host_blocks import HostBlocks, block_layout
from wan_dist.offload.layerwise import LayerwiseStream, host_tensors, streamed_blocks
from wan_dist.offload.slots import SlotRing
from wan_dist.output.memory import return_device_memory

_BLOCKS, _CPU = BLOCK_LISTS["transformer"], torch.device("cpu")


@dataclass(frozen=True)
class PlacedModel:
    """device_bytes, host_bytes: of its weights there; None where only diffusers knows. pinned: those on the host."""

    model: Any
    device_bytes: int | None
    host_bytes: int
    pinned: bool = False
    stream: LayerwiseStream | None = None
    note: str = ""

    def counts(self) -> tuple[int, int, int]:
        """Copies so far, their bytes, and how many of them were late."""
        if self.stream is None:
            return 0, 0, 0
        ring = self.stream.ring
        return ring.copies, ring.copied_bytes, ring.late


class RandomWeights:
    """Each model that is made of them has device memory of its own; all share the copy on the host."""

    def __init__(self, shape: TransformerShape, *, dtype: torch.dtype, device: torch.device, attention: str) -> None:
        self._shape, self._dtype, self._device, self._attention = shape, dtype, device, attention
        self._alone = build_mesh(dict.fromkeys(AXES, 1), device.type)
        drawn = self._drawn()
        blocks = streamed_blocks(drawn, _BLOCKS, resident=0)
        self._host = HostBlocks([block_layout(block) for block in blocks.values()], Axis("alone"), "bench")
        self._order = list(blocks)
        self._tensors = _to_host(drawn, host_tensors(blocks, self._host))
        del drawn, blocks
        return_device_memory(device)

    def _drawn(self) -> Any:
        """A resident model, on the device if that holds it: there a 14B is drawn in a moment, on a CPU in minutes."""
        draw = partial(random_transformer, self._shape, dtype=self._dtype, mesh=self._alone)
        with suppress(torch.OutOfMemoryError):
            return draw(device=self._device)
        return_device_memory(self._device)
        return draw(device=_CPU)

    @property
    def block_bytes(self) -> list[int]:
        return [place.layout.total for place in self._host.blocks]

    @cached_property
    def _is_pinned(self) -> bool:
        """Whether all blocks are; they are pinned when this is first asked."""
        return self._device.type == "cuda" and self._host.pin(inf) == sum(self.block_bytes)

    def resident(self) -> PlacedModel:
        model = put_in_place(self._taught(), self._on_device(self._tensors), device=self._device, sharding=None)
        return PlacedModel(model, _nbytes(self._tensors), 0)

    def streamed(self, prefetch: int, resident_blocks: int) -> PlacedModel:
        """Its host copy is the part of ours that it streams."""
        model = self._taught()
        blocks = streamed_blocks(model, _BLOCKS, resident_blocks)
        host = copy(self._host)
        host.blocks = [self._host.blocks[self._order.index(name)] for name in blocks]
        there = host_tensors(blocks, host)
        here = {name: tensor for name, tensor in self._tensors.items() if name not in there}
        put_in_place(model, {**there, **self._on_device(here)}, device=self._device, sharding=None)
        pinned = self._is_pinned
        ring = SlotRing([place.layout for place in host.blocks], prefetch + 1, self._device)
        stream = LayerwiseStream(list(blocks.values()), host, ring, forget_block_text)
        in_ring = sum(buffer.nbytes for slot in ring.slots for buffer in slot.buffers.values())
        streamed = sum(place.layout.total for place in host.blocks)
        return PlacedModel(model, _nbytes(here) + in_ring, streamed, pinned, stream)

    def group_offloaded(self) -> PlacedModel:
        """A block a group. The weights start in host memory, as `from_pretrained` leaves them; on a GPU diffusers pins
        copies of them."""
        from diffusers.hooks import apply_group_offloading

        on_gpu = self._device.type == "cuda"
        model = put_in_place(self._taught(), self._tensors, device=_CPU, sharding=None)
        before = _pinned_bytes() if on_gpu else 0
        apply_group_offloading(
            model,
            onload_device=self._device,
            offload_device=_CPU,
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=on_gpu,
            record_stream=on_gpu,
        )
        for block in model.get_submodule(_BLOCKS).children():
            block.register_forward_hook(lambda block, *_: forget_block_text(block))
        if on_gpu:
            return PlacedModel(model, None, _pinned_bytes() - before, pinned=True)
        return PlacedModel(model, _nbytes(self._tensors), 0, note="without streams, and on a CPU it moves nothing")

    def _taught(self) -> Any:
        model = meta_transformer(self._shape.config())
        parallelize_wan_transformer(model, self._alone, attention_kernel(self._attention))
        serve_in(model, self._dtype, model._keep_in_fp32_modules)
        return model

    def _on_device(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self._device, copy=True) for name, tensor in tensors.items()}


def _to_host(model: torch.nn.Module, into: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's parameters by name, copied `into` these tensors, those that are not there into new ones."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = into[name] if name in into else torch.empty_like(parameter, device=_CPU)
        tensors[name].copy_(parameter)
    return tensors


def _nbytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _pinned_bytes() -> int:
    """Of torch's own pinned memory, where each tensor's is rounded up to a power of two."""
    return int(torch.cuda.host_memory_stats()["allocated_bytes.current"])
