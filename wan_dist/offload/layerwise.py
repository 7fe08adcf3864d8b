"""Layerwise streaming of a model's blocks: hooks that bring each block's weights to the device for its turn.

Before a block runs it is waited for; after it ran, the blocks that come next are prefetched, and behind the last block
the first ones of whatever runs next. A block that nothing prefetched (skipped, repeated or reversed ones) is loaded on
the spot. Between visits a block's parameters are its weights in host memory, so that whatever looks at the model
(`state_dict`, a checksum) sees real weights.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from wan_dist.offload.host_blocks import HostBlock, HostBlocks
from wan_dist.offload.slots import SlotRing


class Turns(Protocol):
    """Several forwards that take turns behind each block."""

    @property
    def is_last(self) -> bool:
        """Whether the block has served all of them."""
        ...

    def pass_on(self) -> None:
        """Let the others use the block too."""
        ...


def streamed_blocks(model: torch.nn.Module, block_list: str, resident: int) -> dict[str, torch.nn.Module]:
    """The blocks to stream by qualified name: the entries of the list `block_list` itself, whatever lists lie in them,
    but for `resident` of them.

    Those that stay are spread evenly, so that the computing between two copies is, too.
    """
    blocks = dict(model.get_submodule(block_list).named_children())
    count = len(blocks)
    assert 0 <= resident <= count, f"{resident} of {count} blocks"
    stays = [(number + 1) * resident // count > number * resident // count for number in range(count)]
    return {
        f"{block_list}.{name}": block for (name, block), stay in zip(blocks.items(), stays, strict=True) if not stay
    }


class LayerwiseStream:
    """The streamed blocks of one model. It is entered when it is made; `disable` makes the model an ordinary one.

    blocks: in the order in which they run. Their parameters must be the tensors of `host`. released: called with a
    block when its weights leave the device.
    """

    def __init__(
        self,
        blocks: Sequence[torch.nn.Module],
        host: HostBlocks,
        ring: SlotRing,
        released: Callable[[torch.nn.Module], None] | None = None,
    ) -> None:
        self.ring = ring
        self.next_stream: LayerwiseStream | None = self  # whose first blocks are prefetched behind our last ones
        self.turns: Turns | None = None  # where several forwards share each visit: see `lockstep`
        self._host = host
        self._released = released
        self._blocks = list(blocks)
        self._places = list(host.blocks)
        self._slots: dict[int, Any] = {}
        self._handles: list[Any] = []
        self._install()

    @property
    def is_streaming(self) -> bool:
        return bool(self._handles)

    def disable(self) -> None:
        """Give every block memory of its own on the device; the host's copy stays as it is."""
        if not self.is_streaming:
            return
        self._remove_hooks()
        for block, place in zip(self._blocks, self._places, strict=True):
            _assign(_parameters(block), [tensor.to(self.ring.device, copy=True) for tensor in place.tensors().values()])

    def enable(self) -> None:
        """Stream again, what the blocks hold now. All ranks that share the host's copy call this."""
        if self.is_streaming:
            return
        self._host.meet()  # another rank's pass may still read what is about to be written over
        for block, place in zip(self._blocks, self._places, strict=True):
            pairs = zip(place.tensors().values(), _parameters(block), strict=True)
            for tensor, parameter in pairs if self._host.is_filler else ():
                tensor.copy_(parameter)
        self._host.meet()
        for block, place in zip(self._blocks, self._places, strict=True):
            _assign(_parameters(block), place.tensors().values())
        self._install()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model as an ordinary one, for changing its weights."""
        self.disable()
        try:
            yield
        finally:
            self.enable()

    def _install(self) -> None:
        self.ring.forget()
        for block, place in zip(self._blocks, self._places, strict=True):
            number, parameters = len(self._handles) // 2, _parameters(block)
            self._handles += [
                block.register_forward_pre_hook(self._before(number, parameters)),
                block.register_forward_hook(
                    self._after(number, parameters, list(place.tensors().values())), always_call=True
                ),
            ]

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.ring.forget()

    def _before(self, number: int, parameters: list[torch.nn.Parameter]) -> Callable[..., None]:
        def bring(_block: torch.nn.Module, _args: Any) -> None:
            place = self._places[number]
            self._slots[number] = slot = self.ring.acquire(place)
            _assign(parameters, slot.tensors(place.layout))

        return bring

    def _after(
        self, number: int, parameters: list[torch.nn.Parameter], on_host: list[torch.Tensor]
    ) -> Callable[..., None]:
        def let_go(block: torch.nn.Module, _args: Any, output: Any) -> None:
            slot = self._slots.pop(number, None)
            if slot is None:
                return  # its own pre-hook failed
            self.ring.finish(slot)
            _assign(parameters, on_host)
            if self._released is not None:
                self._released(block)
            if output is None:
                return  # the block failed
            if self.turns is None or self.turns.is_last:
                self.ring.prefetch(self._coming(number))
            if self.turns is not None:
                self.turns.pass_on()

        return let_go

    def _coming(self, number: int) -> list[HostBlock]:
        """The blocks behind this one in the order in which they will run, as many as there are slots beside its own."""
        beyond = self.next_stream._places if self.next_stream is not None else []
        return [*self._places[number + 1 :], *beyond][: len(self.ring.slots) - 1]


def host_tensors(blocks: dict[str, torch.nn.Module], host: HostBlocks) -> dict[str, torch.Tensor]:
    """Where the host keeps each parameter of the blocks, by its name in the model."""
    return {
        f"{prefix}.{name}": tensor
        for prefix, place in zip(blocks, host.blocks, strict=True)
        for name, tensor in place.tensors().items()
    }


def _parameters(block: torch.nn.Module) -> list[torch.nn.Parameter]:
    """In the order of the block's layout."""
    return list(block.parameters())


def _assign(parameters: Iterable[torch.nn.Parameter], tensors: Iterable[torch.Tensor]) -> None:
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.data = tensor
