"""FSDP2 for inference: which rows a rank keeps, wrapping, and putting the local shards in place.

Wrapping comes last: a model is taught, its weights are matched and this rank's rows are read, and only then does
`fully_shard` turn its (still meta) parameters into DTensors, into which the rows are put. So no rank ever holds more
than it keeps, and nothing is scattered from rank 0.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather
from torch.distributed.tensor import DTensor

from wan_dist.distributed.collectives import gather_flat_into
from wan_dist.distributed.mesh import Axis, FsdpMesh
from wan_dist.distributed.shard_conditions import shard_units
from wan_dist.log import logger


def shard_rows(rows: int, shards: int, shard: int) -> tuple[int, int]:
    """`(begin, end)` of the rows of dim 0 that one shard keeps: those of `torch.chunk`, as FSDP2 divides. The last
    shards may be short or empty.

    >>> [shard_rows(5, 4, shard) for shard in range(4)]
    [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    step = -(-rows // shards)
    return min(shard * step, rows), min((shard + 1) * step, rows)


def shard_model(
    model: torch.nn.Module,
    fsdp: FsdpMesh,
    *,
    conditions: Iterable[str] = (),
    reshard_after_forward: bool = True,
) -> None:
    """Wrap the units of `model` (innermost first) and then the model itself, in place.

    The parameters must be on the meta device; `assign_shard` gives them their rows afterwards. From here on nothing
    but FSDP moves or recasts the model. Raises ValueError naming the class of a model without units.
    """
    units = shard_units(model, conditions)
    logger.info("FSDP of %s: %d units by %s", type(model).__name__, len(units.names), units.rule)
    gather = _CountedAllGather(fsdp.shard)
    for module in [*(model.get_submodule(name) for name in reversed(units.names)), model]:
        fully_shard(module, mesh=fsdp.device_mesh, reshard_after_forward=reshard_after_forward)
        module.set_custom_all_gather(gather)
    for module in model.modules():
        if any(True for _ in module.parameters()):
            module._apply = _refuse_to_move


def local_parameter(meta: torch.nn.Parameter, rows: torch.Tensor) -> torch.nn.Parameter:
    """The parameter that takes the place of a meta one: of `rows`, which are all of it, or this rank's where FSDP has
    wrapped it; in their serving dtype."""
    if not isinstance(meta, DTensor):
        assert rows.shape == meta.shape, (rows.shape, meta.shape)
        return torch.nn.Parameter(rows, requires_grad=False)
    assert rows.shape == meta.to_local().shape, (rows.shape, meta.to_local().shape)
    tensor = DTensor.from_local(
        rows, meta.device_mesh, meta.placements, run_check=False, shape=meta.shape, stride=meta.stride()
    )
    return torch.nn.Parameter(tensor, requires_grad=False)


def is_fsdp_managed_module(module: torch.nn.Module) -> bool:
    """Whether FSDP manages `module`, a part of it or what it is a part of; nothing else may move or recast it then."""
    return any(isinstance(part, FSDPModule) or vars(part).get("_apply") is _refuse_to_move for part in module.modules())


def kept_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters that this rank holds: of its shards, where FSDP divides them."""
    parameters = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def reshard(model: torch.nn.Module) -> None:
    """Free what was gathered of a model that is not going to run next."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _refuse_to_move(*_args: Any, **_kwargs: Any) -> torch.nn.Module:
    raise RuntimeError(
        "FSDP manages this module: its shards lie where they are used, in their serving dtype, and nothing else may "
        "move or recast them (`.to()`, `.cuda()`, `.half()` and the like)"
    )


class _CountedAllGather(AllGather):
    """FSDP's all-gather through our own collective: bytes counted, a lost peer recognised."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        return gather_flat_into(self._axis, output_tensor, input_tensor, group, async_op=async_op)
