"""Collectives over an axis: contiguous buffers in, exact sizes, bytes counted, peers' loss recognised.

Gathers are written as all-to-alls: they take uneven sizes on every backend, and on gloo they are the faster form.
`bytes sent` counts what leaves this rank for others, not what it keeps.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from wan_dist.distributed.mesh import Axis, Mesh
from wan_dist.distributed.out_of_memory import is_out_of_memory

_AS_LONG_AS_IT_TAKES = timedelta(days=24)  # in milliseconds it must fit 31 bits


class PeerLostError(RuntimeError):
    """A collective failed under this rank, most likely because another one is gone: a consequence, not a cause."""


def _run(axis: Axis, name: str, collective: Callable[[], Any]) -> None:
    try:
        collective()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise PeerLostError(f"{name} over axis {axis.name!r} failed: {error}") from error


def all_to_all(axis: Axis, send: torch.Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> torch.Tensor:
    """Exchange the parts of a flat contiguous tensor: `send_sizes[r]` elements go to rank r of the axis.

    Returns the flat concatenation of what came, `receive_sizes[r]` elements from rank r.
    """
    assert send.ndim == 1 and send.is_contiguous() and send.numel() == sum(send_sizes), "a flat contiguous buffer"
    if axis.size == 1:
        return send
    received = send.new_empty(sum(receive_sizes))
    _run(axis, "all_to_all", lambda: dist.all_to_all_single(
        received, send, list(receive_sizes), list(send_sizes), group=axis.group))  # fmt: skip
    axis.traffic["all_to_all"] += (send.numel() - send_sizes[axis.rank]) * send.element_size()
    return received


def all_gather(axis: Axis, tensor: torch.Tensor) -> list[torch.Tensor]:
    """`tensor` of every rank of the axis, in rank order; the same shape on all of them."""
    shape = tensor.shape
    parts = _gather_flat(axis, tensor, [tensor.numel()] * axis.size)
    return [part.view(shape) for part in parts]


def gather_dim(axis: Axis, tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
    """The concatenation along `dim` of every rank's tensor, whose length there is `sizes[rank]`."""
    if axis.size == 1:
        return tensor
    shapes = [(*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]) for size in sizes]
    per_length = tensor.numel() // tensor.shape[dim] if tensor.shape[dim] else _other_dims(tensor, dim)
    parts = _gather_flat(axis, tensor, [size * per_length for size in sizes])
    return torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], dim=dim)


def _other_dims(tensor: torch.Tensor, dim: int) -> int:
    return int(torch.Size([*tensor.shape[:dim], *tensor.shape[dim + 1 :]]).numel())


