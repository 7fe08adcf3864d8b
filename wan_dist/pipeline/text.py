"""The prompt's embeddings, on every rank: encoded by the first one, or by all where FSDP shards the encoder."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from wan_dist.distributed.collectives import broadcast
from wan_dist.distributed.mesh import Axis
from wan_dist.loading.tensor_files import CheckpointError
from wan_dist.loading.weights import MatchedWeights, fill, from_files, on_every_rank
from wan_dist.models.architecture import BLOCK_LISTS
from wan_dist.models.text_encoder import MAX_TEXT_TOKENS, encode_prompts, load_tokenizer
from wan_dist.pipeline.run import Run
from wan_dist.pipeline.streaming import load_streamed
from wan_dist.planning.footprint import FSDP, LAYERWISE, RESIDENT


def encode_text(run: Run, weights: MatchedWeights | None) -> list[torch.Tensor]:
    """The prompt's embedding and, where a step is guided, the negative prompt's: `[1, 512, width]` each, all ranks.

    weights: the text encoder's, on the ranks that run it; unless it is resident, its memory is free again when this
    returns.
    """
    branches = 2 if any(step.guided for step in run.schedule) else 1
    width = run.checkpoint.transformer_config.get("text_dim", 4096)
    text = torch.empty(branches, MAX_TEXT_TOKENS, width, dtype=run.dtype, device=run.device)
    _run_text_encoder(run, weights, text)
    # Two tensors of their own, kept for the whole run: what is remembered of a prompt goes by its tensor's identity.
    return [part.clone() for part in broadcast(run.mesh.world, text).split(1)]


def _run_text_encoder(run: Run, weights: MatchedWeights | None, text: torch.Tensor) -> None:
    """Write the embeddings into `text` where the encoder runs. Whatever may fail on one rank alone is asked of all
    before they meet in the encoder's collectives."""
    config, checkpoint, world = run.config, run.checkpoint, run.mesh.world
    folder = checkpoint.path / "tokenizer"
    runs_here = weights is not None
    tokenizer = on_every_rank(world, lambda: from_files(folder, partial(load_tokenizer, folder)) if runs_here else None)
    encoder = _load(run, weights)

    def check_width(width: int) -> None:
        if width != text.shape[-1]:
            raise CheckpointError(
                f"{checkpoint.path}: the text encoder gives width {width}, the transformer wants {text.shape[-1]}"
            )

    encoded = text
    if runs_here:
        negative = (config.negative_prompt or "") if len(text) == 2 else None
        encoded = encode_prompts(encoder, tokenizer, str(config.prompt), negative, run.device)
    on_every_rank(world, partial(check_width, encoded.shape[-1]))
    text.copy_(encoded)


def _load(run: Run, weights: MatchedWeights | None) -> Any:
    """The text encoder, where it runs; all ranks call this."""
    how, world = run.plan.how("text_encoder"), run.mesh.world
    load = partial(fill, device=run.device, bytes_read=run.report.bytes_read, component="text_encoder")
    if how == FSDP and run.sharding and weights:
        # The conditions of the config are the transformers'; and what does not fit is never kept gathered.
        return load(weights, axis=world, sharding=replace(run.sharding, conditions=(), reshard_after_forward=True))
    if how == LAYERWISE:
        load = partial(_load_streamed, run)
    encoder = on_every_rank(world, lambda: load(weights) if weights else None)
    if how == RESIDENT:
        run.kept.append(encoder)
    return encoder


def _load_streamed(run: Run, weights: MatchedWeights) -> Any:
    streaming = run.plan.streaming("text_encoder")
    assert streaming is not None
    block_list, alone = BLOCK_LISTS["text_encoder"], Axis("alone")
    matched = {"text_encoder": weights}
    return load_streamed(run, matched, streaming, block_list=block_list, axis=alone, key=None)["text_encoder"][0]
