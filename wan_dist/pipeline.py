"""The phases of a generation, from a frozen config to files on disk.

Every rank runs `generate`. Rank 0 encodes the prompt (all ranks do where FSDP shards the encoder), decodes and writes;
all ranks denoise together. Ranks other than 0 leave after denoising, so that none of them waits in a collective for a
long decode.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wan_dist.config.schema import Config
from wan_dist.distributed.collectives import broadcast, gather_objects
from wan_dist.distributed.fsdp import reshard
from wan_dist.distributed.mesh import AXES, Mesh
from wan_dist.distributed.process_group import process_group
from wan_dist.layers.attention_kernels import attention_kernel
from wan_dist.loading.checkpoint import Checkpoint, fingerprint, open_checkpoint
from wan_dist.loading.components import (
    MatchedTransformer,
    match_text_encoder,
    match_transformer,
    match_vae,
    transformers_in_order,
)
from wan_dist.loading.sizes import served_bytes
from wan_dist.loading.tensor_files import CheckpointError
from wan_dist.loading.weights import MatchedWeights, Sharding, fill, from_files, on_every_rank, replicas_of, sharding_of
from wan_dist.log import logger
from wan_dist.models.text_encoder import MAX_TEXT_TOKENS, encode_prompts, load_tokenizer
from wan_dist.models.wan_vae import decode_frames
from wan_dist.output.files import remove_leftovers, write_tensor
from wan_dist.output.memory import free_bytes
from wan_dist.output.names import output_path
from wan_dist.output.progress import Progress
from wan_dist.output.record import RankReport, write_record
from wan_dist.output.video import write_mp4
from wan_dist.planning.room import does_not_fit
from wan_dist.planning.video_shape import ModelShape
from wan_dist.sampling.denoise import Predict, denoise, initial_noise
from wan_dist.sampling.schedule import Step
from wan_dist.sampling.solvers import scheduled
from wan_dist.topology import RankEnv


@dataclass(frozen=True)
class _Run:
    """What every phase needs to know. config: frozen, every null resolved."""

    config: Config
    checkpoint: Checkpoint
    schedule: list[Step]
    mesh: Mesh
    device: torch.device
    report: RankReport

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, str(self.config.runtime.dtype))

    @property
    def sharding(self) -> Sharding | None:
        """How the transformers are divided, if they are."""
        return sharding_of(self.config.parallelism.fsdp, self.mesh)


@torch.no_grad()
def generate(config: Config, env: RankEnv, device: torch.device, report: RankReport) -> dict[str, str]:
    """One video. Returns the files written, by kind, on rank 0 (empty elsewhere).

    Raises CheckpointError on every rank if any rank's files are at fault.
    """
    folder = Path(str(config.output.dir))
    if env.rank == 0:
        remove_leftovers(folder, config.output.name)
    degrees = {axis: getattr(config.parallelism, axis) for axis in AXES}
    replicas = replicas_of(config.parallelism.fsdp)
    with process_group(env, degrees, device, config.runtime.timeout_s, fsdp_replicas=replicas) as mesh:
        with report.timed("check"):
            checkpoint, scheduler, schedule = on_every_rank(mesh.world, partial(_open, config, device))
            run = _Run(config, checkpoint, schedule, mesh, device, report)
            share_text_encoder = _text_encoder_needs_sharding(run)
            experts = on_every_rank(mesh.world, partial(_match_experts, run))
            others = on_every_rank(mesh.world, partial(_match_others, run, share_text_encoder))
        plan = _plan(run, list(experts), list(others), share_text_encoder)
        with report.timed("encode"):
            text = _encode(run, others.pop("text_encoder", None), share_text_encoder)
            if share_text_encoder:
                gc.collect()  # FSDP's modules and states refer to each other
        with report.timed("load"):
            predict = _load_experts(run, experts, text)
        with report.timed("denoise"):
            latents = _denoise(run, scheduler, predict)
        traffic = mesh.traffic
        ranks = gather_objects(mesh.world, report.as_dict(traffic))
        del run, predict, mesh  # the experts' memory is the VAE's from here on
    if env.rank != 0:
        return {}
    outputs = _write_outputs(config, others.get("vae"), latents, device, report)
    ranks[0] = report.as_dict(traffic)
    record = output_path(folder, config.output.name, "record")
    write_record(
        record,
        config,
        fingerprint=fingerprint(checkpoint),
        plan=plan,
        report=report,
        outputs=outputs,
        ranks=ranks,
    )
    return {**outputs, "record": str(record)}


def _open(config: Config, device: torch.device) -> tuple[Checkpoint, Any, list[Step]]:
    """The checkpoint's JSON files, the scheduler, and the schedule that it makes."""
    checkpoint = open_checkpoint(Path(str(config.model.path)))
    make = partial(scheduled, config.sampler, checkpoint.scheduler, device)
    return checkpoint, *from_files(checkpoint.path / "scheduler", make)


def _text_encoder_needs_sharding(run: _Run) -> bool:
    """Where FSDP is on: whether the text encoder does not fit the device that has the least room. The same answer on
    every rank."""
    if run.sharding is None:
        return False
    folder, world, room = run.checkpoint.path / "text_encoder", run.mesh.world, free_bytes(run.device)
    size = on_every_rank(world, partial(served_bytes, folder, dtype_bytes=run.dtype.itemsize))
    logger.info("text encoder: %s bytes, %s free here", size, room)
    return any(gather_objects(world, does_not_fit(size, room)))


