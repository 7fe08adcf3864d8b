"""One picture and one animation of several videos."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from wan_dist.output.contact_sheet import Clip, contact_sheet, read_clip, side_by_side, write_pictures
from wan_dist.output.video import mp4_writer


def clip(frames: int, height: int, width: int, level: int) -> Clip:
    return Clip(np.full((frames, height, width, 3), level, dtype=np.uint8), 8.0, f"level {level}")


@pytest.fixture
def written(tmp_path):
    changing = np.random.default_rng(0).integers(0, 255, (17, 64, 96, 3), dtype=np.uint8)  # equal frames are made one
    return write_pictures(tmp_path / "demo.v1", [clip(9, 64, 64, 200), Clip(changing, 8.0, "noise")])


def test_the_sheet_has_a_row_a_video():
    sheet = contact_sheet([clip(9, 64, 64, 200), clip(17, 64, 96, 40)])
    assert sheet.size == (6 * (2 * 96 + 4) + 4, 2 * (14 + 128 + 4) + 4)
    assert sheet.getpixel((10, 4 + 14 + 64)) == (200,) * 3 and sheet.getpixel((10, 150 + 14 + 64)) == (40,) * 3


def test_a_shorter_video_waits_at_its_last_frame():
    short = Clip(np.arange(3, dtype=np.uint8).repeat(3).reshape(3, 1, 1, 3) * 100, 8.0, "")
    shown = side_by_side([short, clip(5, 1, 1, 7)])
    assert [frame.convert("RGB").getpixel((0, 0))[0] for frame in shown] == [0, 100, 200, 200, 200]


def test_both_files_are_pictures(written):
    assert [path.name for path in written] == ["demo.v1.png", "demo.v1.gif"]
    assert sorted(path.name for path in written[0].parent.iterdir()) == ["demo.v1.gif", "demo.v1.png"]
    with Image.open(written[1]) as animation:
        assert animation.info["duration"] in (120, 125, 130) and animation.info["loop"] == 0
        assert animation.size == (128 + 4 + 192, 128)


def test_a_clip_is_read_with_its_prompt(tmp_path):
    with mp4_writer(tmp_path / "a.mp4", (16, 32), 8.0) as append:
        append(torch.full((5, 16, 32, 3), 128, dtype=torch.uint8))
    (tmp_path / "a.json").write_text(json.dumps({"request": {"prompt": "a cat, surfing"}}))
    read = read_clip(tmp_path / "a.mp4")
    assert read.frames.shape == (5, 16, 32, 3) and abs(int(read.frames.mean()) - 128) < 3
    assert (read.fps, read.title) == (8.0, "a cat, surfing")
