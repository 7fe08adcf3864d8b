"""The outlines of the shapes that `wan_shapes` draws, as signed distances. NumPy only.

Formulas: the distance functions of I. Quilez, https://iquilezles.org/articles/distfunctions2d (triangle by its three
half planes, star by folding the plane twice).
"""

import numpy as np

Array = np.ndarray

_STAR_FOLD = np.array([np.cos(np.pi / 5), -np.sin(np.pi / 5)])  # normal of a mirror of a five-pointed star
_STAR_DEPTH = 0.5
# Half a shape's largest width or height, in units of its size.
EXTENT = {"circle": 1.0, "square": 0.9, "triangle": 1.16, "star": 1.36}


def signed_distance(shape: str, x: Array, y: Array, size: float) -> Array:
    """Distance in pixels from the outline of a shape around the origin, negative inside; y points down. size: nominal
    half width in pixels; shapes of one size have about the same area."""
    return {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star}[shape](x, y, size)


def _circle(x: Array, y: Array, size: float) -> Array:
    return np.sqrt(x * x + y * y) - size


def _square(x: Array, y: Array, size: float) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 0.89 * size


def _triangle(x: Array, y: Array, size: float) -> Array:
    radius, y = 1.32 * size, y - 0.2 * size  # of the circle through its corners
    return np.maximum(y - radius / 2, np.sqrt(0.75) * np.abs(x) - y / 2 - radius / 2)


def _star(x: Array, y: Array, size: float) -> Array:
    radius = 1.34 * size
    x, y = np.abs(x), -y - 0.02 * size
    fold_x, fold_y = _STAR_FOLD
    for sign in (1, -1):  # the five arms onto one
        over = 2 * np.maximum(sign * fold_x * x + fold_y * y, 0)
        x, y = x - over * sign * fold_x, y - over * fold_y
    x, y = np.abs(x), y - radius
    edge_x, edge_y = _STAR_DEPTH * -fold_y, _STAR_DEPTH * fold_x - 1
    along = np.clip((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2), 0, radius)
    return np.hypot(x - edge_x * along, y - edge_y * along) * np.sign(y * edge_x - x * edge_y)
