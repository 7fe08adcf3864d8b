"""What a clip of one moving shape shows, from its frames alone: colour, shape, background, direction. NumPy only."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from wan_dist.shapes.outlines import signed_distance
from wan_dist.shapes.vocabulary import BACKGROUNDS, COLOURS, DIRECTIONS, RGB, SHAPES, Scene

_APART = 30.0  # of 255 in any channel: what differs less from the background is background
_SHARE = 0.5  # of the strongest difference in a frame; anti-aliased and smeared edges are half in
_CORE = 0.85  # of the object's median difference: its inside, without edges
_AREA = (0.012, 0.35)  # of the frame: less is a speck, more is no object
_EDGE = 4  # pixels around an object that may be of neither colour
_BORDER = 3  # rows and columns at each edge that are taken for the background
_STILL = 3.0  # pixels between the first and the last centre; less is no movement

QUESTIONS = ("colour", "shape", "direction", "background")


@dataclass(frozen=True)
class Seen:
    """What a clip shows; `none` where there is nothing to say. present: per frame, whether there is an object. path:
    its centre `(x, y)` in each frame that has one, in pixels, y down. likeness: of each shape, the mean intersection
    over union with its ideal outline of the same area and centre. stray: the share of pixels away from the object that
    are not of the background's colour."""

    colour: str
    shape: str
    direction: str
    background: str
    present: np.ndarray
    path: np.ndarray
    likeness: dict[str, float]
    stray: float

    def answers(self, asked: Scene) -> dict[str, bool]:
        """Of each of QUESTIONS whether it is as asked, and `present`: an object in every frame."""
        found = {question: getattr(self, question) == getattr(asked, question) for question in QUESTIONS}
        return {**found, "present": bool(self.present.all())}


def describe(frames: np.ndarray) -> Seen:
    """Read a clip, uint8 `[T, H, W, 3]`."""
    pixels = frames.astype(np.float32)
    edges = [pixels[:, :_BORDER], pixels[:, -_BORDER:], pixels[:, :, :_BORDER], pixels[:, :, -_BORDER:]]
    background = np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)
    masks = [_object(frame, background) for frame in pixels]
    present = np.array([mask is not None for mask in masks])
    found = [(frame, mask) for frame, mask in zip(pixels, masks, strict=True) if mask is not None]
    named = _nearest(background, BACKGROUNDS)
    stray = float(np.mean([_stray(frame, mask, background) for frame, mask in zip(pixels, masks, strict=True)]))
    if not found:
        return Seen("none", "none", "none", named, present, np.empty((0, 2)), dict.fromkeys(SHAPES, 0.0), stray)
    colour = np.median([_inside(frame, mask, background) for frame, mask in found], axis=0)
    path = np.array([_centre(mask) for _, mask in found])
    likeness = {shape: float(np.mean([_overlap(mask, shape) for _, mask in found])) for shape in SHAPES}
    return Seen(
        colour=_nearest(colour, COLOURS),
        shape=max(likeness, key=lambda shape: likeness[shape]),
        direction=_direction(path),
        background=named,
        present=present,
        path=path,
        likeness=likeness,
        stray=stray,
    )


def _object(frame: np.ndarray, background: np.ndarray) -> np.ndarray | None:
    """The pixels of the largest connected thing that is not background, `[H, W]`; None where it is no object."""
    apart = np.abs(frame - background).max(axis=-1)
    strongest = np.percentile(apart, 99.5)
    if strongest <= _APART:
        return None
    mask = _largest(apart > max(_APART, _SHARE * strongest))
    least, most = _AREA
    return mask if least <= mask.mean() <= most else None


def _largest(mask: np.ndarray) -> np.ndarray:
    """Its largest part that hangs together by rows and columns."""
    left = set(zip(*(index.tolist() for index in np.nonzero(mask)), strict=True))
    best: list[tuple[int, int]] = []
    while left:
        part = [left.pop()]
        for row, column in part:  # grows while it is walked through
            for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if near in left:
                    left.remove(near)
                    part.append(near)
        best = max(best, part, key=len)
    found = np.zeros_like(mask)
    rows, columns = zip(*best, strict=True)
    found[list(rows), list(columns)] = True
    return found


def _stray(frame: np.ndarray, mask: np.ndarray | None, background: np.ndarray) -> float:
    near = np.zeros(frame.shape[:2], dtype=bool) if mask is None else mask.copy()
    for _ in range(_EDGE):
        rows, columns = near.copy(), near.copy()
        rows[1:] |= near[:-1]
        rows[:-1] |= near[1:]
        columns[:, 1:] |= near[:, :-1]
        columns[:, :-1] |= near[:, 1:]
        near = rows | columns
    away = np.abs(frame - background).max(axis=-1)[~near]
    return float((away > _APART).mean()) if away.size else 0.0


def _inside(frame: np.ndarray, mask: np.ndarray, background: np.ndarray) -> np.ndarray:
    apart = np.abs(frame - background).max(axis=-1)
    return np.median(frame[mask & (apart > _CORE * np.median(apart[mask]))], axis=0)


def _centre(mask: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return float(columns.mean()) + 0.5, float(rows.mean()) + 0.5


def _overlap(mask: np.ndarray, shape: str) -> float:
    """Intersection over union with the ideal shape of the same area and centre."""
    share, (off_x, off_y) = _ideal(shape)
    size = float(np.sqrt(mask.sum() / share))
    x, y = _centre(mask)
    rows, columns = np.indices(mask.shape) + 0.5
    ideal = signed_distance(shape, columns - x + off_x * size, rows - y + off_y * size, size) < 0
    return float((ideal & mask).sum() / (ideal | mask).sum())


@cache
def _ideal(shape: str) -> tuple[float, tuple[float, float]]:
    """Area over size squared, and where the centre of mass lies, in sizes."""
    size, half = 100.0, 200
    grid = np.arange(-half, half) + 0.5
    x, y = np.meshgrid(grid, grid)
    inside = signed_distance(shape, x, y, size) < 0
    rows, columns = np.nonzero(inside)
    return inside.sum() / size**2, (float(grid[columns].mean()) / size, float(grid[rows].mean()) / size)


def _direction(path: np.ndarray) -> str:
    """By the angle of the way from the first centre to the last."""
    way = path[-1] - path[0]
    if np.hypot(*way) < _STILL:
        return "still"
    moving = {name: np.array(signs) / np.hypot(*signs) for name, signs in DIRECTIONS.items() if name != "still"}
    return max(moving, key=lambda name: float(moving[name] @ way))


def _nearest(colour: np.ndarray, palette: dict[str, RGB]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(colour - np.array(palette[name]))))
