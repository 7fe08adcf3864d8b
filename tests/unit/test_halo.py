"""Who holds which rows, and rows put around an image, by themselves: against `tensor_split`, `cat` and `pad`."""

import pytest
import torch
import torch.nn.functional as F

from wan_dist.distributed.mesh import Axis
from wan_dist.layers.halo import RowSplit, gather_rows, halo_rows, rows_to_first, surrounded


def split_of(rows: int, size: int, rank: int = 0) -> RowSplit:
    split = RowSplit(Axis("vae", rank, size))
    split.share(rows)
    return split


def test_sixty_rows_over_eight_ranks():
    assert split_of(60, 8).sizes == [8, 8, 8, 8, 7, 7, 7, 7]


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 44, 45, 60, 90])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_rows_are_split_as_by_tensor_split(rows, size):
    parts = torch.arange(rows).tensor_split(size)
    for rank, part in enumerate(parts):
        split = split_of(rows, size, rank)
        assert split.sizes == [len(each) for each in parts]
        assert list(range(*split.mine)) == part.tolist()
        assert split.works == (len(part) > 0)
        assert split.working == sum(len(each) > 0 for each in parts) == min(rows, size)


def test_the_last_share_counts():
    split = split_of(60, 8, rank=3)
    split.share(2)
    assert (split.sizes, split.working, split.works) == ([1, 1, 0, 0, 0, 0, 0, 0], 2, False)
    split.share(9)
    assert (split.mine, split.works) == ((4, 5), True)


PLAIN, LAST_2D, LAST_3D = torch.contiguous_format, torch.channels_last, torch.channels_last_3d


def noise(*shape: int, order: torch.memory_format = PLAIN) -> torch.Tensor:
    return torch.randn(shape).contiguous(memory_format=order)


def by_hand(parts: list[torch.Tensor], halo: tuple, above: int, below: int, zero_frames: int) -> torch.Tensor:
    """The same from `cat` and `pad`."""
    whole = torch.cat(parts, dim=-3)
    top, bottom = halo
    whole = F.pad(whole, (0, 0, above, 0)) if top is None else torch.cat([top, whole], dim=-2)
    whole = F.pad(whole, (0, 0, 0, below)) if bottom is None else torch.cat([whole, bottom], dim=-2)
    return F.pad(whole, (0, 0, 0, 0, zero_frames, 0))


@pytest.mark.parametrize("order", [PLAIN, LAST_3D])
@pytest.mark.parametrize("of_parts", [PLAIN, LAST_3D])
@pytest.mark.parametrize("zero_frames", [0, 1, 2])
@pytest.mark.parametrize(("above", "below"), [(1, 1), (0, 1), (2, 1), (0, 0)])
@pytest.mark.parametrize("border", ["both", "top", "bottom", "neither"])
def test_surrounded(border, above, below, zero_frames, of_parts, order):
    parts = [noise(2, 4, frames, 5, 3, order=of_parts) for frames in (2, 1)]
    top = None if border in ("both", "top") else noise(2, 4, 3, above, 3)
    bottom = None if border in ("both", "bottom") else noise(2, 4, 3, below, 3)
    whole = surrounded(parts, (top, bottom), above, below, zero_frames=zero_frames, memory_format=order)
    assert torch.equal(whole, by_hand(parts, (top, bottom), above, below, zero_frames))
    assert whole.is_contiguous(memory_format=order)


@pytest.mark.parametrize("order", [PLAIN, LAST_2D])
def test_images_without_frames_are_surrounded(order):
    """The dim before the rows is then the channels: joined as frames are, which one part needs nothing of."""
    image, top = noise(2, 4, 5, 3, order=order), noise(2, 4, 1, 3)
    whole = surrounded([image], (top, None), 1, 2, memory_format=order)
    assert torch.equal(whole, by_hand([image], (top, None), 1, 2, 0))
    assert whole.is_contiguous(memory_format=order)


def test_dtype_is_kept():
    assert surrounded([noise(1, 1, 1, 2, 2).bfloat16()], (None, None), 1, 1).dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 5])
def test_a_rank_alone_sends_nothing(rows):
    """Also the first of several, where it holds the only row: there is no group to ask."""
    for split in (split_of(rows, 1), split_of(1, 4)):
        x = noise(1, 2, 3, split.rows, 2).transpose(1, 2)
        assert halo_rows([x], split, 1, 1) == (None, None)
        assert torch.equal(gather_rows(x, split, 3), x)
        assert torch.equal(rows_to_first(x, split, 3), x)
        assert split.axis.traffic.total() == 0
