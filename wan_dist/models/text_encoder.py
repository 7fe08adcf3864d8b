"""The text encoder: transformers' own model, diffusers' own prompt handling."""

from pathlib import Path
from typing import Any

import torch

MAX_TEXT_TOKENS = 512  # diffusers' default `max_sequence_length`, and what the Wan models were trained with


def meta_text_encoder(folder: Path, class_name: str) -> Any:
    """The encoder of a checkpoint's `text_encoder` folder, without memory for its weights."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = getattr(transformers, class_name)(config)
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint's `tokenizer` folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def encode_prompts(
    encoder: Any, tokenizer: Any, prompt: str, negative_prompt: str | None, device: torch.device
) -> torch.Tensor:
    """`[n, 512, width]`: the prompt, and the negative prompt unless it is None. Cleaned, tokenised and padded by
    `WanPipeline.encode_prompt`."""
    from diffusers import WanPipeline

    pipe = WanPipeline(tokenizer=tokenizer, text_encoder=encoder, vae=None, scheduler=None)
    positive, negative = pipe.encode_prompt(
        prompt,
        negative_prompt,
        do_classifier_free_guidance=negative_prompt is not None,
        max_sequence_length=MAX_TEXT_TOKENS,
        device=device,
    )
    return positive if negative is None else torch.cat([positive, negative])