def _gather_flat(axis: Axis, tensor: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    flat = tensor.contiguous().view(-1)
    if axis.size == 1:
        return [flat]
    received, send = flat.new_empty(sum(sizes)), flat.repeat(axis.size)
    _run(axis, "all_gather", lambda: dist.all_to_all_single(
        received, send, list(sizes), [flat.numel()] * axis.size, group=axis.group))  # fmt: skip
    axis.traffic["all_gather"] += (axis.size - 1) * flat.numel() * flat.element_size()
    ends = list(accumulate(sizes))
    return [received[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def gather_flat_into(
    axis: Axis, output: torch.Tensor, tensor: torch.Tensor, group: dist.ProcessGroup, *, async_op: bool
) -> dist.Work | None:
    """FSDP's gather of equal flat shards into one flat buffer, over its own group of the axis's ranks."""
    works: list[dist.Work | None] = []
    if tensor.device.type == "cpu":  # gloo's all-gather takes three times as long as the same by an all-to-all
        send = tensor.repeat(axis.size)
        _run(axis, "fsdp_all_gather", lambda: works.append(
            dist.all_to_all_single(output, send, group=group, async_op=async_op)))  # fmt: skip
    else:
        _run(axis, "fsdp_all_gather", lambda: works.append(
            dist.all_gather_into_tensor(output, tensor, group=group, async_op=async_op)))  # fmt: skip
    axis.traffic["fsdp_all_gather"] += (axis.size - 1) * tensor.numel() * tensor.element_size()
    return works[0]


def all_reduce(axis: Axis, tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the axis, written into `tensor` (contiguous): the same bits on every rank.

    Counted as a ring sends it: 2 (P-1)/P of the tensor, rounded down.
    """
    if axis.size > 1:
        assert tensor.is_contiguous(), "a collective sends memory, not a view"
        _run(axis, "all_reduce", lambda: dist.all_reduce(tensor, group=axis.group))
        axis.traffic["all_reduce"] += 2 * (axis.size - 1) * tensor.numel() * tensor.element_size() // axis.size
    return tensor


def exchange(axis: Axis, sends: dict[int, torch.Tensor], receives: dict[int, torch.Tensor]) -> Callable[[], None]:
    """Start sending each of `sends` to the rank of the axis that is its key, and receiving each of `receives` from its;
    all contiguous, empty ones are left out on both ends. Returns the function that waits for all; until then none may
    be touched. Ranks that neither send nor receive take no part (NCCL wants one collective of all ranks before)."""
    everything = (*sends.values(), *receives.values())
    assert all(tensor.is_contiguous() for tensor in everything), "a collective sends memory, not a view"
    operations = [
        dist.P2POp(operation, tensor, group=axis.group, group_peer=peer)
        for operation, tensors in ((dist.isend, sends), (dist.irecv, receives))
        for peer, tensor in tensors.items()
        if tensor.numel()
    ]
    works: list[Any] = []
    if operations:
        _run(axis, "exchange", lambda: works.extend(dist.batch_isend_irecv(operations)))
    axis.traffic["p2p"] += sum(tensor.numel() * tensor.element_size() for tensor in sends.values())

    def wait() -> None:
        for work in works:
            _run(axis, "exchange", work.wait)

    return wait


def pass_on(axis: Axis, send: torch.Tensor, receive: torch.Tensor) -> Callable[[], None]:
    """Start sending `send` to the next rank of the axis and receiving `receive` from the one before: see `exchange`."""
    after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    return exchange(axis, {after: send}, {before: receive})


def broadcast(axis: Axis, tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's tensor on every rank of the axis, written in place; contiguous, the same shape everywhere."""
    if axis.size > 1:
        assert tensor.is_contiguous(), "a collective sends memory, not a view"
        _run(axis, "broadcast", lambda: dist.broadcast(tensor, group=axis.group, group_src=0))
        if axis.rank == 0:
            axis.traffic["broadcast"] += (axis.size - 1) * tensor.numel() * tensor.element_size()
    return tensor


def gather_objects(axis: Axis, value: Any) -> list[Any]:
    """`value` (small, picklable) of every rank of the axis, on every rank."""
    if axis.size == 1:
        return [value]
    values: list[Any] = [None] * axis.size
    _run(axis, "gather_objects", lambda: dist.all_gather_object(values, value, group=axis.group))
    return values


def any_rank(axis: Axis, flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any rank of the axis; the same answer on all. Its four bytes are not counted."""
    if axis.size == 1:
        return flag
    asked = torch.tensor([flag], dtype=torch.int32, device=device)
    _run(axis, "any_rank", lambda: dist.all_reduce(asked, dist.ReduceOp.MAX, group=axis.group))
    return bool(asked.item())


def barrier(axis: Axis) -> None:
    """Wait until every rank of the axis is here."""
    if axis.size > 1:
        _run(axis, "barrier", lambda: dist.barrier(group=axis.group))


def wait_for_first(mesh: Mesh, what: str) -> None:
    """Wait until the first rank of the world is here too, however long it takes; it does not wait for the others.

    For work that few ranks do: those with nothing to do would run into the timeout of the next collective, though
    nobody is late. If the first rank fails, its agent ends this one. what: a word for the occasion, used once in a run.
    """
    if mesh.store is None:
        return
    if mesh.world.rank == 0:
        mesh.store.set(what, "done")
        return
    try:
        mesh.store.wait([what], _AS_LONG_AS_IT_TAKES)
    except RuntimeError as error:
        raise PeerLostError(f"waiting for rank 0 ({what}) failed: {error}") from error
