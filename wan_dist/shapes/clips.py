"""Clips to train and test `wan_shapes` on: a scene with all that its words leave open, and its frames. NumPy."""

import random
from dataclasses import dataclass, replace

import numpy as np

from wan_dist.shapes.outlines import EXTENT, signed_distance
from wan_dist.shapes.vocabulary import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, Scene

DRAWN = 2  # which clip a seed draws: counted up where that changes
Colour = tuple[float, float, float]  # red, green, blue, of 255
Pair = tuple[float, float]  # x and y; y points down

# Half the width of a shape in pixels, by the word for its size ("" where none is said), and how often the word is used.
SIZES: dict[str, Pair] = {"": (8.0, 13.0), "small": (7.0, 8.5), "large": (12.0, 14.0)}
_SIZE_WEIGHTS = (6, 2, 2)
_DIRECTION_WEIGHTS = {"still": 4} | dict.fromkeys(("right", "left", "up", "down"), 5)
_DIAGONAL_WEIGHT = 2
# What is harder to draw is seen more often.
_SHAPE_WEIGHTS = {"circle": 2, "square": 3, "triangle": 2, "star": 4}
_FASTEST, _SLOWEST = 2.6, 1.2  # pixels a frame, in x and in y
_MARGIN = 1.0  # pixels between an object and the frame's edge
_JITTER = 6.0  # of 255: colours are never quite those of the table


@dataclass(frozen=True)
class Clip:
    """A scene, drawn. size: a key of SIZES. radius: nominal half width in pixels. start: where the centre is in the
    first frame, in pixels; speed: pixels a frame, constant."""

    scene: Scene
    size: str
    radius: float
    colour: Colour
    background: Colour
    start: Pair
    speed: Pair


def draw_clip(rng: random.Random, height: int = 64, width: int = 64, frames: int = 17) -> Clip:
    """A clip of a random scene, whose object stays in the frame for all `frames`. `height`, `width` in pixels."""
    background = rng.choice(list(BACKGROUNDS))
    colour = rng.choice([name for name in COLOURS if name != background])
    weights = [_DIRECTION_WEIGHTS.get(name, _DIAGONAL_WEIGHT) for name in DIRECTIONS]
    shape = rng.choices(SHAPES, [_SHAPE_WEIGHTS[name] for name in SHAPES])[0]
    scene = Scene(colour, shape, rng.choices(list(DIRECTIONS), weights)[0], background)
    return place(scene, rng, height, width, frames)


def place(scene: Scene, rng: random.Random, height: int = 64, width: int = 64, frames: int = 17) -> Clip:
    """A clip of this scene: size, colours, speed and start at random."""
    size = rng.choices(list(SIZES), _SIZE_WEIGHTS)[0]
    radius = rng.uniform(*SIZES[size])
    edge = EXTENT[scene.shape] * radius + _MARGIN
    room = (width - 2 * edge, height - 2 * edge)  # of the centre
    signs, moves = DIRECTIONS[scene.direction], frames - 1
    pace = _pace(rng, min((free for free, sign in zip(room, signs, strict=True) if sign), default=0.0) / max(moves, 1))
    speed = (signs[0] * pace, signs[1] * pace)
    return Clip(
        scene=scene,
        size=size,
        radius=radius,
        colour=_jittered(COLOURS[scene.colour], rng),
        background=_jittered(BACKGROUNDS[scene.background], rng),
        start=(_start(rng, edge, room[0], speed[0] * moves), _start(rng, edge, room[1], speed[1] * moves)),
        speed=speed,
    )


def recoloured(clip: Clip, rng: random.Random) -> Clip:
    """The same in any two colours, which no word need name."""

    def colour() -> Colour:
        return rng.uniform(0, 255), rng.uniform(0, 255), rng.uniform(0, 255)

    return replace(clip, colour=colour(), background=colour())


def coverage(clip: Clip, height: int = 64, width: int = 64, frames: int = 17, corner: Pair = (0.0, 0.0)) -> np.ndarray:
    """How much of each pixel the object covers, fp32 `[T, H, W]` in 0..1: its outline is anti-aliased over one pixel.
    corner: the upper left one of what is looked at, in pixels of the clip."""
    time = np.arange(frames, dtype=np.float32)[:, None, None]
    x = np.arange(width, dtype=np.float32) + np.float32(0.5 + corner[0] - clip.start[0])
    y = np.arange(height, dtype=np.float32)[:, None] + np.float32(0.5 + corner[1] - clip.start[1])
    x, y = np.broadcast_arrays(x - np.float32(clip.speed[0]) * time, y - np.float32(clip.speed[1]) * time)
    distance = signed_distance(clip.scene.shape, x, y, clip.radius)
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def paint(clip: Clip, covered: np.ndarray) -> np.ndarray:
    """Frames of 8 bits a channel, as fp32 `[3, T, H, W]` in -1..1. covered: as from `coverage`."""
    front, back = (np.array(colour, np.float32)[:, None, None, None] for colour in (clip.colour, clip.background))
    return np.round(back + (front - back) * covered) / np.float32(127.5) - 1


def render(clip: Clip, height: int = 64, width: int = 64, frames: int = 17) -> np.ndarray:
    """The whole clip, fp32 `[3, T, H, W]` in -1..1."""
    return paint(clip, coverage(clip, height, width, frames))


def centre(clip: Clip, frame: int) -> Pair:
    """Of the object in a frame, in pixels."""
    return clip.start[0] + clip.speed[0] * frame, clip.start[1] + clip.speed[1] * frame


def _pace(rng: random.Random, most: float) -> float:
    """Pixels a frame in each axis that moves; most: what the room allows."""
    fastest = min(_FASTEST, most)
    slowest = _SLOWEST if fastest >= _SLOWEST / 0.75 else 0.6 * fastest
    return rng.uniform(slowest, fastest)


def _start(rng: random.Random, edge: float, room: float, way: float) -> float:
    """Where the centre may begin along one axis, `way` pixels before its end."""
    return edge + rng.random() * (room - abs(way)) + max(-way, 0.0)


def _jittered(colour: tuple[int, int, int], rng: random.Random) -> Colour:
    red, green, blue = (min(255.0, max(0.0, value + rng.uniform(-_JITTER, _JITTER))) for value in colour)
    return red, green, blue
