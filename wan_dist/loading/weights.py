"""Filling a module that was built on the meta device from the tensors of a checkpoint component.

Two steps: `match_weights` compares every name and shape before a byte of weights is read; `fill` reads what this rank
owns of each tensor (its `weight_loader`'s slice and, within that, its FSDP rows), casts and assigns. The meta module
says which shapes and dtypes are wanted.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TypeVar

import torch

from wan_dist.config.schema import FsdpConfig
from wan_dist.distributed.collectives import gather_objects
from wan_dist.distributed.fsdp import local_parameter, shard_model, shard_rows
from wan_dist.distributed.mesh import Axis, FsdpMesh, Mesh
from wan_dist.distributed.out_of_memory import is_out_of_memory
from wan_dist.layers.weight_loader import Ranges, WeightLoader, capture_weight_loaders, weight_loader
from wan_dist.loading.slices import SliceReader, rows_within
from wan_dist.loading.tensor_files import CheckpointError, RemoteCheckpointError, TensorEntry, read_component

# Ranks tell each other of a failure after so many elements of whole tensors, so that none reads on for minutes.
_MEET_EVERY_ELEMENTS = 1 << 27

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
        if is_out_of_memory(error):
            raise
        first = next(iter(str(error).strip().splitlines()), "")
        raise CheckpointError(f"{folder}: cannot be used ({type(error).__name__}: {first})") from error


def serve_in(module: torch.nn.Module, dtype: torch.dtype, keep_fp32: Iterable[str] = ()) -> None:
    """Give the floating-point tensors of a meta module the dtype they will be served in: `dtype`, but fp32 where a part
    of the name is in `keep_fp32` (diffusers' `_keep_in_fp32_modules`)."""
    islands = set(keep_fp32)
    for name, tensor in _persistent_tensors(module):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if islands.intersection(name.split(".")) else dtype)


@dataclass(frozen=True)
class Place:
    """One tensor of a module: all its `names` (several where it is tied), where it lies, and what of it is ours."""

    names: tuple[str, ...]
    entry: TensorEntry
    loader: WeightLoader


@dataclass(frozen=True)
class MatchedWeights:
    """A meta module and the place of each of its tensors, in the module's order."""

    module: torch.nn.Module
    places: list[Place]


def match_weights(
    module: torch.nn.Module, folder: Path, ignore_unexpected: Iterable[str] = (), *, prefix: str = ""
) -> MatchedWeights:
    """Find every parameter and persistent buffer of `module` in the safetensors files of `folder`.

    The module's weight loaders are captured here, before anything wraps it.
    ignore_unexpected: patterns of names that the model class itself says may be left over. prefix: of names in the
    files that the module's names lack.
    Raises CheckpointError naming the first tensor that is missing, unknown or of another shape, and its file.
    """
    entries = {name.removeprefix(prefix): entry for name, entry in read_component(folder).items()}
    loaders = capture_weight_loaders(module)
    names_of: dict[int, list[str]] = defaultdict(list)
    shape_of: dict[int, tuple[int, ...]] = {}
    for name, tensor in _persistent_tensors(module):
        names_of[id(tensor)].append(name)
        shape_of[id(tensor)] = loaders[name].whole
    places: list[Place] = []
    used: set[str] = set()
    for key, names in names_of.items():
        found = [entries[name] for name in names if name in entries]
        if not found:
            files = ", ".join(sorted({entry.file.name for entry in entries.values()}))
            raise CheckpointError(
                f"{folder} ({files}): tensor {names[0]!r} is missing; {type(module).__name__} needs it"
            )
        used.update(entry.name.removeprefix(prefix) for entry in found)
        for entry in found:
            if entry.shape != shape_of[key]:
                raise CheckpointError(
                    f"{entry.file}: tensor {entry.name!r} has shape {entry.shape}, "
                    f"{type(module).__name__} needs {shape_of[key]}"
                )
        places.append(Place(tuple(names), found[0], loaders[names[0]]))
    for name, entry in entries.items():
        if name not in used and not any(re.search(pattern, name) for pattern in ignore_unexpected):
            raise CheckpointError(f"{entry.file}: tensor {name!r} is unknown to {type(module).__name__}")
    return MatchedWeights(module, places)


@dataclass(frozen=True)
class Sharding:
    """How FSDP is to divide a component: over which mesh, into which units, and what becomes of them after use."""

    fsdp: FsdpMesh
    conditions: tuple[str, ...] = ()
    reshard_after_forward: bool = True


def replicas_of(fsdp: FsdpConfig) -> int:
    """Into how many replicas the config wants the FSDP axis divided; where FSDP is off, it is not."""
    return fsdp.replicate if fsdp.enabled == "on" else 1


