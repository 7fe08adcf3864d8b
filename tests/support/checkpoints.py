"""Random checkpoints in the real format, and diffusers' own answer for them."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import wan_dist

TINY = Path(wan_dist.__file__).resolve().parent / "assets" / "tiny"
WAN_SHAPES = TINY.parent / "wan_shapes"

IMAGE_TOKENS = 5  # of one picture of 28 x 28 pixels in patches of 14: 2 x 2, and one for the whole
_IMAGE_WIDTH = 40
_ENCODED_IMAGE = {"in_channels": 36, "image_dim": _IMAGE_WIDTH, "added_kv_proj_dim": 4 * 24}
_VAE_2_2 = {
    "z_dim": 48, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
    "scale_factor_spatial": 16,
    "latents_mean": [round(0.3 * ((7 * channel) % 11 - 5) / 5, 3) for channel in range(48)],
    "latents_std": [round(0.7 + 0.1 * ((5 * channel) % 9), 3) for channel in range(48)],
}  # fmt: skip

# kind of image-to-video model -> what `save_random_checkpoint` is told of it
KINDS: dict[str, dict[str, Any]] = {
    "wan2.1": {"transformer": _ENCODED_IMAGE},
    "wan2.1 first and last": {"transformer": {**_ENCODED_IMAGE, "pos_embed_seq_len": 2 * IMAGE_TOKENS}},
    "wan2.2 a14b": {"transformer": {"in_channels": 36}, "experts": 2, "boundary_ratio": 0.9},
    "wan2.2 ti2v": {"transformer": {"in_channels": 48, "out_channels": 48}, "vae": _VAE_2_2},
}


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

    def of_images(self, kind: str, *, published_names: bool = False) -> Path:
        """A checkpoint of one of `KINDS`, two layers deep. published_names: the image encoder's weights are named as in
        the published files, which transformers no longer writes."""
        key = (kind, published_names)
        if key not in self.built:
            target = self.folder / f"{len(self.built)}-{kind.replace(' ', '-')}"
            save_image_checkpoint(target, kind, published_names=published_names)
            self.built[key] = target
        return self.built[key]


def save_image_checkpoint(target: Path, kind: str, *, published_names: bool = False) -> None:
    from wan_dist.models.random_weights import save_random_checkpoint

    told = dict(KINDS[kind])
    told["transformer"] = {"num_layers": 2, **told["transformer"]}
    save_random_checkpoint(TINY, target, seed=11, **told)
    index = json.loads((target / "model_index.json").read_text())
    if kind == "wan2.2 ti2v":
        index["expand_timesteps"] = True
    else:
        index["_class_name"] = "WanImageToVideoPipeline"
        index |= {"image_encoder": [None, None], "image_processor": [None, None]}
    if kind.startswith("wan2.1"):
        index["image_encoder"] = ["transformers", "CLIPVisionModel"]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
        save_image_encoder(target, "vision_model." if published_names else "")
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_image_encoder(checkpoint: Path, prefix: str) -> None:
    """transformers' CLIP of three layers, of which Wan reads the last but one, and what prepares pictures for it.

    prefix: of the names of the weights."""
    from safetensors.torch import load_file, save_file
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from wan_dist.models.random_weights import randomise

    config = CLIPVisionConfig(
        hidden_size=_IMAGE_WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    model = CLIPVisionModel(config)
    randomise(model, 12)
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(checkpoint / "image_encoder")
    weights = checkpoint / "image_encoder" / "model.safetensors"
    tensors = {prefix + name.removeprefix("vision_model."): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    side = {"height": 28, "width": 28}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=side)
    processor.save_pretrained(checkpoint / "image_processor")


def diffusers_pipeline(path: Path, kind: str = "WanPipeline") -> Any:
    """diffusers' pipeline on a checkpoint, fp32; parameters cloned, since it keeps unaligned views of mapped files,
    on which CPU kernels give other last bits. kind: the name of the pipeline's class."""
    import diffusers
    import torch

    pipe = getattr(diffusers, kind).from_pretrained(path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for model in (component for component in pipe.components.values() if isinstance(component, torch.nn.Module)):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return pipe


def diffusers_answer(path: Path, *, seed: int = 0, output_type: str = "latent", scheduler: Any = None, **call: Any):
    """What diffusers' pipeline returns for a request, that for images where `image` is given: latents
    `[1, C, T, H, W]`, or frames `[1, T, H, W, 3]` in [0, 1]."""
    import torch

    pipe = diffusers_pipeline(path, "WanImageToVideoPipeline" if "image" in call else "WanPipeline")
    if scheduler is not None:
        pipe.scheduler = scheduler(pipe.scheduler.config)
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipe(output_type=output_type, generator=generator, **call).frames
