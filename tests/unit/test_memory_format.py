"""Which format a weight has, that an input follows it, and that a kernel of one tap says nothing."""

import pytest
import torch

from wan_dist.layers.memory_format import match_conv3d_input_format, to_channels_last, weight_format

PLAIN, LAST_2D, LAST_3D = torch.contiguous_format, torch.channels_last, torch.channels_last_3d


def weight(*shape: int, order: torch.memory_format = PLAIN) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=order)


FORMATS = [
    ((4, 3, 3, 3, 3), PLAIN),
    ((4, 3, 3, 3, 3), LAST_3D),
    ((4, 3, 3, 1, 1), LAST_3D),
    ((4, 3, 3, 3), PLAIN),
    ((4, 3, 3, 3), LAST_2D),
    ((4, 3, 1, 3), LAST_2D),
]


@pytest.mark.parametrize(("shape", "order"), FORMATS)
def test_the_format_of_a_weight(shape, order):
    assert weight_format(weight(*shape, order=order)) is order


@pytest.mark.parametrize("order", [PLAIN, LAST_3D])
def test_one_tap_says_nothing(order):
    assert weight_format(weight(4, 3, 1, 1, 1, order=order)) is None
    assert weight_format(weight(4, 3, 1, 1, order=LAST_2D if order is LAST_3D else order)) is None


def test_one_input_channel_says_nothing():
    assert weight_format(weight(4, 1, 3, 3, 3, order=LAST_3D)) is None


def test_a_view_that_is_neither_says_nothing():
    assert weight_format(weight(3, 4, 3, 3, 3).transpose(0, 1)) is None
    assert weight_format(weight(4, 3, 3, 5).transpose(2, 3)) is None


def inputs() -> dict[str, torch.Tensor]:
    """The same values in three orders."""
    x = torch.randn(2, 3, 4, 5, 6)
    permuted = x.permute(4, 1, 0, 3, 2).contiguous().permute(2, 1, 4, 3, 0)
    assert not permuted.is_contiguous()
    assert not permuted.is_contiguous(memory_format=LAST_3D)
    return {"plain": x, "channels last": x.contiguous(memory_format=LAST_3D), "permuted": permuted}


@pytest.mark.parametrize("order", [PLAIN, LAST_3D])
@pytest.mark.parametrize("layout", inputs())
def test_an_input_follows_the_weight(layout, order):
    x = inputs()[layout]
    matched = match_conv3d_input_format(x, weight(4, 3, 3, 3, 3, order=order))
    assert matched.is_contiguous(memory_format=order)
    assert torch.equal(matched, x)
    if x.is_contiguous(memory_format=order):
        assert matched is x


@pytest.mark.parametrize("layout", inputs())
def test_an_input_is_left_alone_by_a_weight_that_says_nothing(layout):
    x = inputs()[layout]
    assert match_conv3d_input_format(x, weight(4, 3, 1, 1, 1)) is x


def test_to_channels_last_reaches_every_convolution_and_nothing_else():
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.Sequential(torch.nn.Conv3d(3, 4, 3), torch.nn.Conv1d(3, 4, 3)),
        torch.nn.Linear(3, 4),
    )
    parameters = dict(module.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    to_channels_last(module)
    assert weight_format(module[0].weight) is LAST_2D
    assert weight_format(module[1][0].weight) is LAST_3D
    assert module[1][1].weight.is_contiguous()
    assert module[2].weight.is_contiguous()
    for name, parameter in module.named_parameters():
        assert parameter is parameters[name]  # in place, so that who holds it sees it
        assert torch.equal(parameter, values[name])
