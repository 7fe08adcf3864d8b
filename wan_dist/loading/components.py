"""The components of a checkpoint: built on the meta device, taught, and checked name by name before reading."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wan_dist.distributed.mesh import Mesh
from wan_dist.layers.attention_kernels import AttentionKernel
from wan_dist.loading.checkpoint import Checkpoint
from wan_dist.loading.order import ComponentLoadSpec, agreed_order, device_bytes
from wan_dist.loading.sizes import served_bytes
from wan_dist.loading.weights import MatchedWeights, from_files, match_weights, on_every_rank, serve_in
from wan_dist.models.image_encoder import WEIGHTS_PREFIX, meta_image_encoder
from wan_dist.models.text_encoder import meta_text_encoder
from wan_dist.models.wan_transformer import meta_transformer, parallelize_wan_transformer
from wan_dist.models.wan_vae import ENCODER_WEIGHTS, meta_vae


@dataclass(frozen=True)
class MatchedTransformer:
    """An expert that is taught but not read. forget_text: drops what it remembers of the prompts."""

    weights: MatchedWeights
    forget_text: Callable[[], None]


def match_transformer(
    checkpoint: Checkpoint, name: str, *, mesh: Mesh, kernel: AttentionKernel, dtype: torch.dtype
) -> MatchedTransformer:
    """`transformer` or `transformer_2`, taught to run on `mesh`. Raises CheckpointError for what does not fit."""
    folder = checkpoint.path / name
    model = from_files(folder, partial(meta_transformer, checkpoint.configs[name]))
    forget_text = parallelize_wan_transformer(model, mesh, kernel)
    return MatchedTransformer(_match(model, folder, dtype, model._keep_in_fp32_modules or ()), forget_text)


def match_text_encoder(checkpoint: Checkpoint, *, dtype: torch.dtype) -> MatchedWeights:
    folder, class_name = checkpoint.path / "text_encoder", checkpoint.class_name("text_encoder") or ""
    return _match(from_files(folder, partial(meta_text_encoder, folder, class_name)), folder, dtype)


def match_image_encoder(checkpoint: Checkpoint) -> MatchedWeights:
    """Served in fp32, as in diffusers' own examples: it sees one picture or two, and is gone again."""
    folder, class_name = checkpoint.path / "image_encoder", checkpoint.class_name("image_encoder") or ""
    model = from_files(folder, partial(meta_image_encoder, folder, class_name))
    prefix = "" if any(name.startswith(WEIGHTS_PREFIX) for name, _ in model.named_parameters()) else WEIGHTS_PREFIX
    return _match(model, folder, torch.float32, prefix=prefix)


def match_vae(checkpoint: Checkpoint, *, dtype: torch.dtype, encoder: bool) -> MatchedWeights:
    """encoder: whether it will encode, too; what it decodes with is a little more than half of it."""
    folder = checkpoint.path / "vae"
    model = from_files(folder, partial(meta_vae, checkpoint.configs["vae"], encoder=encoder))
    return _match(model, folder, dtype, unread=() if encoder else ENCODER_WEIGHTS)


def _match(
    model: Any,
    folder: Path,
    dtype: torch.dtype,
    keep_fp32: Iterable[str] = (),
    *,
    prefix: str = "",
    unread: Iterable[str] = (),
) -> MatchedWeights:
    serve_in(model, dtype, keep_fp32)
    ignore = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return match_weights(model, folder, (*ignore, *unread), prefix=prefix)


def transformers_in_order(
    checkpoint: Checkpoint, matched: dict[str, MatchedTransformer], *, mesh: Mesh, dtype: torch.dtype, fsdp_shards: int
) -> list[str]:
    """The names of `matched` in the order to load them, rank 0's on all ranks."""

    def specs() -> list[ComponentLoadSpec]:
        found = []
        for index, (name, transformer) in enumerate(matched.items()):
            islands = transformer.weights.module._keep_in_fp32_modules or ()
            served = served_bytes(checkpoint.path / name, dtype_bytes=dtype.itemsize, keep_fp32=islands)
            size = device_bytes(served, tp=mesh["tp"].size, fsdp_shards=fsdp_shards)
            found.append(ComponentLoadSpec(name, index, size))
        return found

    return agreed_order(mesh.world, on_every_rank(mesh.world, specs))
