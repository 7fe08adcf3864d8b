"""Tensor-parallel layers: diffusers' own modules, taught in place to hold and compute this rank's part.

Column then row (Megatron-LM, arXiv:1909.08053): the first linear gives this rank's features, the second takes them and
sums over ranks. The parameters carry a `weight_loader`, so that loading reads this rank's slice and no more. A module
is taught while it is on the meta device.
"""

import torch
import torch.nn.functional as F

from wan_dist.distributed.collectives import all_reduce
from wan_dist.distributed.mesh import Axis
from wan_dist.layers.weight_loader import WeightLoader


class _ColumnParallelLinear(torch.nn.Linear):
    """`[..., in]` -> `[..., this rank's output features]`: nothing is exchanged."""


class _RowParallelLinear(torch.nn.Linear):
    """`[..., this rank's input features]` -> `[..., out]`, the sum over the ranks; the bias is added to it once."""

    axis: Axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = all_reduce(self.axis, F.linear(x, self.weight))
        return out if self.bias is None else out.add_(self.bias)


class _ParallelRMSNorm(torch.nn.RMSNorm):
    """RMS norm over the features of all ranks: the mean square is summed over them, in fp32."""

    axis: Axis
    all_features: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        squares = all_reduce(self.axis, wide.square().sum(-1, keepdim=True))
        out = wide * torch.rsqrt(squares / self.all_features + self.eps)
        return (out if self.weight is None else out * self.weight).to(x.dtype)


def split_column(linear: torch.nn.Linear, begin: int, end: int) -> None:
    """Teach `linear` to compute output features `begin` to `end` alone."""
    linear.__class__ = _ColumnParallelLinear
    _own(linear, "weight", 0, begin, end)
    _own(linear, "bias", 0, begin, end)
    linear.out_features = end - begin


def split_row(linear: torch.nn.Linear, axis: Axis, begin: int, end: int) -> None:
    """Teach `linear` that its input is features `begin` to `end`, and to sum over the axis. All hold the bias."""
    linear.__class__ = _RowParallelLinear
    linear.axis = axis
    _own(linear, "weight", 1, begin, end)
    linear.in_features = end - begin


def split_rms_norm(norm: torch.nn.RMSNorm, axis: Axis, begin: int, end: int) -> None:
    """Teach `norm` that its input is features `begin` to `end` of those it normalises over."""
    (features,) = norm.normalized_shape
    assert norm.eps is not None, "Wan's norms say theirs"
    norm.__class__ = _ParallelRMSNorm
    norm.axis, norm.all_features = axis, features
    _own(norm, "weight", 0, begin, end)
    norm.normalized_shape = (end - begin,)


def _own(module: torch.nn.Module, name: str, dim: int, begin: int, end: int) -> None:
    """Shrink a meta parameter to a slice of itself, and let its `weight_loader` say which."""
    whole = getattr(module, name)
    if whole is None:
        return
    assert whole.is_meta, "slices are taken before weights are there"
    loader = WeightLoader(tuple(whole.shape), dim, begin, end)
    mine = torch.nn.Parameter(loader(whole).clone(), requires_grad=whole.requires_grad)
    mine.weight_loader = loader
    setattr(module, name, mine)
