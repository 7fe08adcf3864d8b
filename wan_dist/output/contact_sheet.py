"""Several videos on one picture, and side by side in one animation:
`python -m wan_dist.output.contact_sheet outputs/demo outputs/demo/0/video.mp4 outputs/demo/1/video.mp4`
writes `outputs/demo.png` and `outputs/demo.gif`.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from wan_dist.output.files import atomic

_LARGER = 2  # times, so that small videos can be seen
_FRAMES = 6  # of each video on the sheet
_GAP, _TEXT = 4, 14  # pixels: between pictures, and for a line of text
_COLOURS = 128  # of each frame of the animation
_PAPER, _INK = (255, 255, 255), (0, 0, 0)


@dataclass(frozen=True)
class Clip:
    """frames: uint8 `[T, H, W, 3]`. fps: frames a second. title: its prompt."""

    frames: np.ndarray
    fps: float
    title: str

    def picture(self, index: int) -> Image.Image:
        """One frame, enlarged without smoothing; a clip that is over stays at its last."""
        frame = Image.fromarray(self.frames[min(index, len(self.frames) - 1)])
        return frame.resize((_LARGER * frame.width, _LARGER * frame.height), Image.Resampling.NEAREST)


def read_clip(video: Path) -> Clip:
    """An mp4 that a run has made, with the prompt from the run's record beside it. Raises OSError, or av's errors."""
    import av

    record = json.loads(video.with_suffix(".json").read_text("utf-8"))
    with av.open(str(video)) as container:
        rate = container.streams.video[0].average_rate
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return Clip(frames, float(rate or 1), record["request"]["prompt"])


def contact_sheet(clips: list[Clip]) -> Image.Image:
    """A row for each clip: its title above evenly spaced frames."""
    rows = [
        [clip.picture(index) for index in np.linspace(0, len(clip.frames) - 1, _FRAMES).round().astype(int).tolist()]
        for clip in clips
    ]
    heights = [_TEXT + max(picture.height for picture in row) + _GAP for row in rows]
    width = max(sum(picture.width + _GAP for picture in row) for row in rows) + _GAP
    sheet = Image.new("RGB", (width, sum(heights) + _GAP), _PAPER)
    write, top = ImageDraw.Draw(sheet), _GAP
    for clip, row, height in zip(clips, rows, heights, strict=True):
        write.text((_GAP, top), clip.title, fill=_INK)
        left = _GAP
        for picture in row:
            sheet.paste(picture, (left, top + _TEXT))
            left += picture.width + _GAP
        top += height
    return sheet


def side_by_side(clips: list[Clip]) -> list[Image.Image]:
    """The frames of an animation that shows all clips at once."""
    together = []
    for index in range(max(len(clip.frames) for clip in clips)):
        pictures = [clip.picture(index) for clip in clips]
        size = sum(picture.width + _GAP for picture in pictures) - _GAP, max(picture.height for picture in pictures)
        frame, left = Image.new("RGB", size, _PAPER), 0
        for picture in pictures:
            frame.paste(picture, (left, 0))
            left += picture.width + _GAP
        together.append(frame.quantize(_COLOURS, dither=Image.Dither.NONE))
    return together


def write_pictures(target: Path, clips: list[Clip]) -> list[Path]:
    """`target` with .png (the sheet) and .gif (the animation, at the first clip's rate, for ever); returns both."""
    sheet, animation = (target.with_name(target.name + suffix) for suffix in (".png", ".gif"))
    with atomic(sheet) as scratch:
        contact_sheet(clips).save(scratch, "PNG")
    first, *others = side_by_side(clips)
    with atomic(animation) as scratch:
        duration = round(1000 / clips[0].fps)
        first.save(scratch, "GIF", save_all=True, append_images=others, duration=duration, loop=0)
    return [sheet, animation]


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit("usage: python -m wan_dist.output.contact_sheet TARGET VIDEO.mp4 [VIDEO.mp4 ...]")
    try:
        clips = [read_clip(Path(name)) for name in sys.argv[2:]]
        print("\n".join(map(str, write_pictures(Path(sys.argv[1]), clips))))
    except (OSError, KeyError, ValueError) as error:  # av's errors are OSError or ValueError
        sys.exit(f"contact_sheet: {error}")


if __name__ == "__main__":
    main()
