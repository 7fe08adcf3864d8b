"""Pixels <-> latents <-> tokens of a Wan model, as arithmetic."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a Wan checkpoint that decide which videos and which meshes fit it, and what they cost.

    channels: of the latents; stride_t, stride_s: VAE compression in time and space; patch: tokens per latent cell,
    (t, h, w). blocks, head_dim, ffn: of the transformer, the 14B's by default.
    """

    heads: int
    channels: int
    patch: tuple[int, int, int]
    stride_t: int
    stride_s: int
    max_positions: int
    blocks: int = 40
    head_dim: int = 128
    ffn: int = 13824

    @classmethod
    def from_configs(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> "ModelShape":
        """A key that an old config.json lacks takes the default of diffusers' class. Raises ValueError for a value that
        is not a whole number above 0."""
        patch_t, patch_h, patch_w = transformer.get("patch_size", (1, 2, 2))
        shape = cls(
            heads=transformer.get("num_attention_heads", 40),
            channels=vae.get("z_dim", 16),
            patch=(patch_t, patch_h, patch_w),
            stride_t=vae.get("scale_factor_temporal", 4),
            stride_s=vae.get("scale_factor_spatial", 8),
            max_positions=transformer.get("rope_max_seq_len", 1024),
            blocks=transformer.get("num_layers", 40),
            head_dim=transformer.get("attention_head_dim", 128),
            ffn=transformer.get("ffn_dim", 13824),
        )
        for name, value in asdict(shape).items():
            if not all(type(number) is int and number > 0 for number in (value if name == "patch" else [value])):
                raise ValueError(f"its config has {name} {value!r}, not a whole number above 0")
        return shape

    @property
    def multiple_h(self) -> int:
        return self.stride_s * self.patch[1]

    @property
    def multiple_w(self) -> int:
        return self.stride_s * self.patch[2]

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int, int]:
        """`(1, channels, frames, rows, columns)` of the latents of one video."""
        frames = (num_frames - 1) // self.stride_t + 1
        return (1, self.channels, frames, height // self.stride_s, width // self.stride_s)

    def video_of(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """`(num_frames, height, width)` of the video whose latents have that shape."""
        _, _, frames, rows, columns = latent_shape
        return (frames - 1) * self.stride_t + 1, rows * self.stride_s, columns * self.stride_s

    def tokens(self, num_frames: int, height: int, width: int) -> int:
        """Length of the transformer's sequence."""
        _, _, frames, rows, columns = self.latent_shape(num_frames, height, width)
        return (frames // self.patch[0]) * (rows // self.patch[1]) * (columns // self.patch[2])


# Wan2.1 and Wan2.2 A14B, for benchmarks that have no checkpoint.
WAN_2_1 = ModelShape(heads=40, channels=16, patch=(1, 2, 2), stride_t=4, stride_s=8, max_positions=1024)


def parse_video(text: str) -> tuple[int, int, int]:
    """`(height, width, frames)` of `480x832x81`. Raises ValueError for any other form."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{text!r} is not of the form HEIGHTxWIDTHxFRAMES")
    height, width, frames = map(int, parts)
    return height, width, frames


def nearest_multiples(value: int, multiple: int, offset: int = 0) -> list[int]:
    """The legal values `k * multiple + offset` next below and next above `value`, of those above 0.

    >>> nearest_multiples(65, 16)
    [64, 80]
    >>> nearest_multiples(80, 4, offset=1)
    [77, 81]
    """
    below = (value - offset) // multiple * multiple + offset
    return [legal for legal in (below, below + multiple) if legal > 0] or [offset or multiple]
