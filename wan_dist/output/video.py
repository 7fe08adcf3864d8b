"""Frames -> mp4 that ordinary players accept: H.264, yuv420p, BT.709, the index in front."""

from fractions import Fraction
from pathlib import Path

import torch

from wan_dist.output.files import atomic

_BT709 = 1  # the code of ITU-R BT.709 for primaries, transfer and matrix (ISO/IEC 23091-2)


def write_mp4(target: Path, frames: torch.Tensor, fps: float) -> None:
    """Encode frames, uint8 `[T, H, W, 3]` with even H and W, at `fps` frames a second."""
    import av
    from av.video.reformatter import Colorspace

    rate = Fraction(fps).limit_denominator(1001)
    with atomic(target) as scratch:
        with av.open(str(scratch), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "16", "preset": "medium"})
            stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
            # Players guess BT.601 or 709 from the size where a file does not say; so it says, and is converted so.
            codec = stream.codec_context
            codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
            for pixels in frames.numpy():
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
            container.mux(stream.encode())
