"""Frames -> files, as they come: an mp4 that ordinary players accept (H.264, yuv420p, BT.709, the index in front), and
the frames themselves."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import torch

from wan_dist.output.files import atomic, write_tensor

_BT709 = 1  # the code of ITU-R BT.709 for primaries, transfer and matrix (ISO/IEC 23091-2)

Append = Callable[[torch.Tensor], None]  # takes the next frames, uint8 `[t, H, W, 3]`


@contextmanager
def mp4_writer(target: Path, size: tuple[int, int], fps: float) -> Iterator[Append]:
    """Encode frames of `size` (height and width, both even) at `fps` frames a second; the file is there on leaving."""
    import av
    from av.video.reformatter import Colorspace

    rate = Fraction(fps).limit_denominator(1001)
    with atomic(target) as scratch:
        with av.open(str(scratch), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "16", "preset": "medium"})
            (stream.height, stream.width), stream.pix_fmt = size, "yuv420p"
            # Players guess BT.601 or 709 from the size where a file does not say; so it says, and is converted so.
            codec = stream.codec_context
            codec.colorspace = codec.color_primaries = codec.color_trc = _BT709

            def append(frames: torch.Tensor) -> None:
                for pixels in frames.numpy():
                    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                    container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))

            yield append
            container.mux(stream.encode())


@contextmanager
def frames_writer(target: Path, shape: tuple[int, ...]) -> Iterator[Append]:
    """One safetensors file with a tensor `frames`, uint8 of `shape` `[T, H, W, 3]`; it is there on leaving, when all T
    frames have come."""
    whole, done = torch.empty(shape, dtype=torch.uint8), 0

    def append(frames: torch.Tensor) -> None:
        nonlocal done
        whole[done : done + len(frames)] = frames
        done += len(frames)

    yield append
    assert done == len(whole), f"{done} of {len(whole)} frames"
    write_tensor(target, "frames", whole)
