"""The transformers, on their mesh and where the plan has them, behind the one function that the loop calls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from wan_dist.distributed.fsdp import reshard
from wan_dist.layers.attention_kernels import attention_kernel
from wan_dist.loading.components import MatchedTransformer, match_transformer, transformers_in_order
from wan_dist.loading.weights import MatchedWeights, fill
from wan_dist.log import logger
from wan_dist.models.architecture import BLOCK_LISTS
from wan_dist.models.wan_transformer import forget_block_text
from wan_dist.offload.layerwise import LayerwiseStream
from wan_dist.offload.lockstep import in_lockstep
from wan_dist.output.memory import return_device_memory
from wan_dist.pipeline.run import Run
from wan_dist.pipeline.streaming import load_streamed
from wan_dist.planning.footprint import COMPONENT, LAYERWISE, RESIDENT
from wan_dist.sampling.condition import Condition
from wan_dist.sampling.denoise import Predict
from wan_dist.sampling.schedule import Step


@dataclass(frozen=True)
class _Expert:
    """A transformer that can run. forget_text: drops what it remembers of the prompts. stream: of its blocks, where
    they are streamed."""

    model: Any
    forget_text: Callable[[], None]
    stream: LayerwiseStream | None = None


def match_experts(run: Run) -> dict[str, MatchedTransformer]:
    """The transformers that the remaining steps use."""
    kernel = attention_kernel(run.config.runtime.attention)
    names = sorted({step.expert for step in run.remaining})
    return {
        name: match_transformer(run.checkpoint, name, mesh=run.mesh, kernel=kernel, dtype=run.dtype) for name in names
    }


def load_experts(
    run: Run, matched: dict[str, MatchedTransformer], text: list[torch.Tensor], condition: Condition
) -> tuple[Predict, Callable[[], None]]:
    """Fill (and shard, or stream) the experts in the order that all ranks share. Where the plan has one on the device
    at a time, each is loaded when its steps begin.

    Returns the prediction that the loop calls, and what forgets the prompts after it. The experts are taken out of
    `matched`: these two alone keep them, so that they are gone when both are, unless they are resident.
    """
    if not matched:  # every step is done already
        return _prediction(run, {}, matched, text, condition), lambda: None
    how = run.plan.how(next(iter(matched)))
    experts: dict[str, _Expert] = {}
    if how == LAYERWISE:
        experts |= _streamed(run, matched)
    elif how != COMPONENT or len(matched) == 1:
        shards = run.sharding.fsdp.shard.size if run.sharding else 1
        for name in transformers_in_order(run.checkpoint, matched, mesh=run.mesh, dtype=run.dtype, fsdp_shards=shards):
            experts[name] = _whole(run, name, matched.pop(name))
    if how == RESIDENT and not run.plan.experts_leave:
        run.kept.append(experts)

    def forget_text() -> None:
        for expert in experts.values():
            expert.forget_text()

    return _prediction(run, experts, matched, text, condition), forget_text


def _prediction(
    run: Run,
    experts: dict[str, _Expert],
    unloaded: dict[str, MatchedTransformer],
    text: list[torch.Tensor],
    condition: Condition,
) -> Predict:
    image = None if condition.image_tokens is None else condition.image_tokens.to(run.dtype)
    running: str | None = None

    def expert_of(step: Step) -> _Expert:
        nonlocal running
        if running not in (None, step.expert):  # an expert that is done with needs neither prompt nor gathered weights
            experts[running].forget_text()
            reshard(experts[running].model)
        if step.expert not in experts:
            experts.clear()
            return_device_memory(run.device)
            experts[step.expert] = _whole(run, step.expert, unloaded.pop(step.expert))
        running = step.expert
        return experts[step.expert]

    def predict(
        latents: torch.Tensor, timestep: torch.Tensor, step: Step, branches: Sequence[int]
    ) -> list[torch.Tensor]:
        expert = expert_of(step)
        forward = partial(
            expert.model,
            hidden_states=condition.model_input(latents).to(run.dtype),
            timestep=condition.timesteps(timestep),
            encoder_hidden_states_image=image,
            return_dict=False,
        )
        forwards = [lambda branch=branch: forward(encoder_hidden_states=text[branch])[0] for branch in branches]
        if expert.stream is None:
            return [one() for one in forwards]
        following = run.schedule[step.index + 1 : step.index + 2]
        expert.stream.next_stream = experts[following[0].expert].stream if following else None
        return in_lockstep(expert.stream, forwards)

    return predict


def _whole(run: Run, name: str, matched: MatchedTransformer) -> _Expert:
    """An expert whose weights are all on the device, or its share of them where they are divided."""
    logger.info("loading %s", name)
    model = fill(
        matched.weights,
        device=run.device,
        axis=run.mesh.world,
        sharding=run.sharding,
        bytes_read=run.report.bytes_read,
        component=name,
    )
    return _Expert(model, matched.forget_text)


def _streamed(run: Run, matched: dict[str, MatchedTransformer]) -> dict[str, _Expert]:
    """All experts, streamed on one ring. Tensor-parallel ranks hold different slices, so that only those with the same
    share a host copy."""
    names = sorted(matched)
    streaming = run.plan.streaming(names[0])
    assert streaming is not None
    weights: dict[str, MatchedWeights] = {name: matched[name].weights for name in names}
    loaded = load_streamed(
        run,
        weights,
        streaming,
        block_list=BLOCK_LISTS[names[0]],
        axis=run.mesh.world,
        key=run.mesh["tp"].rank,
        released=forget_block_text,
    )
    return {name: _Expert(model, matched.pop(name).forget_text, stream) for name, (model, stream) in loaded.items()}
