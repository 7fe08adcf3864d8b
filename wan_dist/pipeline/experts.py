"""The transformers, on their mesh, behind the one function that the denoising loop calls."""

from collections.abc import Callable
from typing import Any

import torch

from wan_dist.distributed.fsdp import reshard
from wan_dist.layers.attention_kernels import attention_kernel
from wan_dist.loading.components import MatchedTransformer, match_transformer, transformers_in_order
from wan_dist.loading.weights import fill
from wan_dist.log import logger
from wan_dist.pipeline.run import Run
from wan_dist.sampling.condition import Condition
from wan_dist.sampling.denoise import Predict
from wan_dist.sampling.schedule import Step


def match_experts(run: Run) -> dict[str, MatchedTransformer]:
    """The transformers that the schedule uses."""
    kernel = attention_kernel(run.config.runtime.attention)
    names = sorted({step.expert for step in run.schedule})
    return {
        name: match_transformer(run.checkpoint, name, mesh=run.mesh, kernel=kernel, dtype=run.dtype) for name in names
    }


def load_experts(
    run: Run, matched: dict[str, MatchedTransformer], text: list[torch.Tensor], condition: Condition
) -> Predict:
    """Fill (and shard) the experts in the order that all ranks share; returns the prediction that the loop calls.

    They are taken out of `matched`: the prediction alone keeps them, so that they are gone when it is.
    """
    sharding = run.sharding
    shards = sharding.fsdp.shard.size if sharding else 1
    order = transformers_in_order(run.checkpoint, matched, mesh=run.mesh, dtype=run.dtype, fsdp_shards=shards)
    experts: dict[str, Any] = {}
    forget: dict[str, Callable[[], None]] = {}
    for name in order:
        expert = matched.pop(name)
        logger.info("loading %s", name)
        experts[name] = fill(
            expert.weights,
            device=run.device,
            axis=run.mesh.world,
            sharding=sharding,
            bytes_read=run.report.bytes_read,
            component=name,
        )
        forget[name] = expert.forget_text
    running: str | None = None
    image = None if condition.image_tokens is None else condition.image_tokens.to(run.dtype)

    def predict(latents: torch.Tensor, timestep: torch.Tensor, step: Step, branch: int) -> torch.Tensor:
        nonlocal running
        if running not in (None, step.expert):  # an expert that is done with needs neither prompt nor gathered weights
            forget[running]()
            reshard(experts[running])
        running = step.expert
        velocity, *_ = experts[step.expert](
            hidden_states=condition.model_input(latents).to(run.dtype),
            timestep=condition.timesteps(timestep),
            encoder_hidden_states=text[branch],
            encoder_hidden_states_image=image,
            return_dict=False,
        )
        return velocity

    return predict
