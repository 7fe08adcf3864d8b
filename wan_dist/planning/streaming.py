"""How deep to prefetch when blocks are streamed: arithmetic over a block's copy and its computing.

With n blocks of which k stay on the device, a copy has the computing of n / (n - k) blocks to hide behind before the
next one starts; with a depth of p, it may begin p such turns ahead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

_DEEPEST = 4  # deeper, a ring only widens: copies that are longer on average than what they hide behind stay so


@dataclass(frozen=True)
class Streaming:
    """prefetch: blocks on their way beside the one that computes. copy_s, compute_s: of one block and visit (a visit
    serves both guidance branches where one rank computes both); None where copies do not run beside computing."""

    prefetch: int
    resident_blocks: int
    blocks: int
    copy_s: float | None = None
    compute_s: float | None = None

    @property
    def hidden(self) -> float:
        """The share of the copying that computing hides."""
        if self.copy_s is None or self.compute_s is None:
            return 0.0
        if self.resident_blocks >= self.blocks:
            return 1.0
        if self.prefetch == 0:
            return 0.0
        return min(1.0, _between_copies(self.compute_s, self.blocks, self.resident_blocks) / self.copy_s)

    @property
    def is_transfer_bound(self) -> bool:
        """Whether a block's copy takes longer than its computing."""
        return self.copy_s is not None and self.compute_s is not None and self.copy_s > self.compute_s

    def exposed_s(self) -> float:
        """Seconds that one pass over all blocks waits for copies."""
        if self.copy_s is None:
            return 0.0
        return (self.blocks - self.resident_blocks) * self.copy_s * (1 - self.hidden)


def choose_streaming(
    blocks: Sequence[int],
    *,
    compute_s: float | None,
    bytes_per_s: float | None,
    prefetch: int | None = None,
    resident_blocks: int | None = None,
    least_prefetch: int = 1,
    may_stay: int = 0,
) -> Streaming:
    """The smallest depth at which a block's copy hides behind the computing of the blocks before it.

    blocks: bytes of each. compute_s: of one block and visit. bytes_per_s: from host to device; None where nothing
    overlaps (a CPU). prefetch, resident_blocks: the user's orders, taken as they are. may_stay: how many blocks there
    is room for beside the ring; they are used only as far as hiding the copies needs them.
    """
    count = len(blocks)
    copy_s = max(blocks, default=0) / bytes_per_s if bytes_per_s and compute_s else None
    compute_s = compute_s if copy_s is not None else None
    if resident_blocks is None:
        resident_blocks = 0
        if copy_s and compute_s and copy_s > compute_s:
            resident_blocks = min(may_stay, ceil(count * (1 - compute_s / copy_s)))
    if prefetch is None:
        prefetch = least_prefetch
        if copy_s and compute_s and resident_blocks < count:
            turns = ceil(copy_s / _between_copies(compute_s, count, resident_blocks))
            prefetch = max(least_prefetch, min(turns, _DEEPEST))
    return Streaming(prefetch, resident_blocks, count, copy_s, compute_s)


def _between_copies(compute_s: float, blocks: int, resident: int) -> float:
    return compute_s * blocks / (blocks - resident)
