"""Parallelising diffusers' `AutoencoderKLWan`, on one page: the Wan2.1 VAE and the residual, patchified Wan2.2 VAE.

Every rank works on its rows of the image, from the latents to the pixels and back. The model's own code runs
unchanged; what looks beyond a row is taught to ask the neighbours: convolutions receive the rows next to theirs (zeros
only at the image's border), and the attention of the middle blocks receives all keys and values. Norms, activations,
shortcuts and the causal time cache are local. Rows are split at latent resolution, so up- and downsampling by whole
factors never cuts one, and the result is the serial one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    unpatchify,
)
from torch.overrides import TorchFunctionMode

from wan_dist.distributed.mesh import Mesh
from wan_dist.layers.halo import Halo, RowSplit, gather_rows, halo_rows, rows_to_first, surrounded
from wan_dist.layers.memory_format import match_conv3d_input_format, to_channels_last, weight_format

_ENCODER_CHUNK = 4  # pixel frames that `AutoencoderKLWan._encode` takes at a time, after the first


ENCODER_WEIGHTS = (r"^encoder\.", r"^quant_conv\.")  # names of what decoding does without


def meta_vae(config: dict[str, Any], *, encoder: bool = True) -> AutoencoderKLWan:
    """The model without memory for its weights, with its encoder or without. Raises ValueError where its statistics do
    not fit its latents."""
    with torch.device("meta"):
        model = AutoencoderKLWan.from_config(config)
    if not encoder:
        model.encoder = model.quant_conv = None
    for name in ("latents_mean", "latents_std"):
        if len(model.config[name]) != model.config.z_dim:
            raise ValueError(f"{name} has {len(model.config[name])} values for {model.config.z_dim} channels")
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class ParallelVae:
    """A VAE whose rows are shared out; made by `parallelize_vae`. Every rank of the axis makes the same calls, one
    after the other: the next one gives up a decode that is not finished."""

    model: AutoencoderKLWan
    split: RowSplit

    def without_encoder(self) -> "ParallelVae":
        """The same, its encoder's weights freed."""
        self.model.encoder = self.model.quant_conv = None
        return self

    def decode(self, latents_BCTHW: torch.Tensor) -> Iterator[torch.Tensor]:
        """This rank's rows of the video, `[B, 3, t, h, W]` in [-1, 1] in the VAE's dtype, one latent frame at a time:
        the first gives one frame, each other the temporal stride. Nothing where this rank has no rows.

        latents: all rows, as the VAE wants them (de-normalised), the same on every rank. Equals
        `AutoencoderKLWan.decode`, whose loop over latent frames this is, without joining its results.
        """
        vae, split = self.model, self.split
        split.share(latents_BCTHW.shape[3])
        if not split.works:
            return
        weight = next(vae.parameters())
        begin, end = split.mine
        hidden = vae.post_quant_conv(latents_BCTHW[..., begin:end, :].to(weight.device, weight.dtype))
        cache: list[Any] = [None] * vae._cached_conv_counts["decoder"]  # of this call: none is left by a failed one
        for index, frame in enumerate(hidden.split(1, dim=2)):
            video = vae.decoder(frame, feat_cache=cache, feat_idx=[0], first_chunk=index == 0)
            if vae.config.patch_size is not None:
                video = unpatchify(video, patch_size=vae.config.patch_size)
            yield video.clamp(-1.0, 1.0)

    def encode(self, num_frames: int, rows: int, pixel_rows: Callable[[int, int], torch.Tensor]) -> torch.Tensor | None:
        """The mode of the latents' distribution, `[B, z, T, H, W]`, on the first rank of the axis; None on the others.

        pixel_rows: from `(begin, end)` to these rows of the video, `[B, 3, num_frames, end - begin, W]` in [-1, 1];
        asked for no more than this rank encodes. Equals `AutoencoderKLWan.encode(video).latent_dist.mode()`. Raises
        ValueError for numbers of frames or rows that the VAE would cut.
        """
        vae, split, stride = self.model, self.split, self.model.config.scale_factor_spatial
        if num_frames % _ENCODER_CHUNK != 1:
            raise ValueError(f"{num_frames} frames: the VAE encodes {_ENCODER_CHUNK} n + 1")
        if rows % stride:
            raise ValueError(f"{rows} rows of pixels are not a multiple of {stride}")
        split.share(rows // stride)
        if not split.works:
            return None
        weight = next(vae.parameters())
        begin, end = split.mine
        pixels = pixel_rows(begin * stride, end * stride).to(weight.device, weight.dtype)
        return rows_to_first(vae.encode(pixels).latent_dist.mode(), split, dim=3)


def parallelize_vae(vae: AutoencoderKLWan, mesh: Mesh, *, channels_last: bool = False) -> ParallelVae:
    """Teach `vae` to work on this rank's rows of an image, split over the mesh's `vae` axis.

    channels_last: bring the weights of encoder and decoder alike into channels-last order. The weights must be read.
    """
    split = RowSplit(mesh["vae"])
    for module in vae.modules():
        if type(module) is WanCausalConv3d:
            module.__class__ = _SplitCausalConv3d
        elif type(module) is WanResample:
            _split_resample(module, split)
        elif type(module) is WanAttentionBlock:
            module.__class__ = _SplitAttentionBlock
        if isinstance(module, (_SplitCausalConv3d, _SplitAttentionBlock)):
            module.split = split
    if channels_last:
        to_channels_last(vae)
    return ParallelVae(vae, split)


class _SplitCausalConv3d(WanCausalConv3d):
    """The causal convolution over this rank's rows and its neighbours', behind the frames kept in the time cache.

    Zeros before the first frame are left out together with the taps of the kernel that would meet nothing else, and
    zeros beside the columns are the kernel's own padding: neither is written to memory.
    """

    split: RowSplit

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        _, columns, _, rows, past, _ = self._padding  # as `F.pad` takes them; symmetric in space
        parts, weight = [x], self.weight
        if cache_x is not None and past > 0:
            parts, past = [cache_x, x], past - cache_x.shape[2]
        if past and past + sum(part.shape[2] for part in parts) == self.kernel_size[0]:
            weight, past = weight[:, :, past:], 0  # one frame comes out, and these taps would see zeros only
        wanted = weight_format(self.weight)
        if wanted is not None:
            weight = weight.contiguous(memory_format=wanted)
        if rows and self.split.working > 1:
            halo: Halo = halo_rows(parts, self.split, rows, rows)
            x, pad_rows = surrounded(parts, halo, rows, rows, zero_frames=past, memory_format=_or_plain(wanted)), 0
        elif past or len(parts) > 1:
            x = surrounded(parts, (None, None), 0, 0, zero_frames=past, memory_format=_or_plain(wanted))
            pad_rows = rows
        else:
            x, pad_rows = match_conv3d_input_format(x, self.weight), rows
        if x.shape[2] == weight.shape[2] == 1:  # a frame by itself: 2-D kernels are the better ones
            image, weight, padding = x[:, :, 0], weight[:, :, 0], (pad_rows, columns)
            return F.conv2d(image, weight, self.bias, self.stride[1:], padding).unsqueeze(2)
        return F.conv3d(x, weight, self.bias, self.stride, (0, pad_rows, columns))


class _SplitConv2d(torch.nn.Conv2d):
    """A convolution that wants `above` rows on top, `below` at the bottom, and columns to the `left` and `right`."""

    split: RowSplit
    above: int
    below: int
    left: int
    right: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wanted, pad_rows, pad_columns = _or_plain(weight_format(self.weight)), self.above, self.left
        if self.split.working > 1 or self.above != self.below or self.left != self.right:
            halo: Halo = (None, None)
            if self.split.working > 1:
                halo = halo_rows([x], self.split, self.above, self.below)
            columns = self.left, self.right
            x = surrounded([x], halo, self.above, self.below, zero_columns=columns, memory_format=wanted)
            pad_rows = pad_columns = 0
        x = x.contiguous(memory_format=wanted)
        return F.conv2d(x, self.weight, self.bias, self.stride, (pad_rows, pad_columns), self.dilation, self.groups)


def _split_resample(resample: WanResample, split: RowSplit) -> None:
    """The convolution after an upsampling (3x3, padded all round) or of a downsampling (3x3, stride 2, behind a module
    that pads one row and one column of zeros at the end). A stride of 2 finds an even number of rows on every rank."""
    if isinstance(resample.resample, torch.nn.Identity):
        return
    before, conv = resample.resample
    if isinstance(conv, _SplitConv2d):  # taught before, for another mesh
        conv.split = split
        return
    if isinstance(before, torch.nn.ZeroPad2d):
        left, right, above, below = before.padding
        resample.resample[0] = torch.nn.Identity()
    else:
        above = below = conv.padding[0]
        left = right = conv.padding[1]
    conv.__class__ = _SplitConv2d
    conv.split, conv.above, conv.below, conv.left, conv.right = split, above, below, left, right


class _SplitAttentionBlock(WanAttentionBlock):
    """Attention of this rank's pixels to those of all ranks: the block's own code, keys and values gathered."""

    split: RowSplit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.split.working <= 1:
            return super().forward(x)
        with _GatheredKeys(self.split):
            return super().forward(x)


class _GatheredKeys(TorchFunctionMode):
    """While active, `scaled_dot_product_attention` attends to the keys and values (dim 2) of all ranks."""

    def __init__(self, split: RowSplit) -> None:
        super().__init__()
        self.split = split

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value = args
            both = gather_rows(torch.cat([key, value], dim=-1), self.split, dim=2)
            args = (query, *both.split([key.shape[-1], value.shape[-1]], dim=-1))
        return func(*args, **(kwargs or {}))


def _or_plain(wanted: torch.memory_format | None) -> torch.memory_format:
    return torch.contiguous_format if wanted is None else wanted
