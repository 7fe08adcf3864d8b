"""The prompt's embeddings, on every rank: encoded by the first one, or by all where FSDP shards the encoder."""

from dataclasses import replace
from functools import partial

import torch

from wan_dist.distributed.collectives import broadcast, gather_objects
from wan_dist.loading.sizes import served_bytes
from wan_dist.loading.tensor_files import CheckpointError
from wan_dist.loading.weights import MatchedWeights, fill, from_files, on_every_rank
from wan_dist.log import logger
from wan_dist.models.text_encoder import MAX_TEXT_TOKENS, encode_prompts, load_tokenizer
from wan_dist.output.memory import free_bytes
from wan_dist.pipeline.run import Run
from wan_dist.planning.room import does_not_fit


def text_encoder_needs_sharding(run: Run) -> bool:
    """Where FSDP is on: whether the text encoder does not fit the device that has the least room. The same answer on
    every rank."""
    if run.sharding is None:
        return False
    folder, world, room = run.checkpoint.path / "text_encoder", run.mesh.world, free_bytes(run.device)
    size = on_every_rank(world, partial(served_bytes, folder, dtype_bytes=run.dtype.itemsize))
    logger.info("text encoder: %s bytes, %s free here", size, room)
    return any(gather_objects(world, does_not_fit(size, room)))


def encode_text(run: Run, weights: MatchedWeights | None, shared: bool) -> list[torch.Tensor]:
    """The prompt's embedding and, where a step is guided, the negative prompt's: `[1, 512, width]` each, all ranks.

    weights: the text encoder's, on the ranks that run it; its memory is free again when this returns. shared: it is
    sharded, and all ranks run it together.
    """
    branches = 2 if any(step.guided for step in run.schedule) else 1
    width = run.checkpoint.transformer_config.get("text_dim", 4096)
    text = torch.empty(branches, MAX_TEXT_TOKENS, width, dtype=run.dtype, device=run.device)
    _run_text_encoder(run, weights, shared, text)
    # Two tensors of their own, kept for the whole run: what is remembered of a prompt goes by its tensor's identity.
    return [part.clone() for part in broadcast(run.mesh.world, text).split(1)]


def _run_text_encoder(run: Run, weights: MatchedWeights | None, shared: bool, text: torch.Tensor) -> None:
    """Write the embeddings into `text` where the encoder runs. Whatever may fail on one rank alone is asked of all
    before they meet in the encoder's collectives."""
    config, checkpoint, world = run.config, run.checkpoint, run.mesh.world
    folder = checkpoint.path / "tokenizer"
    runs_here = weights is not None
    tokenizer = on_every_rank(world, lambda: from_files(folder, partial(load_tokenizer, folder)) if runs_here else None)
    load = partial(fill, device=run.device, bytes_read=run.report.bytes_read, component="text_encoder")
    if shared and run.sharding and weights:
        # The conditions of the config are the transformers'; and what does not fit is never kept gathered.
        sharding = replace(run.sharding, conditions=(), reshard_after_forward=True)
        encoder = load(weights, axis=world, sharding=sharding)
    else:
        encoder = on_every_rank(world, lambda: load(weights) if weights else None)

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
