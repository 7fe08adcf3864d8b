"""What a component's weights take on one rank, from headers or a config, without reading them: the planner's input.

The rank is rank 0, which keeps the most: shares that do not divide evenly are larger on the first ranks.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from wan_dist.layers.sequence import split_range
from wan_dist.loading.checkpoint import Checkpoint
from wan_dist.loading.published import file_dtypes
from wan_dist.loading.tensor_files import DTYPE_BYTES, CheckpointError, read_component
from wan_dist.models.architecture import (
    BLOCK_LISTS,
    IMAGE_ENCODER_PREFIX,
    KEEP_FP32,
    Shapes,
    image_encoder_tensors,
    tensor_parallel_dim,
    text_encoder_tensors,
    transformer_tensors,
    vae_tensors,
)

_ALIGNMENT = 64  # of tensors in a block's flat buffer
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_TIED = {"encoder.embed_tokens.weight": "shared.weight"}  # a text encoder's embedding under its other name
_SERVING = {2: "BF16", 4: "F32"}


class Stored(NamedTuple):
    """A whole tensor as a file holds it; dtype is safetensors' name."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Weights:
    """Bytes of one component on rank 0, after tensor parallelism, in the serving dtype.

    total: of all its parameters; sharded: what of them FSDP leaves here. largest_unit: of the parameters of the largest
    FSDP unit once it is gathered, which is a block or the root unit, all that is `outside`. blocks: of each block of
    its list as one flat buffer per dtype, tensors at multiples of 64 bytes, in order; empty where it has no list.
    outside: of the parameters that are in no block. file_bytes, sharded_file_bytes: what is read from files for `total`
    and for `sharded`, in the files' dtype.
    """

    total: int
    sharded: int
    largest_unit: int
    blocks: tuple[int, ...]
    outside: int
    file_bytes: int
    sharded_file_bytes: int


