"""A transformer with random weights, as benchmarks need it: diffusers' own, or taught to run on a mesh."""

from dataclasses import dataclass
from typing import Any

import torch

from wan_dist.distributed.mesh import Mesh
from wan_dist.layers.attention_kernels import attention_kernel
from wan_dist.layers.weight_loader import capture_weight_loaders
from wan_dist.loading.weights import Sharding, owned_parts, put_in_place, serve_in
from wan_dist.models.wan_transformer import meta_transformer, parallelize_wan_transformer


@dataclass(frozen=True)
class TransformerShape:
    """The config of a random transformer, in the schema's names."""

    blocks: int
    heads: int
    head_dim: int
    ffn: int
    text_dim: int

    def config(self) -> dict[str, Any]:
        """The same as diffusers' class wants it."""
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "num_layers": self.blocks,
            "ffn_dim": self.ffn,
            "text_dim": self.text_dim,
        }


def random_transformer(
    shape: TransformerShape,
    *,
    dtype: torch.dtype,
    device: torch.device,
    mesh: Mesh | None = None,
    attention: str = "auto",
    sharding: Sharding | None = None,
) -> Any:
    """On `mesh`, holding only this rank's part of the weights; without one, diffusers' own, untaught.

    Each rank draws its own numbers: for timing, not for comparing outputs.
    """
    model = meta_transformer(shape.config())
    if mesh is not None:
        parallelize_wan_transformer(model, mesh, attention_kernel(attention))
    serve_in(model, dtype, model._keep_in_fp32_modules)
    capture_weight_loaders(model)
    generator = torch.Generator(device).manual_seed(0)
    meta = dict(model.named_parameters())
    tensors = {}
    for name, ranges in owned_parts(model, sharding).items():
        size = [end - begin for begin, end in ranges]
        scale = max(meta[name].shape[1:].numel(), 1) ** -0.5
        tensors[name] = torch.empty(size, device=device, dtype=meta[name].dtype).normal_(generator=generator)
        tensors[name].mul_(scale if "norm" not in name else 0.2).add_(1.0 if "norm" in name else 0.0)
    return put_in_place(model, tensors, device=device, sharding=sharding)
