"""Parallelism degrees: how many ranks a config asks for, and the mesh that `parallelism=auto` picks."""

from math import prod

from wan_dist.config.schema import ParallelismConfig
from wan_dist.planning.refusal import Refusal

AXES = ("dp", "cfg", "ring", "ulysses", "tp")


def given_degrees(parallelism: ParallelismConfig) -> dict[str, int]:
    """The degrees that are not null, by axis."""
    return {axis: degree for axis in AXES if (degree := getattr(parallelism, axis)) is not None}


def wanted_ranks(parallelism: ParallelismConfig, *, world: int | None, asked: int | None, found: int) -> int:
    """Number of ranks: torchrun's `world`, else `runtime.ranks` (`asked`), else the product of the degrees that are
    given, else `found` (what this machine suggests)."""
    given = given_degrees(parallelism)
    if world is not None:
        return world
    if asked is not None:
        return asked
    return prod(given.values()) if given else found


def usable_ranks(ranks: int, *, heads: int, guided: bool) -> int:
    """Of `ranks` that nobody ordered, as many as a mesh of guidance and Ulysses can use: a head for each at least."""
    cfg = 2 if guided and ranks % 2 == 0 else 1
    return cfg * min(ranks // cfg, heads)


def choose_degrees(
    parallelism: ParallelismConfig, ranks: int, *, guided: bool, source: str
) -> tuple[dict[str, int], list[Refusal]]:
    """A degree for every axis whose product is `ranks`; the given ones are orders.

    Policy for what is left: guidance first (its two halves exchange one small tensor a step), then Ulysses.
    source: where `ranks` comes from, for the message.
    """
    given = given_degrees(parallelism)
    product = prod(given.values())
    degrees = {axis: given.get(axis, 1) for axis in AXES}
    shown = " x ".join(f"{axis} {degree}" for axis, degree in given.items() if degree > 1) or "all degrees 1"
    rest, over = divmod(ranks, product)
    if over == 0 and rest > 1 and "cfg" not in given and guided and rest % 2 == 0:
        degrees["cfg"], rest = 2, rest // 2
    if over == 0 and rest > 1 and "ulysses" not in given:
        degrees["ulysses"], rest = rest, 1
    if over or rest != 1:
        why = f"{shown} is a mesh of {product}, but {source} is {ranks}"
        remedy = f"make the product of the degrees {ranks}, or start {product}"
        return degrees, [Refusal("parallelism", "x".join(map(str, given.values())) or "auto", why, remedy)]
    return degrees, []
