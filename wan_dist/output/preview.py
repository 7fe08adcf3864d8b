"""A few frames of a video as coloured half blocks, for a terminal without graphics (`output.preview=true`)."""

import os
import shutil
import sys
from collections.abc import Mapping
from typing import TextIO

import numpy as np
import torch
from PIL import Image

_HALF_BLOCK = "▀"  # its colour is the upper pixel, the background's the lower
_FRAMES = 4
_RESET = "\x1b[0m"


class Preview:
    """Keeps the frames to show as they come; `append` is a writer like those of files."""

    def __init__(self, frames: int) -> None:
        self._wanted = set(np.linspace(0, frames - 1, min(_FRAMES, frames)).round().astype(int).tolist())
        self._kept: list[np.ndarray] = []
        self._seen = 0

    def append(self, frames: torch.Tensor) -> None:
        """The next frames, uint8 `[t, H, W, 3]`."""
        self._kept += [frame.numpy() for index, frame in enumerate(frames, self._seen) if index in self._wanted]
        self._seen += len(frames)

    def show(self, stream: TextIO | None = None, env: Mapping[str, str] = os.environ) -> None:
        """Print what was kept (stream: None is stderr), or one line that says why it cannot be shown. A terminal that
        is gone fails no run."""
        stream = stream or sys.stderr
        reason = why_not(stream, env)
        width = shutil.get_terminal_size().columns
        text = f"wan-dist: no preview: {reason}\n" if reason else half_blocks(self._kept, width, **_colours(env))
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            return


def why_not(stream: TextIO, env: Mapping[str, str]) -> str | None:
    """Why a stream cannot show coloured half blocks, or None."""
    if env.get("NO_COLOR"):
        return "NO_COLOR is set"
    try:
        _HALF_BLOCK.encode(stream.encoding or "ascii")
    except UnicodeError:
        return f"{stream.encoding} has no half blocks; use a terminal with UTF-8"
    return None


def half_blocks(frames: list[np.ndarray], columns: int, *, true_colour: bool) -> str:
    """Frames, uint8 `[H, W, 3]`, side by side in `columns` characters: two pixels in each, one above the other, and no
    frame larger than it is. Without true_colour, in the 6 x 6 x 6 colours that terminals have had longer."""
    height, width = frames[0].shape[:2]
    fitting = max(1, min(width, (columns - len(frames) + 1) // len(frames)))
    rows = max(2, 2 * round(height * fitting / width / 2))
    small = [np.asarray(Image.fromarray(f).resize((fitting, rows), Image.Resampling.BOX)) for f in frames]
    lines = (
        " ".join(_line(frame[row], frame[row + 1], true_colour=true_colour) for frame in small)
        for row in range(0, rows, 2)
    )
    return "".join(f"{line}\n" for line in lines)


def _line(upper: np.ndarray, lower: np.ndarray, *, true_colour: bool) -> str:
    """One row of characters; colours are said where they change."""
    said, last = [], None
    for pair in zip(upper.tolist(), lower.tolist(), strict=True):
        if pair != last:
            codes = zip((38, 48), pair, strict=True)
            said.append("".join(f"\x1b[{which};{_code(colour, true_colour)}m" for which, colour in codes))
            last = pair
        said.append(_HALF_BLOCK)
    return "".join(said) + _RESET


def _code(colour: list[int], true_colour: bool) -> str:
    if true_colour:
        return "2;" + ";".join(map(str, colour))
    red, green, blue = (round(level / 255 * 5) for level in colour)
    return f"5;{16 + 36 * red + 6 * green + blue}"


def _colours(env: Mapping[str, str]) -> dict[str, bool]:
    return {"true_colour": env.get("COLORTERM", "") in ("truecolor", "24bit")}
