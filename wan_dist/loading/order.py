"""In which order components are loaded: the largest on the device first, while there is room to be fragmented.

The order is a pure function of sizes and names, and rank 0's is everyone's, since ranks that load together exchange
messages in that order. The pipeline has phases (text encoder, transformers, VAE), each of which frees what it loaded
before the next where memory asks for it; the order is that of the components within one.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wan_dist.distributed.collectives import gather_objects
from wan_dist.distributed.mesh import Axis

_RISK = {"transformer": 0, "text_encoder": 1, "image_encoder": 2, "vae": 3}  # of failing for want of memory
_OTHER_RISK = 10
_NUMBERED = re.compile(r"(.+)_(\d+)")


@dataclass(frozen=True)
class ComponentLoadSpec:
    """A component to be loaded. index: its place in the checkpoint's own list; device_bytes: what it will take on one
    device under the plan (serving dtype, tensor parallelism, FSDP), None where that is unknown."""

    name: str
    index: int
    device_bytes: int | None

    @property
    def base_name(self) -> str:
        """`transformer` of `transformer_2`."""
        numbered = _NUMBERED.fullmatch(self.name)
        return numbered[1] if numbered else self.name

    @property
    def variant(self) -> int:
        """2 of `transformer_2`; 1 where the name has no number."""
        numbered = _NUMBERED.fullmatch(self.name)
        return int(numbered[2]) if numbered else 1


def device_bytes(served: int | None, *, tp: int = 1, fsdp_shards: int = 1) -> int | None:
    """What one rank holds of `served` bytes that are divided over both axes, rounded up. Norms and embeddings, which
    tensor parallelism leaves whole, are counted as divided: the order asks for no more."""
    return None if served is None else -(-served // (tp * fsdp_shards))


def order_component_load_specs(specs: Iterable[ComponentLoadSpec]) -> list[ComponentLoadSpec]:
    """Larger on the device first (unknown counts as large), then by risk, then the higher variant, then by index."""

    def key(spec: ComponentLoadSpec) -> tuple[bool, int, int, int, int]:
        risk = _RISK.get(spec.base_name, _OTHER_RISK)
        return spec.device_bytes is not None, -(spec.device_bytes or 0), risk, -spec.variant, spec.index

    return sorted(specs, key=key)


def agreed_order(axis: Axis, specs: Sequence[ComponentLoadSpec]) -> list[str]:
    """The names in rank 0's order, on every rank of the axis: files may look different from another node."""
    return gather_objects(axis, [spec.name for spec in order_component_load_specs(specs)])[0]