def _match_experts(run: _Run) -> dict[str, MatchedTransformer]:
    """The transformers that the schedule uses."""
    kernel = attention_kernel(run.config.runtime.attention)
    names = sorted({step.expert for step in run.schedule})
    return {
        name: match_transformer(run.checkpoint, name, mesh=run.mesh, kernel=kernel, dtype=run.dtype) for name in names
    }


def _match_others(run: _Run, share_text_encoder: bool) -> dict[str, MatchedWeights]:
    """What this rank will load besides the transformers."""
    matched = {}
    if share_text_encoder or run.mesh.world.rank == 0:
        matched["text_encoder"] = match_text_encoder(run.checkpoint, dtype=run.dtype)
    if run.mesh.world.rank == 0 and {"mp4", "frames"} & set(run.config.output.formats):
        matched["vae"] = match_vae(run.checkpoint, dtype=getattr(torch, run.config.runtime.vae_dtype))
    return matched


def _encode(run: _Run, weights: MatchedWeights | None, shared: bool) -> list[torch.Tensor]:
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


def _run_text_encoder(run: _Run, weights: MatchedWeights | None, shared: bool, text: torch.Tensor) -> None:
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


def _load_experts(run: _Run, matched: dict[str, MatchedTransformer], text: list[torch.Tensor]) -> Predict:
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

    def predict(latents: torch.Tensor, timestep: torch.Tensor, step: Step, branch: int) -> torch.Tensor:
        nonlocal running
        if running not in (None, step.expert):  # an expert that is done with needs neither prompt nor gathered weights
            forget[running]()
            reshard(experts[running])
        running = step.expert
        velocity, *_ = experts[step.expert](
            hidden_states=latents.to(run.dtype),
            timestep=timestep,
            encoder_hidden_states=text[branch],
            return_dict=False,
        )
        return velocity

    return predict


def _denoise(run: _Run, scheduler: Any, predict: Predict) -> torch.Tensor:
    """From the seed's noise to the final latents, fp32 `[1, C, T, H, W]`, on every rank."""
    video, seed = run.config.video, run.config.sampler.seed
    shape = ModelShape.from_configs(run.checkpoint.transformer_config, run.checkpoint.configs["vae"])
    assert video.num_frames and video.height and video.width and seed is not None, "resolved before"
    tokens = shape.tokens(video.num_frames, video.height, video.width)
    logger.info("%d tokens over %d ranks", tokens, run.mesh["sp"].size)
    noise = initial_noise(shape.latent_shape(video.num_frames, video.height, video.width), seed)
    progress = Progress(len(run.schedule)) if run.mesh.world.rank == 0 else None
    last = time.perf_counter()

    def on_step(_step: Step) -> None:
        nonlocal last
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        now = time.perf_counter()
        run.report.steps.append(now - last)
        last = now
        if progress is not None:
            progress.step()

    latents = denoise(noise.to(run.device), run.schedule, scheduler, predict, run.mesh["cfg"], on_step)
    if progress is not None:
        progress.close()
    return latents


def _write_outputs(
    config: Config, vae_weights: MatchedWeights | None, latents: torch.Tensor, device: torch.device, report: RankReport
) -> dict[str, str]:
    """Write the formats that were asked for. The latents are on disk before decoding starts, so that a failure there
    costs the decoding alone."""
    folder, name, formats = Path(str(config.output.dir)), config.output.name, config.output.formats
    paths = {kind: output_path(folder, name, kind) for kind in ("latents", "frames", "mp4")}
    safety_copy = config.output.keep_latents and "latents" not in formats
    if "latents" in formats or safety_copy:
        with report.timed("write"):
            write_tensor(paths["latents"], "latents", latents.float())
    if vae_weights is not None:
        with report.timed("load"):
            vae: Any = fill(vae_weights, device=device, bytes_read=report.bytes_read, component="vae")
        with report.timed("decode"):
            frames = decode_frames(vae, latents)
        with report.timed("write"):
            if "frames" in formats:
                write_tensor(paths["frames"], "frames", frames)
            if "mp4" in formats:
                assert config.video.fps is not None
                write_mp4(paths["mp4"], frames, config.video.fps)
    if safety_copy:
        paths["latents"].unlink()
    return {kind: str(paths[kind]) for kind in formats}


def _plan(run: _Run, experts: list[str], others: list[str], share_text_encoder: bool) -> list[dict[str, str]]:
    """Where each component lived, and why."""
    why = "every rank holds all of its weights, but for what tensor parallelism divides"
    if run.config.parallelism.fsdp.enabled == "on":
        why += "; FSDP is on, but one rank is all that it could divide a replica over"
    transformer = ("resident", why)
    text_encoder = ("component", "on rank 0 while it encodes the prompt, freed before the transformer is loaded")
    if run.sharding is not None:
        ranks = run.sharding.fsdp.shard.size
        transformer = ("fsdp", f"parallelism.fsdp.enabled=on: its rows are divided over {ranks} ranks")
        if share_text_encoder:
            text_encoder = ("fsdp", f"it does not fit one device: divided over {ranks} ranks, freed after encoding")
    placements = {"text_encoder": text_encoder, "vae": ("component", "on rank 0, loaded after denoising")}
    names = [*(["text_encoder"] if "text_encoder" in others else []), *experts, *(["vae"] if "vae" in others else [])]
    rows = [(name, *placements.get(name, transformer)) for name in names]
    return [{"component": name, "placement": placement, "reason": reason} for name, placement, reason in rows]
