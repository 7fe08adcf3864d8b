"""Images whose rows are shared out over an axis: halo rows for convolutions, rows gathered for attention and output.

Rows are split at the coarsest level (a VAE's latent rows) by `tensor_split`; at a level that is k times as fine every
rank holds k times as many, so nobody ever has to be asked how many rows another holds. With fewer rows than ranks the
first ranks hold one each and the others none: those take no part in anything here.

Shape legend: B batch, C channels, T frames, H rows of this rank, W columns; `...` any leading dims.
"""

from collections.abc import Sequence

import torch

from wan_dist.distributed.collectives import exchange
from wan_dist.distributed.mesh import Axis
from wan_dist.layers.sequence import split_range, split_sizes


class RowSplit:
    """Who holds which rows of the images in flight. `share` sets their number for all that follows."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.rows = 0

    def share(self, rows: int) -> None:
        """The images that come have `rows` rows at the coarsest level."""
        self.rows = rows

    @property
    def sizes(self) -> list[int]:
        """Coarsest rows of each rank."""
        return split_sizes(self.rows, self.axis.size)

    @property
    def mine(self) -> tuple[int, int]:
        """`(begin, end)` of this rank's coarsest rows."""
        return split_range(self.rows, self.axis.size, self.axis.rank)

    @property
    def working(self) -> int:
        """How many ranks, the first ones, hold rows."""
        return min(self.rows, self.axis.size)

    @property
    def works(self) -> bool:
        """Whether this rank holds rows."""
        return self.axis.rank < self.working


Halo = tuple[torch.Tensor | None, torch.Tensor | None]


def halo_rows(parts: Sequence[torch.Tensor], split: RowSplit, above: int, below: int) -> Halo:
    """The `above` last rows of the rank above and the `below` first rows of the rank below, `[..., rows, W]` each; None
    at the image's border, where there are none.

    parts: what this rank holds, `[..., H, W]`, to be seen as joined along the dim before H (frames that were kept from
    before, and new ones). Every rank that holds rows must call this.
    """
    rank, width = split.axis.rank, parts[0].shape[-1]
    shape = [*parts[0].shape[:-3], sum(part.shape[-3] for part in parts)]

    def rows(begin: int, end: int | None) -> torch.Tensor:
        joined = torch.cat([part[..., begin:end, :] for part in parts], dim=-3)
        return joined.contiguous()  # parts in channels-last order stay in it when joined

    sends, receives = {}, {}
    if rank > 0:
        sends[rank - 1] = rows(0, below)
        receives[rank - 1] = parts[0].new_empty(*shape, above, width)
    if rank + 1 < split.working:
        sends[rank + 1] = rows(-above, None) if above else parts[0].new_empty(0)
        receives[rank + 1] = parts[0].new_empty(*shape, below, width)
    exchange(split.axis, sends, receives)()
    return receives.get(rank - 1), receives.get(rank + 1)


def surrounded(
    parts: Sequence[torch.Tensor],
    halo: Halo,
    above: int,
    below: int,
    *,
    zero_frames: int = 0,
    zero_columns: tuple[int, int] = (0, 0),
    memory_format: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor:
    """One tensor of `parts` joined as in `halo_rows`, behind `zero_frames` frames and between `zero_columns` (left and
    right) of zeros, with `above` rows on top and `below` at the bottom: the halo's, or zeros where it has none. Each
    element is copied once."""
    frames, (rows, width) = sum(part.shape[-3] for part in parts), parts[0].shape[-2:]
    left, right = zero_columns
    shape = (*parts[0].shape[:-3], zero_frames + frames, above + rows + below, left + width + right)
    whole = torch.empty(shape, dtype=parts[0].dtype, device=parts[0].device, memory_format=memory_format)
    for dim, begin, count in ((-3, 0, zero_frames), (-1, 0, left), (-1, left + width, right)):
        whole.narrow(dim, begin, count).zero_()
    filled = whole.narrow(-3, zero_frames, frames).narrow(-1, left, width)
    at = 0
    for part in parts:
        filled.narrow(-3, at, part.shape[-3]).narrow(-2, above, rows).copy_(part)
        at += part.shape[-3]
    for begin, count, neighbours in ((0, above, halo[0]), (above + rows, below, halo[1])):
        border = filled.narrow(-2, begin, count)
        border.zero_() if neighbours is None else border.copy_(neighbours)
    return whole


def gather_rows(x: torch.Tensor, split: RowSplit, dim: int) -> torch.Tensor:
    """`x` of all ranks that hold rows, joined along `dim`, on each of them; its length there is a multiple of this
    rank's coarsest rows, the same multiple on all ranks."""
    axis, mine = split.axis, x.contiguous()
    shapes = _shapes(mine, split, dim)
    parts = [mine if rank == axis.rank else x.new_empty(shape) for rank, shape in enumerate(shapes)]
    others = [rank for rank in range(split.working) if rank != axis.rank]
    exchange(axis, dict.fromkeys(others, mine), {rank: parts[rank] for rank in others})()
    return torch.cat(parts, dim) if others else mine


def rows_to_first(x: torch.Tensor, split: RowSplit, dim: int) -> torch.Tensor | None:
    """As `gather_rows`, on the first rank only; None on the others."""
    axis, mine = split.axis, x.contiguous()
    if axis.rank > 0:
        exchange(axis, {0: mine}, {})()
        return None
    shapes = _shapes(mine, split, dim)
    parts = {rank: x.new_empty(shape) for rank, shape in enumerate(shapes) if rank > 0}
    exchange(axis, {}, parts)()
    return torch.cat([mine, *parts.values()], dim) if parts else mine


def _shapes(mine: torch.Tensor, split: RowSplit, dim: int) -> list[tuple[int, ...]]:
    """The shape of each working rank's part, by arithmetic."""
    sizes = split.sizes
    per_row, over = divmod(mine.shape[dim], sizes[split.axis.rank])
    assert over == 0, f"{mine.shape[dim]} over {sizes[split.axis.rank]} rows"
    return [(*mine.shape[:dim], size * per_row, *mine.shape[dim + 1 :]) for size in sizes[: split.working]]