def sharding_of(fsdp: FsdpConfig, mesh: Mesh) -> Sharding | None:
    """How transformers are divided where FSDP is ordered; None where it is not, or has one rank to divide over."""
    return sharding_over(fsdp, mesh) if fsdp.enabled == "on" else None


def sharding_over(fsdp: FsdpConfig, mesh: Mesh) -> Sharding | None:
    """How FSDP divides transformers, by the config; None where it has one rank to divide over."""
    if mesh.fsdp is None:
        return None
    return Sharding(mesh.fsdp, tuple(fsdp.shard_conditions), fsdp.reshard_after_forward)


@dataclass(frozen=True)
class HostTensors:
    """Tensors of a module that are kept in host memory which is there already, by name. is_filler: whether this rank is
    to write them; else another one that shares the memory does, before `fill` returns on any rank of its axis."""

    tensors: dict[str, torch.Tensor]
    is_filler: bool


def fill(
    weights: MatchedWeights,
    *,
    device: torch.device,
    axis: Axis | None = None,
    sharding: Sharding | None = None,
    bytes_read: Counter[str] | None = None,
    component: str = "",
    host: HostTensors | None = None,
) -> torch.nn.Module:
    """Read what this rank owns of every tensor, cast it to the meta tensor's dtype and put it into the module, which
    is returned; with `sharding`, wrapped by FSDP.

    axis: the ranks that load this component together, in the same order; a failure on one is raised on all of them.
    bytes_read[component] grows by the bytes read from the files, with each tensor. host: tensors that stay in host
    memory.
    """
    places_on_host = host.tensors if host is not None else {}
    dtypes = {name: tensor.dtype for name, tensor in _persistent_tensors(weights.module)}
    parts = owned_parts(weights.module, sharding)
    read: dict[str, torch.Tensor] = {}
    with SliceReader() as reader:

        def read_batch(batch: list[Place]) -> None:
            for place in batch:
                name, before = place.names[0], reader.bytes_read
                into = places_on_host.get(name)
                if host is not None and into is not None and not host.is_filler:
                    tensor = into  # another rank's to read
                else:
                    where = device if into is None else into.device
                    tensor = reader.read(place.entry, parts[name], dtype=dtypes[name], device=where, into=into)
                read.update(dict.fromkeys(place.names, tensor))
                if bytes_read is not None:
                    bytes_read[component] += reader.bytes_read - before

        for batch in _batches(weights.places):
            on_every_rank(axis or Axis("alone"), partial(read_batch, batch))
    return put_in_place(weights.module, read, device=device, sharding=sharding)


def owned_parts(module: torch.nn.Module, sharding: Sharding | None) -> dict[str, Ranges]:
    """What this rank owns of each tensor of a checkpoint, by name: its loader's slice and, of parameters that FSDP will
    divide, its rows within that slice. Loaders must be captured."""
    parts = {}
    for name, tensor in _persistent_tensors(module):
        ranges = weight_loader(module, name).ranges()
        if sharding is not None and isinstance(tensor, torch.nn.Parameter):
            shard = sharding.fsdp.shard
            ranges = rows_within(ranges, *shard_rows(ranges[0][1] - ranges[0][0], shard.size, shard.rank))
        parts[name] = ranges
    return parts


def put_in_place(
    module: torch.nn.Module, tensors: dict[str, torch.Tensor], *, device: torch.device, sharding: Sharding | None
) -> torch.nn.Module:
    """Give a meta module its tensors, by name and in their serving dtype: this rank's rows where FSDP is to divide
    them, which wraps it now. Names that share a tensor share a parameter."""
    if sharding is not None:
        shard_model(
            module, sharding.fsdp, conditions=sharding.conditions, reshard_after_forward=sharding.reshard_after_forward
        )
    parameters: dict[int, torch.nn.Parameter] = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor
            continue
        if id(tensor) not in parameters:
            parameters[id(tensor)] = local_parameter(owner._parameters[leaf], tensor)
        owner._parameters[leaf] = parameters[id(tensor)]
    for owner in module.modules():
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and not buffer.is_meta:  # tables that no checkpoint holds
                owner._buffers[leaf] = buffer.to(device)
    return module


def _batches(places: list[Place]) -> Iterator[list[Place]]:
    """Consecutive places, cut by the elements of their whole tensors: in the same places on every rank."""
    batch: list[Place] = []
    elements = 0
    for place in places:
        batch.append(place)
        elements += prod(place.loader.whole)
        if elements >= _MEET_EVERY_ELEMENTS:
            yield batch
            batch, elements = [], 0
    yield batch


def _persistent_tensors(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    found = list(module.named_parameters(remove_duplicate=False))
    for prefix, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                found.append((f"{prefix}.{name}" if prefix else name, buffer))
    return found
