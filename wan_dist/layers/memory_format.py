"""Memory formats of convolutions: weights in channels-last order, and inputs that follow them.

A kernel that is handed weights in one order and an input in the other converts one of them silently, or, on some GPU
paths, computes nonsense. So the input is given the format of the weight before the kernel sees it.
"""

import torch

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of dimensions


def weight_format(weight: torch.Tensor) -> torch.memory_format | None:
    """The format of a convolution's weight (4-D or 5-D): `contiguous_format`, `channels_last` or `channels_last_3d`.

    None where its strides fit both or neither, as those of a 1x1x1 kernel do: such a weight says nothing.
    """
    plain = weight.is_contiguous()
    channels_last = weight.is_contiguous(memory_format=_CHANNELS_LAST[weight.ndim])
    if plain == channels_last:
        return None
    return torch.contiguous_format if plain else _CHANNELS_LAST[weight.ndim]


def match_conv3d_input_format(x_BCTHW: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The input of a 3-D convolution in the memory format of its weight; unchanged where the weight has neither."""
    wanted = weight_format(weight)
    return x_BCTHW if wanted is None else x_BCTHW.contiguous(memory_format=wanted)


def wants_channels_last(switch: str, device: torch.device) -> bool:
    """What `auto`, `on` or `off` means on a device: GPU kernels for convolutions want channels last."""
    return switch == "on" or (switch == "auto" and device.type == "cuda")


def to_channels_last(module: torch.nn.Module) -> None:
    """Bring the weight of every 2-D and 3-D convolution of `module` into channels-last order, in place."""
    for conv in module.modules():
        if isinstance(conv, (torch.nn.Conv2d, torch.nn.Conv3d)):
            conv.weight.data = conv.weight.data.contiguous(memory_format=_CHANNELS_LAST[conv.weight.ndim])
