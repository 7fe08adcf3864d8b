"""How many bytes a component takes once it is served, from what its files say without being read. Imports no torch."""

import math
import re
from collections.abc import Iterable
from pathlib import Path

from wan_dist.loading.tensor_files import CheckpointError, TensorEntry, read_header, weight_files
from wan_dist.log import logger

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_FORMATS = (".safetensors", ".bin", ".pt", ".pth")
_SHARD_NUMBER = re.compile(r"-\d+-of-\d+")


def served_bytes(folder: Path, *, dtype_bytes: int, keep_fp32: Iterable[str] = ()) -> int | None:
    """Bytes of all of a component's weights in their serving dtype; None where nothing tells.

    dtype_bytes: of floating-point tensors, but 4 where a part of the name is in `keep_fp32`. Counted from safetensors
    headers: of the shards that the index names, in one precision variant. A file whose header cannot be read, and
    pickled weights (.bin, .pt, .pth), count as long as they are, with a warning for the former.
    """
    islands = set(keep_fp32)
    total = 0
    for file in _files(folder) or ():
        if not file.is_file():
            return None
        try:
            if file.suffix != ".safetensors":
                total += file.stat().st_size
            else:
                total += sum(_served(entry, dtype_bytes, islands) for entry in read_header(file).values())
        except CheckpointError as error:
            logger.warning("%s; its length stands in for the size of its tensors", error)
            total += file.stat().st_size
    return total or None


def _served(entry: TensorEntry, dtype_bytes: int, islands: set[str]) -> int:
    if entry.dtype not in _FLOATS:
        return entry.nbytes
    return math.prod(entry.shape) * (4 if islands.intersection(entry.name.split(".")) else dtype_bytes)


def _files(folder: Path) -> list[Path] | None:
    """The files that would be loaded; else one variant (fp16, bf16, ...) of one format, the plain one first; None where
    there are none, or not all."""
    try:
        return weight_files(folder)[0]
    except CheckpointError:
        if any(folder.glob("*.safetensors.index.json")):
            return None  # a shard that it names is not there
    for suffix in _FORMATS:
        variants: dict[str, list[Path]] = {}
        for file in sorted(folder.glob(f"*{suffix}")):
            variants.setdefault(_SHARD_NUMBER.sub("", file.name), []).append(file)
        if variants:
            return variants[min(variants, key=lambda name: (name.count("."), name))]
    return None
