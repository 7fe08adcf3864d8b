"""A mesh in a worker, and a transformer that is loaded onto it as the pipeline loads one."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from wan_dist.distributed.mesh import AXES, Mesh
from wan_dist.distributed.process_group import process_group
from wan_dist.layers.attention_kernels import attention_kernel
from wan_dist.loading.weights import MatchedWeights, Sharding, fill, match_weights, serve_in
from wan_dist.models.random_weights import randomise
from wan_dist.models.wan_transformer import meta_transformer, parallelize_wan_transformer
from wan_dist.topology import RankEnv

CPU = torch.device("cpu")

SMALL = {
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "num_layers": 2,
    "ffn_dim": 192,
    "text_dim": 32,
    "rope_max_seq_len": 64,
}


def image_branch(heads: int) -> dict[str, Any]:
    """Config entries of a transformer that also attends to an image, and takes it beside the noise."""
    return {
        "num_attention_heads": heads,
        "in_channels": 36,
        "image_dim": 40,
        "added_kv_proj_dim": heads * SMALL["attention_head_dim"],
    }


def save_transformer(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A random transformer in diffusers' format, of config `SMALL` but for what is given."""
    model = WanTransformer3DModel(**{**SMALL, **config})
    randomise(model, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size="200KB")
    return folder


@contextmanager
def mesh_of(env: RankEnv, *, replicas: int = 1, timeout_s: float = 60, **degrees: int) -> Iterator[Mesh]:
    """The mesh of `degrees`, those that are not given being 1, while its process group lives."""
    with process_group(env, dict.fromkeys(AXES, 1) | degrees, CPU, timeout_s, fsdp_replicas=replicas) as mesh:
        yield mesh


def match(mesh: Mesh, folder: Path, dtype: torch.dtype = torch.float32) -> MatchedWeights:
    """The transformer in `folder`, taught to run on the mesh, nothing read."""
    model = meta_transformer(WanTransformer3DModel.load_config(folder))
    parallelize_wan_transformer(model, mesh, attention_kernel("auto"))
    serve_in(model, dtype, model._keep_in_fp32_modules)
    return match_weights(model, folder)


def load(mesh: Mesh, weights: MatchedWeights, *, fsdp: bool = True, bytes_read: Counter | None = None, **how: Any):
    """Read and, where the mesh has something to divide over, shard it. how: entries of `Sharding`."""
    sharding = Sharding(mesh.fsdp, **how) if fsdp and mesh.fsdp is not None else None
    return fill(weights, device=CPU, axis=mesh.world, sharding=sharding, bytes_read=bytes_read, component="it")


def local(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a parameter."""
    return getattr(parameter, "_local_tensor", parameter).detach()
