"""What a clip of one moving shape shows: its colour, its background, where it goes. NumPy only."""

from dataclasses import dataclass

import numpy as np

OBJECTS = {
    "red": (225, 35, 35),
    "green": (30, 170, 60),
    "blue": (45, 85, 240),
    "yellow": (245, 220, 40),
    "cyan": (40, 215, 225),
    "magenta": (215, 50, 205),
    "orange": (250, 135, 25),
    "white": (250, 250, 250),
}
BACKGROUNDS = {"black": (10, 10, 10), "white": (242, 242, 242), "gray": (120, 120, 120), "navy": (18, 22, 72)}

_APART = 60.0  # a pixel this far from the background (Euclidean, of 8-bit RGB) belongs to the object
_SMALLEST = 0.01  # of the frame's area; less is a speck, not an object
_STILL = 0.05  # of the frame's side; less is no movement


@dataclass(frozen=True)
class Seen:
    """present: per frame, whether there is an object. path: its centre `(x, y)` per frame in pixels, y down (NaN
    where there is none). direction: the sign of its way from first to last frame in x and y."""

    colour: str
    background: str
    present: np.ndarray
    path: np.ndarray
    direction: tuple[int, int]


def describe(frames: np.ndarray) -> Seen:
    """Read a clip, uint8 `[T, H, W, 3]`."""
    pixels = frames.astype(np.float64)
    backgrounds = [np.median(border(frame), axis=0) for frame in pixels]
    masks = [np.linalg.norm(frame - back, axis=-1) > _APART for frame, back in zip(pixels, backgrounds, strict=True)]
    present = np.array([mask.mean() >= _SMALLEST for mask in masks])
    path = np.array([centre(mask) if there else (np.nan, np.nan) for mask, there in zip(masks, present, strict=True)])
    inside = np.concatenate([frame[mask] for frame, mask in zip(pixels, masks, strict=True)])
    colour = nearest(np.median(inside, axis=0), OBJECTS) if len(inside) else "none"
    background = nearest(np.median(backgrounds, axis=0), BACKGROUNDS)
    return Seen(colour, background, present, path, direction(path[present], frames.shape[2], frames.shape[1]))


def border(frame: np.ndarray) -> np.ndarray:
    """The pixels of the outermost rows and columns, `[n, 3]`."""
    return np.concatenate([frame[0], frame[-1], frame[:, 0], frame[:, -1]])


def centre(mask: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return float(columns.mean()), float(rows.mean())


def direction(path: np.ndarray, width: int, height: int) -> tuple[int, int]:
    """-1, 0 or 1 in x and in y, from the first centre to the last."""
    if len(path) < 2:
        return 0, 0
    way = (path[-1] - path[0]) / (width, height)
    x, y = (int(np.sign(part)) if abs(part) > _STILL else 0 for part in way)
    return x, y


def nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(colour - np.array(palette[name]))))
