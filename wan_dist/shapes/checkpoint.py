"""The trained parts of `wan_shapes`, as a pipeline of diffusers and as a folder in its format."""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

from wan_dist.output.names import temporary_path
from wan_dist.shapes.architecture import (
    build_autoencoder,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
)


@dataclass(frozen=True)
class Parts:
    """All that has been made; the scheduler is always the same."""

    tokenizer: Any
    text_encoder: Any
    transformer: WanTransformer3DModel
    vae: AutoencoderKLWan

    def pipeline(self) -> WanPipeline:
        """diffusers' own, over these very parts."""
        return WanPipeline(
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder,
            transformer=self.transformer,
            vae=self.vae,
            scheduler=build_scheduler(),
        )


def save_checkpoint(parts: Parts, folder: Path) -> None:
    """Write `folder`, transformer and VAE in fp16, in place of what is there. It is whole or not there at all."""
    text_encoder = copy.deepcopy(parts.text_encoder).cpu()
    halved = Parts(parts.tokenizer, text_encoder, _halved(parts.transformer), _halved(parts.vae))
    scratch = temporary_path(folder)
    shutil.rmtree(scratch, ignore_errors=True)
    halved.pipeline().save_pretrained(scratch)
    _name_tokenizer(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def load_checkpoint(folder: Path) -> Parts:
    """The parts that `save_checkpoint` wrote, in fp32 on the CPU. Raises ValueError where they cannot be read, or have
    other sizes or another vocabulary than this architecture."""
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder}: no checkpoint in diffusers format, it has no model_index.json")
    try:
        pipeline = WanPipeline.from_pretrained(folder, use_safetensors=True)  # in fp32, whatever it is stored in
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"{folder}: diffusers' WanPipeline cannot read it: {error}") from error
    parts = Parts(pipeline.tokenizer, pipeline.text_encoder, pipeline.transformer, pipeline.vae)
    ours = Parts(build_tokenizer(), build_text_encoder(), build_transformer(), build_autoencoder())
    other = [name for name in ("text_encoder", "transformer", "vae") if _sizes(parts, name) != _sizes(ours, name)]
    if parts.tokenizer.get_vocab() != ours.tokenizer.get_vocab():
        other.append("tokenizer")
    if other:
        raise ValueError(f"{folder}: not of wan_shapes' architecture: {', '.join(other)}")
    return parts


def _sizes(parts: Parts, name: str) -> dict[str, torch.Size]:
    return {key: weight.shape for key, weight in getattr(parts, name).state_dict().items()}


def _halved(model: Any) -> Any:
    """A copy on the CPU, in fp16."""
    copied = copy.deepcopy(model).cpu()
    for weight in copied.parameters():
        weight.data = weight.data.to(torch.float16, memory_format=torch.contiguous_format)
    return copied


def _name_tokenizer(folder: Path) -> None:
    """Under the class that older releases of transformers have, too; this one writes a new name for the same."""
    for path, edit in (
        (folder / "tokenizer" / "tokenizer_config.json", _set_class),
        (folder / "model_index.json", _set_component),
    ):
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content, indent=2) + "\n")


def _set_class(config: dict[str, Any]) -> None:
    config["tokenizer_class"] = "PreTrainedTokenizerFast"


def _set_component(index: dict[str, Any]) -> None:
    index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
