"""The phases of a generation, from a frozen config to files on disk.

Every rank runs `generate`. Rank 0 encodes the prompt, decodes and writes; all ranks denoise together. Ranks other
than 0 leave after denoising, so that none of them waits in a collective for a long decode.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wan_dist.config.schema import Config
from wan_dist.distributed.collectives import broadcast, gather_objects
from wan_dist.distributed.mesh import AXES, Mesh
from wan_dist.distributed.process_group import process_group
from wan_dist.layers.attention import attention_kernel
from wan_dist.loading.checkpoint import Checkpoint, fingerprint, open_checkpoint
from wan_dist.loading.tensor_files import CheckpointError
from wan_dist.loading.weights import MatchedWeights, fill, from_files, match_weights, on_every_rank
from wan_dist.log import logger
from wan_dist.models.text_encoder import MAX_TEXT_TOKENS, encode_prompts, load_tokenizer, meta_text_encoder
from wan_dist.models.wan_transformer import meta_transformer, parallelize_wan_transformer
from wan_dist.models.wan_vae import decode_frames, meta_vae
from wan_dist.output.files import remove_leftovers, write_tensor
from wan_dist.output.names import output_path
from wan_dist.output.progress import Progress
from wan_dist.output.record import RankReport, write_record
from wan_dist.output.video import write_mp4
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


@torch.no_grad()
def generate(config: Config, env: RankEnv, device: torch.device, report: RankReport) -> dict[str, str]:
    """One video. Returns the files written, by kind, on rank 0 (empty elsewhere).

    Raises CheckpointError on every rank if any rank's files are at fault.
    """
    checkpoint = open_checkpoint(Path(str(config.model.path)))
    scheduler, schedule = from_files(
        checkpoint.path / "scheduler", partial(scheduled, config.sampler, checkpoint.scheduler, device)
    )
    folder = Path(str(config.output.dir))
    if env.rank == 0:
        remove_leftovers(folder, config.output.name)
    degrees = {axis: getattr(config.parallelism, axis) for axis in AXES}
    with process_group(env, degrees, device, config.runtime.timeout_s) as mesh:
        run = _Run(config, checkpoint, schedule, mesh, device, report)
        with report.timed("check"):
            weights = on_every_rank(mesh.world, partial(_match_components, run))
        plan = _plan(["text_encoder", *weights])
        with report.timed("encode"):
            text = _encode(run, weights.pop("text_encoder", None))
        with report.timed("load"):
            predict = _load_experts(run, weights, text)
        with report.timed("denoise"):
            latents = _denoise(run, scheduler, predict)
        traffic = mesh.traffic
        ranks = gather_objects(mesh.world, report.as_dict(traffic))
        del run, predict, mesh  # the experts' memory is the VAE's from here on
    if env.rank != 0:
        return {}
    outputs = _write_outputs(config, weights.get("vae"), latents, device, report)
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


def _match_components(run: _Run) -> dict[str, MatchedWeights]:
    """Every component this rank will load, checked name by name before anything is read."""
    checkpoint, path = run.checkpoint, run.checkpoint.path

    def match(name: str, build: Callable[[], Any]) -> MatchedWeights:
        model = from_files(path / name, build)
        return match_weights(model, path / name, getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())

    experts = sorted({step.expert for step in run.schedule})
    matched = {name: match(name, partial(meta_transformer, checkpoint.configs[name])) for name in experts}
    if run.mesh.world.rank == 0:
        encoder = partial(meta_text_encoder, path / "text_encoder", checkpoint.index["text_encoder"][1])
        matched["text_encoder"] = match("text_encoder", encoder)
        if {"mp4", "frames"} & set(run.config.output.formats):
            matched["vae"] = match("vae", partial(meta_vae, checkpoint.configs["vae"]))
    return matched


def _encode(run: _Run, weights: MatchedWeights | None) -> list[torch.Tensor]:
    """The prompt's embedding and, where a step is guided, the negative prompt's: `[1, 512, width]` each, all ranks.

    weights: the text encoder's, on the rank that runs it; its memory is free again when this returns.
    """
    config, checkpoint = run.config, run.checkpoint
    branches = 2 if any(step.guided for step in run.schedule) else 1
    width = checkpoint.transformer_config.get("text_dim", 4096)
    text = torch.empty(branches, MAX_TEXT_TOKENS, width, dtype=run.dtype, device=run.device)

    def encode() -> None:
        if weights is None:
            return
        folder, read = checkpoint.path / "tokenizer", run.report.bytes_read
        tokenizer = from_files(folder, partial(load_tokenizer, folder))
        encoder = fill(weights, dtype=run.dtype, device=run.device, bytes_read=read, component="text_encoder")
        negative = (config.negative_prompt or "") if branches == 2 else None
        encoded = encode_prompts(encoder, tokenizer, str(config.prompt), negative, run.device)
        if encoded.shape != text.shape:
            raise CheckpointError(
                f"{checkpoint.path}: the text encoder gives width {encoded.shape[-1]}, the transformer wants {width}"
            )
        text.copy_(encoded)

    on_every_rank(run.mesh.world, encode)
    # Two tensors of their own, kept for the whole run: what is remembered of a prompt goes by its tensor's identity.
    return [part.clone() for part in broadcast(run.mesh.world, text).split(1)]


def _load_experts(run: _Run, weights: dict[str, MatchedWeights], text: list[torch.Tensor]) -> Predict:
    """Fill and parallelise the experts that the schedule uses; returns the prediction that the loop calls.

    They are taken out of `weights`: the prediction alone keeps them, so that they are gone when it is.
    """
    attend = attention_kernel(run.config.runtime.attention)
    experts: dict[str, Any] = {}
    forget: dict[str, Callable[[], None]] = {}
    for name in sorted({step.expert for step in run.schedule}):
        matched, read = weights.pop(name), run.report.bytes_read
        islands = matched.module._keep_in_fp32_modules or ()
        load = partial(
            fill, matched, dtype=run.dtype, device=run.device, keep_fp32=islands, bytes_read=read, component=name
        )
        experts[name] = on_every_rank(run.mesh.world, load)
        forget[name] = parallelize_wan_transformer(experts[name], run.mesh["ulysses"], attend)

    def predict(latents: torch.Tensor, timestep: torch.Tensor, step: Step, branch: int) -> torch.Tensor:
        for other in set(forget) - {step.expert}:  # an expert that is done with needs the prompt no more
            forget[other]()
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
    logger.info("%d tokens over %d ranks", tokens, run.mesh["ulysses"].size)
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
            dtype = getattr(torch, config.runtime.vae_dtype)
            vae: Any = fill(vae_weights, dtype=dtype, device=device, bytes_read=report.bytes_read, component="vae")
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


def _plan(components: list[str]) -> list[dict[str, str]]:
    """Where each component lived: this version's one placement."""
    on_all = ("resident", "every rank holds all weights")
    placements = {
        "text_encoder": ("component", "on rank 0 while it encodes the prompt, freed before the transformer is loaded"),
        "transformer": on_all,
        "transformer_2": on_all,
        "vae": ("component", "on rank 0, loaded after denoising"),
    }
    return [{"component": name, "placement": placements[name][0], "reason": placements[name][1]} for name in components]
