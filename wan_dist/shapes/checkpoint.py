"""The trained parts of `wan_shapes`, as a pipeline of diffusers and as a folder in its format."""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from safetensors import SafetensorError
from safetensors.torch import load_file

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
    """The parts that `save_checkpoint` wrote, in fp32 on the CPU. Raises ValueError for a folder that is not such a
    checkpoint: one that cannot be read, lacks a weight, or has other sizes, heads or words."""
    try:
        statistics = json.loads((folder / "vae" / "config.json").read_text())
        vae = build_autoencoder(statistics["latents_mean"], statistics["latents_std"])
        parts = Parts(build_tokenizer(), build_text_encoder(), build_transformer(), vae)
        for name in ("text_encoder", "transformer", "vae"):
            _load(getattr(parts, name), folder / name)
        words = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    except (KeyError, TypeError, AttributeError) as error:  # JSON of another form
        raise ValueError(f"{folder}: not a checkpoint of wan_shapes: its JSON files are of another form") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a checkpoint of wan_shapes: {error}") from error
    if words != parts.tokenizer.get_vocab():
        raise ValueError(f"{folder}: not a checkpoint of wan_shapes: its tokenizer knows other words")
    return parts


def _load(model: Any, folder: Path) -> None:
    """Every weight of `model`, from the only file of its component. Raises ValueError and what reading raises."""
    heads, config = ("num_attention_heads", "num_heads"), json.loads((folder / "config.json").read_text())
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1 or any(config[key] != getattr(model.config, key) for key in heads if key in config):
        raise ValueError(f"{folder.name} is of another architecture")
    state, weights = model.state_dict(), load_file(found[0])
    wrong = [name for name, weight in weights.items() if name not in state or state[name].shape != weight.shape]
    given = {state[name].data_ptr() for name in weights if name in state}  # tied weights are stored once
    wrong += [name for name, weight in state.items() if weight.data_ptr() not in given]
    if wrong:
        raise ValueError(f"{folder.name} has other weights: {', '.join(wrong[:3])}")
    model.load_state_dict(weights, strict=False)


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