def weights_of(
    tensors: Mapping[str, Stored],
    *,
    dtype_bytes: int,
    keep_fp32: Collection[str] = (),
    tp: int = 1,
    shards: int = 1,
    block_list: str | None = "blocks",
) -> Weights:
    """Of a table of whole tensors by name, in the module's order.

    dtype_bytes: of floating-point tensors, but 4 where a part of the name is in `keep_fp32`. tp: the degree of tensor
    parallelism, which divides the transformer's heads. shards: over how many ranks FSDP divides.
    """
    number = None if block_list is None else re.compile(re.escape(block_list) + r"\.([0-9]+)\.")
    total = sharded = outside = file_bytes = sharded_file_bytes = 0
    in_block: dict[int, list[tuple[str, int]]] = defaultdict(list)  # (dtype of its buffer, bytes)
    for name, (shape, dtype) in tensors.items():
        mine = _tp_share(name, shape, tp)
        kept = (-(-mine[0] // shards), *mine[1:]) if mine else mine
        served = _served_dtype(name, dtype, dtype_bytes, keep_fp32)
        size = prod(mine) * DTYPE_BYTES[served]
        total += size
        sharded += prod(kept) * DTYPE_BYTES[served]
        file_bytes += prod(mine) * DTYPE_BYTES[dtype]
        sharded_file_bytes += prod(kept) * DTYPE_BYTES[dtype]
        block = number.match(name) if number else None
        if block:
            in_block[int(block[1])].append((served, size))
        else:
            outside += size
    units = [sum(size for _, size in block) for block in in_block.values()]
    return Weights(
        total=total,
        sharded=sharded,
        largest_unit=max([outside, *units]),
        blocks=tuple(_flat_bytes(in_block[index]) for index in sorted(in_block)),
        outside=outside,
        file_bytes=file_bytes,
        sharded_file_bytes=sharded_file_bytes,
    )


def _tp_share(name: str, shape: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """`tp` divides the heads, or is refused: so the even share of their features is that of whole heads."""
    dim = tensor_parallel_dim(name)
    if dim is None:
        return shape
    begin, end = split_range(shape[dim], tp, 0)
    return (*shape[:dim], end - begin, *shape[dim + 1 :])


def _served_dtype(name: str, dtype: str, dtype_bytes: int, keep_fp32: Collection[str]) -> str:
    if not dtype.startswith(("F", "BF")):
        return dtype
    return "F32" if any(part in keep_fp32 for part in name.split(".")) else _SERVING[dtype_bytes]


def _flat_bytes(tensors: Iterable[tuple[str, int]]) -> int:
    ends: dict[str, int] = defaultdict(int)
    for dtype, size in tensors:
        ends[dtype] = -(-ends[dtype] // _ALIGNMENT) * _ALIGNMENT + size
    return sum(ends.values())


def component_weights(
    checkpoint: Checkpoint,
    name: str,
    *,
    dtype_bytes: int,
    tp: int = 1,
    shards: int = 1,
    encoder: bool = True,
    on_disk: Mapping[str, str] | None = None,
) -> Weights | None:
    """Of `transformer`, `transformer_2`, `text_encoder`, `image_encoder` or `vae`; None where the sizes cannot be
    known: a class that this version does not run, files that are damaged, incomplete, pickled or of another class.

    Told by the headers of its files, or by its config where it has none here. encoder: of the VAE, whether it will
    encode too. on_disk: for a component without files, its dtype in those that will be read (safetensors' names, by
    component); by default what is published under the checkpoint's path, else the serving dtype. The transformers alone
    keep islands in fp32 and are divided by tensor parallelism.
    """
    shapes = _architecture(checkpoint, name, encoder)
    if shapes is None:
        return None
    folder = checkpoint.path / name
    tensors: dict[str, Stored] | None
    if folder.is_dir() and any(file.suffix in _WEIGHT_FILES for file in folder.iterdir()):
        tensors = _from_headers(folder, name, shapes)
    else:
        known = on_disk if on_disk is not None else file_dtypes(str(checkpoint.path))
        dtype = known.get(name, _SERVING[dtype_bytes])
        tensors = {key: Stored(shape, dtype) for key, shape in shapes.items()}
    if tensors is None:
        return None
    islands = KEEP_FP32 if name in checkpoint.experts else ()
    block_list = BLOCK_LISTS.get(name)
    return weights_of(tensors, dtype_bytes=dtype_bytes, keep_fp32=islands, tp=tp, shards=shards, block_list=block_list)


def _architecture(checkpoint: Checkpoint, name: str, encoder: bool) -> Shapes | None:
    """The tensors that the component's class would load, by their names in the module."""
    config, class_name = checkpoint.configs.get(name, {}), checkpoint.class_name(name) or ""
    tables: dict[str, Callable[[], Shapes]] = {
        "WanTransformer3DModel": lambda: transformer_tensors(config),
        "UMT5EncoderModel": lambda: text_encoder_tensors({**config, "model_type": "umt5"}),
        "T5EncoderModel": lambda: text_encoder_tensors({**config, "model_type": "t5"}),
        "CLIPVisionModel": lambda: image_encoder_tensors(config),
        "CLIPVisionModelWithProjection": lambda: image_encoder_tensors(config, projection=True),
        "AutoencoderKLWan": lambda: vae_tensors(config, encoder=encoder),
    }
    try:
        return tables[class_name]() if class_name in tables else None
    except ValueError:
        return None


def _from_headers(folder: Path, name: str, shapes: Shapes) -> dict[str, Stored] | None:
    """The tensors of `shapes` as the files hold them; names that the class does not load are left out."""
    try:
        entries = read_component(folder)
    except CheckpointError:
        return None
    found = {_plain(name, key): Stored(entry.shape, entry.dtype) for key, entry in entries.items()}
    wanted = [_plain(name, key) for key in shapes]
    return {key: found[key] for key in wanted} if found.keys() >= set(wanted) else None


def _plain(component: str, name: str) -> str:
    """The name of a tensor under which files and module agree."""
    if component == "image_encoder":
        return name.removeprefix(IMAGE_ENCODER_PREFIX)
    return _TIED.get(name, name) if component == "text_encoder" else name
