"""What the safetensors files of one component hold, read from their headers alone. Imports no torch.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data
(https://github.com/huggingface/safetensors#format). Every fault that can be seen without reading weights is found
here, and named by tensor and file: a header that lies would otherwise surface as garbage or as a crash in the middle.
"""

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_MAX_HEADER = 100 << 20  # the limit of the reference implementation
_WEIGHT_STEMS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' file names
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is; the message names the file and, where there is one, the tensor."""


class RemoteCheckpointError(CheckpointError):
    """The same error on a rank that did not find it: the rank that did is the one to report."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in one file: `nbytes` bytes of `dtype` (safetensors' name), from byte `start` of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a component and its index's `weight_map` (None for a single file).

    Raises CheckpointError where there is no safetensors file, or the index names one that is not there.
    """
    for stem in _WEIGHT_STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            weight_map = _read_index(index)
            files = [folder / name for name in sorted(set(weight_map.values()))]
            for file in files:
                if not file.is_file():
                    lost = min(name for name, shard in weight_map.items() if shard == file.name)
                    raise CheckpointError(f"{file}: this shard is missing; {index.name} places tensor {lost!r} in it")
            return files, weight_map
        single = folder / f"{stem}.safetensors"
        if single.is_file():
            return [single], None
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder}: only pickled weights ({', '.join(pickles[:3])}), which can run code when loaded and are "
            "never loaded; convert them with save_pretrained(..., safe_serialization=True)"
        )
    raise CheckpointError(f"{folder}: no safetensors file ({' or '.join(s + '.safetensors' for s in _WEIGHT_STEMS)})")


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not (isinstance(weight_map, dict) and weight_map and all(isinstance(v, str) for v in weight_map.values())):
            raise ValueError("weight_map is not a table of names")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index ({error})") from error
    for name, shard in weight_map.items():
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: places tensor {name!r} outside its folder ({shard})")
    return weight_map


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of one file. Raises CheckpointError for a header or a file length that cannot be right."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if len(prefix) < 8 or not 2 <= length <= _MAX_HEADER or 8 + length > size:
            raise CheckpointError(f"{file}: truncated or not a safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length), object_pairs_hook=lambda pairs: _no_twice(file, pairs))
        except ValueError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{file}: damaged safetensors header ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: damaged safetensors header (not a table)")
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, spec, 8 + length, size) for name, spec in header.items()}
    end, before = 0, ""
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.nbytes)):
        if entry.start < end:
            raise CheckpointError(f"{file}: tensors {before!r} and {entry.name!r} lie on the same bytes")
        end, before = entry.start + entry.nbytes, entry.name
    return entries


def _no_twice(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{file}: tensor {twice!r} is there twice")
    return table


def _entry(file: Path, name: str, spec: Any, data_start: int, file_size: int) -> TensorEntry:
    fields: dict[str, Any] = spec if isinstance(spec, dict) else {}
    dtype: str = fields.get("dtype", "")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    if (
        not (isinstance(dtype, str) and dtype in DTYPE_BYTES)
        or not _counts(shape)
        or not _counts(offsets)
        or len(offsets) != 2
    ):
        raise CheckpointError(f"{file}: tensor {name!r} has a header entry that cannot be read ({spec})")
    begin, end = offsets
    wanted = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != wanted:
        raise CheckpointError(f"{file}: tensor {name!r} should take {wanted} bytes, its header says {end - begin}")
    if data_start + end > file_size:
        raise CheckpointError(
            f"{file}: truncated: tensor {name!r} ends at byte {data_start + end}, the file has {file_size}"
        )
    return TensorEntry(name, file, dtype, tuple(shape), data_start + begin, wanted)


def _counts(value: Any) -> bool:
    """Whether `value` is a list of whole numbers, none negative."""
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def read_component(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a component, checked across its shards and against its index."""
    files, weight_map = weight_files(folder)
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in tensors:
                raise CheckpointError(f"{file}: tensor {name!r} is there twice, also in {tensors[name].file.name}")
            tensors[name] = entry
    for name, shard in (weight_map or {}).items():
        if name not in tensors:
            raise CheckpointError(f"{folder / shard}: tensor {name!r} is missing; the index places it there")
        if tensors[name].file.name != shard:
            raise CheckpointError(f"{tensors[name].file}: tensor {name!r} is here, but the index places it in {shard}")
    return tensors


def read_exactly(fd: int, buffer: memoryview, start: int, entry: TensorEntry) -> None:
    """Fill `buffer` from byte `start` of an open file; one that ends early or cannot be read is a CheckpointError."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done:]], start + done)
        except OSError as error:
            why = f"tensor {entry.name!r} cannot be read ({error.strerror})"
            raise CheckpointError(f"{entry.file}: {why}") from error
        if count == 0:
            raise CheckpointError(f"{entry.file}: ends in the middle of tensor {entry.name!r}")
        done += count
