"""A random checkpoint in the real format, from a folder of configs: the tiny model, and whatever a test needs.

The default initialisation of a deep random network saturates and hides mistakes. Here weights are normals scaled by
their fan-in, biases are small, and norm weights lie around 1 without being 1, so that a norm whose weight is sliced
or skipped shows in the output.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Fill every parameter in place, reproducibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            leaf = name.rsplit(".", 1)[-1]
            if "norm" in name and leaf in ("weight", "gamma"):
                parameter.copy_(1 + 0.2 * noise)
            elif leaf == "bias":
                parameter.copy_(0.05 * noise)
            elif leaf == "scale_shift_table":
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 1
                parameter.copy_(noise / fan_in**0.5)


def save_random_checkpoint(
    template: Path,
    target: Path,
    *,
    seed: int = 0,
    transformer: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    experts: int = 1,
    boundary_ratio: float | None = None,
    max_shard_size: str = "300KB",
) -> None:
    """Write a checkpoint with random weights to `target`.

    template: a folder with model_index.json and every component's JSON files (no weights).
    transformer, vae: entries of the component's config that differ from the template's.
    experts: 1, or 2 for `transformer` and `transformer_2`; then `boundary_ratio` goes into model_index.json.
    max_shard_size: small by default, so that several shards and an index are written.
    """
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import AutoConfig, UMT5EncoderModel

    shutil.copytree(template, target)
    index_file = target / "model_index.json"
    index = json.loads(index_file.read_text())
    encoder = UMT5EncoderModel(AutoConfig.from_pretrained(template / "text_encoder"))
    models: dict[str, Any] = {
        "text_encoder": encoder,
        "vae": AutoencoderKLWan.from_config({**AutoencoderKLWan.load_config(template / "vae"), **(vae or {})}),
    }
    for name in ("transformer", "transformer_2")[:experts]:
        config = {**WanTransformer3DModel.load_config(template / "transformer"), **(transformer or {})}
        models[name] = WanTransformer3DModel.from_config(config)
        index[name] = ["diffusers", "WanTransformer3DModel"]
    for number, (name, model) in enumerate(models.items()):
        randomise(model, seed * 100 + number)
        model.save_pretrained(target / name, max_shard_size=max_shard_size)
    index["boundary_ratio"] = boundary_ratio
    index_file.write_text(json.dumps(index, indent=2) + "\n")
