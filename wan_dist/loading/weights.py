"""Filling a module that was built on the meta device from the tensors of a checkpoint component.

Two steps: `match_weights` compares every name and shape before a byte of weights is read, `fill` reads tensor by
tensor, casts and assigns. Storage is always freshly allocated: CPU kernels give other last bits on the unaligned
memory of a mapped file.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from wan_dist.distributed.collectives import gather_objects
from wan_dist.distributed.mesh import Axis
from wan_dist.loading.tensor_files import (
    CheckpointError,
    RemoteCheckpointError,
    TensorEntry,
    read_component,
    read_exactly,
)

_TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

Result = TypeVar("Result")


def on_every_rank(axis: Axis, action: Callable[[], Result]) -> Result:
    """Run `action` here; a checkpoint that cannot be read on any rank is the same error on all of them: a
    CheckpointError on the first rank that found one, a RemoteCheckpointError on the others."""
    error: str | None = None
    try:
        result = action()
    except (CheckpointError, OSError) as fault:
        error = str(fault)
    errors = gather_objects(axis, error)
    for rank, found in enumerate(errors):
        if found is not None:
            raise CheckpointError(found) if rank == axis.rank else RemoteCheckpointError(found)
    return result


def from_files(folder: Path, build: Callable[[], Result]) -> Result:
    """`build()`, whose errors are the checkpoint's: libraries raise all kinds over a config or tokenizer file."""
    try:
        return build()
    except CheckpointError:
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise CheckpointError(f"{folder}: cannot be used ({type(error).__name__}: {first})") from error


@dataclass(frozen=True)
class MatchedWeights:
    """A meta module and, for each of its tensors, where it lies: `places` are all names of a tied tensor."""

    module: torch.nn.Module
    places: list[tuple[tuple[str, ...], TensorEntry]]


def match_weights(module: torch.nn.Module, folder: Path, ignore_unexpected: Iterable[str] = ()) -> MatchedWeights:
    """Find every parameter and persistent buffer of `module` in the safetensors files of `folder`.

    ignore_unexpected: patterns of names that the model class itself says may be left over.
    Raises CheckpointError naming the first tensor that is missing, unknown or of another shape, and its file.
    """
    entries = read_component(folder)
    names_of: dict[int, list[str]] = defaultdict(list)
    tensor_of: dict[int, torch.Tensor] = {}
    for name, tensor in _persistent_tensors(module):
        names_of[id(tensor)].append(name)
        tensor_of[id(tensor)] = tensor
    places: list[tuple[tuple[str, ...], TensorEntry]] = []
    used: set[str] = set()
    for key, names in names_of.items():
        found = [entries[name] for name in names if name in entries]
        if not found:
            files = ", ".join(sorted({entry.file.name for entry in entries.values()}))
            raise CheckpointError(
                f"{folder} ({files}): tensor {names[0]!r} is missing; {type(module).__name__} needs it"
            )
        used.update(entry.name for entry in found)
        for entry in found:
            if entry.shape != tuple(tensor_of[key].shape):
                raise CheckpointError(
                    f"{entry.file}: tensor {entry.name!r} has shape {entry.shape}, "
                    f"{type(module).__name__} needs {tuple(tensor_of[key].shape)}"
                )
        places.append((tuple(names), found[0]))
    for name, entry in entries.items():
        if name not in used and not any(re.search(pattern, name) for pattern in ignore_unexpected):
            raise CheckpointError(f"{entry.file}: tensor {name!r} is unknown to {type(module).__name__}")
    return MatchedWeights(module, places)


def fill(
    weights: MatchedWeights,
    *,
    dtype: torch.dtype,
    device: torch.device,
    keep_fp32: Iterable[str] = (),
    bytes_read: Counter[str] | None = None,
    component: str = "",
) -> torch.nn.Module:
    """Read every tensor, cast it and put it into the module, which is returned.

    dtype: the serving dtype of floating-point tensors; those with a part of their name in `keep_fp32` (diffusers'
    `_keep_in_fp32_modules`) stay fp32. bytes_read[component] grows by the bytes read from the files.
    """
    islands = set(keep_fp32)
    with ExitStack() as files:
        fds: dict[Path, int] = {}
        for names, entry in weights.places:
            if entry.file not in fds:
                fds[entry.file] = os.open(entry.file, os.O_RDONLY)
                files.callback(os.close, fds[entry.file])
            tensor = _read(fds[entry.file], entry)
            if tensor.is_floating_point():
                tensor = tensor.to(torch.float32 if islands.intersection(names[0].split(".")) else dtype)
            _assign(weights.module, names, tensor.to(device))
            if bytes_read is not None:
                bytes_read[component] += entry.nbytes
    for name, buffer in weights.module.named_buffers():
        if not buffer.is_meta:  # tables that no checkpoint holds
            _assign(weights.module, (name,), buffer.to(device))
    return weights.module


def _persistent_tensors(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    found = list(module.named_parameters(remove_duplicate=False))
    for prefix, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                found.append((f"{prefix}.{name}" if prefix else name, buffer))
    return found


def _read(fd: int, entry: TensorEntry) -> torch.Tensor:
    raw = torch.empty(entry.nbytes, dtype=torch.uint8)
    if entry.nbytes:
        read_exactly(fd, memoryview(raw.numpy()), entry.start, entry)
    return raw.view(_TORCH_DTYPES[entry.dtype]).view(entry.shape)


def _assign(module: torch.nn.Module, names: tuple[str, ...], tensor: torch.Tensor) -> None:
    """Put one tensor at all its names; tied names share one parameter."""
    parameter: torch.nn.Parameter | None = None
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner._parameters:
            parameter = parameter if parameter is not None else torch.nn.Parameter(tensor, requires_grad=False)
            owner._parameters[leaf] = parameter
        else:
            owner._buffers[leaf] = tensor
