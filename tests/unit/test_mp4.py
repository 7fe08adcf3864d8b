"""The mp4 is one that ordinary players accept, and shows what the frames show; frames are written as they come."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from wan_dist.output.video import frames_writer, mp4_writer

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 40, 90), (30, 160, 220)]


def decoded(path) -> tuple[object, list[av.VideoFrame]]:
    with av.open(str(path)) as container:
        return container.streams.video[0].codec_context, list(container.decode(video=0))


def write_mp4(target, frames: torch.Tensor, fps: float) -> None:
    """As a decoder delivers them: one frame, then four at a time."""
    with mp4_writer(target, tuple(frames.shape[1:3]), fps) as append:
        for chunk in (frames[:1], *frames[1:].split(4)):
            append(chunk)


def flat(count: int, height: int = 32, width: int = 48) -> torch.Tensor:
    colours = [COLOURS[n % len(COLOURS)] for n in range(count)]
    return torch.tensor(colours, dtype=torch.uint8)[:, None, None].expand(-1, height, width, -1).contiguous()


@pytest.mark.parametrize("size", [(1, 16, 16), (9, 32, 48), (17, 64, 64), (3, 480, 832)])
def test_count_size_and_format(tmp_path, size):
    write_mp4(tmp_path / "x.mp4", flat(*size), 16)
    codec, frames = decoded(tmp_path / "x.mp4")
    assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
    assert (len(frames), frames[0].height, frames[0].width) == size
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


@pytest.mark.parametrize("fps", [16, 24, 8.0, 23.976, 29.97, 7.5, 0.5])
def test_frames_a_second(tmp_path, fps):
    write_mp4(tmp_path / "x.mp4", flat(5), fps)
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        assert abs(stream.average_rate - Fraction(fps)) < 1e-3
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([n / fps for n in range(5)], abs=1e-3)


def test_colours_are_kept_and_said_to_be_bt709(tmp_path):
    frames = flat(len(COLOURS))
    write_mp4(tmp_path / "x.mp4", frames, 16)
    codec, found = decoded(tmp_path / "x.mp4")
    assert (codec.colorspace, codec.color_primaries, codec.color_trc) == (1, 1, 1)
    for frame, expected in zip(found, frames.numpy(), strict=True):
        seen = frame.reformat(format="rgb24", src_colorspace="ITU709").to_ndarray()
        assert np.abs(seen.astype(int) - expected.astype(int)).max() <= 4


def test_rows_and_columns_are_where_they_were(tmp_path):
    frames = torch.zeros(4, 64, 96, 3, dtype=torch.uint8)
    frames[:, :16, :32] = 250
    write_mp4(tmp_path / "x.mp4", frames, 16)
    for frame in decoded(tmp_path / "x.mp4")[1]:
        seen = frame.to_ndarray(format="gray")
        assert seen[:12, :28].min() > 200
        assert max(seen[20:].max(), seen[:, 36:].max()) < 40


def test_the_index_comes_before_the_data(tmp_path):
    write_mp4(tmp_path / "x.mp4", flat(5), 16)
    content = (tmp_path / "x.mp4").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


def test_a_failure_leaves_no_file(tmp_path):
    with pytest.raises(ValueError):
        write_mp4(tmp_path / "x.mp4", torch.zeros(2, 32, 48, 7, dtype=torch.uint8), 16)
    assert list(tmp_path.iterdir()) == []


def test_frames_are_kept_as_they_come(tmp_path):
    frames = torch.randint(0, 256, (9, 16, 24, 3), dtype=torch.uint8)
    with frames_writer(tmp_path / "x.safetensors", tuple(frames.shape)) as append:
        for chunk in (frames[:1], frames[1:5], frames[5:]):
            append(chunk)
        assert list(tmp_path.iterdir()) == []
    assert torch.equal(load_file(tmp_path / "x.safetensors")["frames"], frames)


def test_frames_that_stop_coming_leave_no_file(tmp_path):
    with pytest.raises(KeyError), frames_writer(tmp_path / "x.safetensors", (9, 16, 24, 3)) as append:
        append(torch.zeros(1, 16, 24, 3, dtype=torch.uint8))
        raise KeyError
    assert list(tmp_path.iterdir()) == []
