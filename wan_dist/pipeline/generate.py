"""`task=generate`: one video, from a frozen config to files on disk.

Every rank runs `generate`. The first rank encodes the prompt and the pictures' content (all ranks encode the prompt
where FSDP shards the encoder); all ranks denoise together; those that have rows of the video encode images and decode
together, and the first one writes what they send it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wan_dist.config.schema import Config
from wan_dist.distributed.collectives import gather_objects
from wan_dist.loading.checkpoint import Checkpoint, fingerprint, open_checkpoint
from wan_dist.loading.components import match_image_encoder, match_text_encoder, match_vae
from wan_dist.loading.weights import MatchedWeights, from_files, on_every_rank
from wan_dist.log import logger
from wan_dist.models.wan_vae import ParallelVae
from wan_dist.output.memory import return_device_memory
from wan_dist.output.names import output_path
from wan_dist.output.progress import Progress
from wan_dist.output.record import RankReport, write_record
from wan_dist.pipeline.experts import load_experts, match_experts
from wan_dist.pipeline.images import encode_condition
from wan_dist.pipeline.plan import agreed_plan, plan_rows
from wan_dist.pipeline.resume import Start, StateKeeper, read_start
from wan_dist.pipeline.run import Run, latent_shape, run_mesh, wants_pixels
from wan_dist.pipeline.text import encode_text
from wan_dist.pipeline.video import latents_kept, load_vae, outputs, write_latents, write_video
from wan_dist.planning.footprint import FSDP, RESIDENT
from wan_dist.planning.video_shape import ModelShape
from wan_dist.planning.workload import Task
from wan_dist.sampling.denoise import Predict, denoise, initial_noise
from wan_dist.sampling.schedule import Step
from wan_dist.sampling.solvers import scheduled
from wan_dist.stop import StoppedError, StopRequest
from wan_dist.topology import RankEnv


@torch.no_grad()
def generate(
    config: Config, env: RankEnv, device: torch.device, report: RankReport, stop: StopRequest | None = None
) -> dict[str, str]:
    """One video. Returns the files written, by kind, on rank 0 (empty elsewhere). stop: None where nobody asks.

    Raises CheckpointError on every rank if any rank's files are at fault, StoppedError after a stop.
    """
    stop = stop or StopRequest()
    with run_mesh(config, env, device) as mesh:
        with report.timed("check"):
            checkpoint, scheduler, schedule = on_every_rank(mesh.world, partial(_open, config, device))
            report.plan = plan = agreed_plan(config, checkpoint, Task.of_schedule(config, schedule), mesh, report)
            run = Run(config, checkpoint, plan, schedule, latent_shape(config, checkpoint), mesh, device, report)
            start = read_start(run, scheduler)
            run = replace(run, first_step=start.first_step)
            experts = on_every_rank(mesh.world, partial(match_experts, run))
            others = on_every_rank(mesh.world, partial(_match_others, run))
        with report.timed("encode"):
            text = encode_text(run, others.pop("text_encoder", None)) if run.remaining else []
            return_device_memory(device)
            vae = load_vae(run, others.pop("vae", None)) if config.image is not None else None
            condition = encode_condition(run, others.pop("image_encoder", None), vae)
            vae = _kept(run, vae)
            return_device_memory(device)
        with StateKeeper(run, scheduler, stop) as keeper:
            with report.timed("load"):
                predict, forget_text = load_experts(run, experts, text, condition)
                if plan.how("vae") == RESIDENT and config.image is None:
                    vae = load_vae(run, others.pop("decoder", None))
            with report.timed("denoise"):
                result = _denoise(run, scheduler, predict, start, keeper, stop)
            forget_text()
            del predict, forget_text  # unless the plan keeps them, the experts' memory is the VAE's from here on
            return_device_memory(device)
            with _stoppable(run, keeper, result, stop):
                latents = condition.finish(result)
                files = _latents_to_files(run, vae, others.pop("decoder", None), latents, stop)
            keeper.remove()
        del run, vae, mesh
    return files


@contextmanager
def _stoppable(run: Run, keeper: StateKeeper, result: torch.Tensor, stop: StopRequest) -> Iterator[None]:
    """From the end of the loop to that of the run: the first rank, which has the result, leaves when it is asked to,
    once that is saved, and the others follow it; they do not stop by themselves."""
    try:
        if run.is_first:
            stop.release()
        yield
    except StoppedError:
        raise keeper.save_result(result) from None


def _latents_to_files(
    run: Run, vae: ParallelVae | None, decoder: MatchedWeights | None, latents: torch.Tensor, stop: StopRequest
) -> dict[str, str]:
    """Everything after the last step. decoder: where the VAE is yet to be loaded."""
    with latents_kept(run, latents):
        spare = write_latents(run, latents)
        if wants_pixels(run):
            if run.plan.how("vae") != RESIDENT:
                with run.report.timed("load"):
                    vae = load_vae(run, decoder)
            write_video(run, vae, latents)
        stop.hold()  # what is written is complete in a moment
        return finish_run(run, spare)


def _kept(run: Run, vae: ParallelVae | None) -> ParallelVae | None:
    """What stays of the VAE once it has encoded the images: what decoding needs, where it is resident."""
    if vae is None or run.plan.how("vae") != RESIDENT:
        return None
    return vae.without_encoder() if wants_pixels(run) else vae


def finish_run(run: Run, spare: Path | None) -> dict[str, str]:
    """Gather what the ranks measured; on the first, write the run record, remove `spare` and return the files, by
    kind."""
    ranks = gather_objects(run.mesh.world, run.report.as_dict(run.mesh.traffic))
    if not run.is_first:
        return {}
    config, files = run.config, outputs(run)
    record = output_path(Path(str(config.output.dir)), config.output.name, "record")
    write_record(
        record,
        config,
        fingerprint=fingerprint(run.checkpoint),
        plan=plan_rows(run.plan),
        report=run.report,
        outputs=files,
        ranks=ranks,
    )
    if spare is not None:
        spare.unlink(missing_ok=True)
    return {**files, "record": str(record)}


def _open(config: Config, device: torch.device) -> tuple[Checkpoint, Any, list[Step]]:
    """The checkpoint's JSON files, the scheduler, and the schedule that it makes."""
    checkpoint = open_checkpoint(Path(str(config.model.path)))
    make = partial(scheduled, config.sampler, checkpoint.scheduler, device)
    return checkpoint, *from_files(checkpoint.path / "scheduler", make)


