"""Parallelism degrees: how many ranks a config asks for, and the mesh that `parallelism=auto` picks."""

from collections.abc import Mapping
from math import gcd, prod

from wan_dist.config.schema import FsdpConfig, ParallelismConfig
from wan_dist.planning.refusal import Refusal

AXES = ("dp", "cfg", "ring", "ulysses", "tp")
_BALANCED = 0.9  # of the work of the busiest rank, the least that the average rank may do


def given_degrees(parallelism: ParallelismConfig) -> dict[str, int]:
    """The degrees that are not null, by axis."""
    return {axis: degree for axis in AXES if (degree := getattr(parallelism, axis)) is not None}


def degrees_of(parallelism: ParallelismConfig) -> dict[str, int]:
    """Of a resolved config, by axis."""
    return {axis: getattr(parallelism, axis) or 1 for axis in AXES}


def wanted_ranks(parallelism: ParallelismConfig, *, world: int | None, asked: int | None, found: int) -> int:
    """Number of ranks: torchrun's `world`, else `runtime.ranks` (`asked`), else the product of the degrees that are
    given, else `found` (what this machine suggests)."""
    given = given_degrees(parallelism)
    if world is not None:
        return world
    if asked is not None:
        return asked
    return prod(given.values()) if given else found


def balanced_ulysses(ranks: int, heads: int) -> int:
    """How many of `ranks` should share heads (Ulysses), the rest being the ring around them: the largest divisor that
    leaves at most a tenth of the heads' work idle. 1 always does.

    >>> balanced_ulysses(8, heads=40), balanced_ulysses(8, heads=12), balanced_ulysses(3, heads=40)
    (8, 4, 3)
    """
    divisors = [degree for degree in range(1, min(ranks, heads) + 1) if ranks % degree == 0]
    return max(degree for degree in divisors if heads / (degree * -(-heads // degree)) >= _BALANCED)


def fsdp_division(fsdp: FsdpConfig, degrees: Mapping[str, int]) -> tuple[int, int]:
    """Into how many replicas the FSDP axis is divided, and over how many ranks each of them can be sharded: one where
    FSDP is off, or the replicas that are asked for do not divide the axis (which is refused where FSDP is ordered)."""
    size = degrees["cfg"] * degrees["ring"] * degrees["ulysses"]
    if fsdp.enabled == "off" or fsdp.replicate < 1 or size % fsdp.replicate:
        return 1, 1
    return fsdp.replicate, size // fsdp.replicate


def choose_degrees(
    parallelism: ParallelismConfig,
    ranks: int,
    *,
    guided: bool,
    source: str,
    heads: int = 0,
    ranks_per_node: int | None = None,
) -> tuple[dict[str, int], list[Refusal]]:
    """A degree for every axis whose product is `ranks`; the given ones are orders.

    Policy for what is left: guidance first (its two halves exchange one small tensor a step), then Ulysses as far as
    the heads divide well and a node reaches, then the ring.
    source: where `ranks` comes from, for the message. heads: of the model; 0 where unknown. ranks_per_node: where null,
    all of them.
    """
    given = given_degrees(parallelism)
    product = prod(given.values())
    degrees = {axis: given.get(axis, 1) for axis in AXES}
    shown = " x ".join(f"{axis} {degree}" for axis, degree in given.items() if degree > 1) or "all degrees 1"
    rest, over = divmod(ranks, product)
    if over == 0 and rest > 1 and "cfg" not in given and guided and rest % 2 == 0:
        degrees["cfg"], rest = 2, rest // 2
    if over == 0 and rest > 1 and "ulysses" not in given:
        local_heads, inside = heads // degrees["tp"], gcd(rest, (ranks_per_node or ranks) // degrees["tp"])
        if "ring" in given:
            degrees["ulysses"] = rest
        else:
            degrees["ulysses"] = balanced_ulysses(inside, local_heads) if local_heads else inside
        rest //= degrees["ulysses"]
    if over == 0 and rest > 1 and "ring" not in given:
        degrees["ring"], rest = rest, 1
    if over or rest != 1:
        why = f"{shown} is a mesh of {product}, but {source} is {ranks}"
        remedy = f"make the product of the degrees {ranks}, or start {product}"
        return degrees, [Refusal("parallelism", "x".join(map(str, given.values())) or "auto", why, remedy)]
    return degrees, []
