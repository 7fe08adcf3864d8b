"""Random checkpoints in the real format, and diffusers' own answer for them."""

from pathlib import Path
from typing import Any

import wan_dist

TINY = Path(wan_dist.__file__).resolve().parent / "assets" / "tiny"
WAN_SHAPES = TINY.parent / "wan_shapes"


class CheckpointFactory:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.built: dict[tuple, Path] = {}

    def __call__(
        self,
        *,
        heads: int = 4,
        layers: int = 2,
        ffn: int = 192,
        experts: int = 1,
        boundary_ratio: float | None = None,
        seed: int = 0,
        max_shard_size: str = "150KB",
    ) -> Path:
        from wan_dist.models.random_weights import save_random_checkpoint

        key = (heads, layers, ffn, experts, boundary_ratio, seed, max_shard_size)
        if key not in self.built:
            target = self.folder / f"{len(self.built)}-{heads}heads-{experts}experts"
            save_random_checkpoint(
                TINY,
                target,
                seed=seed,
                transformer={"num_attention_heads": heads, "num_layers": layers, "ffn_dim": ffn},
                experts=experts,
                boundary_ratio=boundary_ratio,
                max_shard_size=max_shard_size,
            )
            self.built[key] = target
        return self.built[key]


def diffusers_pipeline(path: Path) -> Any:
    """diffusers' pipeline on a checkpoint, fp32; parameters cloned, since it keeps unaligned views of mapped files,
    on which CPU kernels give other last bits."""
    import torch
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for model in (pipe.transformer, pipe.transformer_2, pipe.text_encoder, pipe.vae):
        for parameter in model.parameters() if model is not None else ():
            parameter.data = parameter.data.clone()
    return pipe


def diffusers_answer(path: Path, *, seed: int = 0, output_type: str = "latent", scheduler: Any = None, **call: Any):
    """What `WanPipeline` returns for a request: latents `[1, C, T, H, W]`, or frames `[1, T, H, W, 3]` in [0, 1]."""
    import torch

    pipe = diffusers_pipeline(path)
    if scheduler is not None:
        pipe.scheduler = scheduler(pipe.scheduler.config)
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipe(output_type=output_type, generator=generator, **call).frames