def _match_others(run: Run) -> dict[str, MatchedWeights]:
    """What this rank will load besides the transformers: `vae` for encoding images, `decoder` where the VAE is loaded
    for decoding alone."""
    matched = {}
    if run.plan.how("text_encoder") == FSDP or run.is_first:
        matched["text_encoder"] = match_text_encoder(run.checkpoint, dtype=run.dtype)
    if run.is_first and run.checkpoint.has_image_tokens:
        matched["image_encoder"] = match_image_encoder(run.checkpoint)
    dtype, encodes = getattr(torch, run.config.runtime.vae_dtype), run.config.image is not None
    if run.runs_vae and encodes:
        matched["vae"] = match_vae(run.checkpoint, dtype=dtype, encoder=True)
    if run.runs_vae and wants_pixels(run) and not (encodes and run.plan.how("vae") == RESIDENT):
        matched["decoder"] = match_vae(run.checkpoint, dtype=dtype, encoder=False)
    return matched


def _denoise(
    run: Run, scheduler: Any, predict: Predict, start: Start, keeper: StateKeeper, stop: StopRequest
) -> torch.Tensor:
    """From the seed's noise, or a saved state, to the final latents, fp32 `[1, z, T, H, W]`, on every rank. From here
    on stops are held: the ranks agree on them after each step."""
    video, seed = run.config.video, run.config.sampler.seed
    shape = ModelShape.from_configs(run.checkpoint.transformer_config, run.checkpoint.configs["vae"])
    assert video.num_frames and video.height and video.width and seed is not None, "resolved before"
    tokens = shape.tokens(video.num_frames, video.height, video.width)
    logger.info("%d tokens over %d ranks", tokens, run.mesh["sp"].size)
    latents = initial_noise(run.latent_shape, seed).to(run.device) if start.latents is None else start.latents
    progress = Progress(len(run.schedule), done=run.first_step) if run.is_first else None
    run.report.mark_step(run.first_step, len(run.schedule))
    stop.hold()
    last = time.perf_counter()

    def on_step(step: Step, latents: torch.Tensor) -> None:
        nonlocal last
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        now = time.perf_counter()
        run.report.steps.append(now - last)
        last = now
        run.report.mark_step(step.index + 1, len(run.schedule))
        if progress is not None:
            progress.step()
        keeper.after_step(step.index + 1, latents)

    latents = denoise(latents, run.remaining, scheduler, predict, run.mesh["cfg"], on_step)
    if progress is not None:
        progress.close()
    return latents
