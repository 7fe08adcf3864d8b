"""How many rows a CPU computes with, as arithmetic: `wan_dist.layers.rows` says why, and pads. Imports no torch."""

from math import gcd

ROWS = 4
_ELEMENTS = 256  # 16 lanes of AVX-512, unrolled, for a few threads


def cpu_rows(count: int, width: int) -> int:
    """The number of rows to compute with where `count` are wanted and the activation is `width` wide: at least four,
    and so many that `rows * width` is a multiple of 256."""
    step = _ELEMENTS // gcd(width, _ELEMENTS)
    return max(-(-count // step) * step, ROWS)
