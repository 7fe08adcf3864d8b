"""Images as a transformer's condition: read and resized by the first rank, encoded by the VAE's ranks together."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from wan_dist.distributed.collectives import broadcast, gather_objects, wait_for_first
from wan_dist.loading.images import ImageError, read_image
from wan_dist.loading.tensor_files import CheckpointError
from wan_dist.loading.weights import MatchedWeights, fill, from_files, on_every_rank
from wan_dist.models import image_encoder
from wan_dist.models.wan_latents import normalised
from wan_dist.models.wan_vae import ParallelVae
from wan_dist.pipeline.run import Run
from wan_dist.planning.footprint import RESIDENT
from wan_dist.sampling.condition import Condition, FirstFrame, ImageChannels, frame_mask


def encode_condition(run: Run, encoder: MatchedWeights | None, vae: ParallelVae | None) -> Condition:
    """What the request's images are to the transformers, the same on every rank.

    encoder: the image encoder's weights, on the first rank, where the model has one; its memory is free again when
    this returns. vae: on the ranks that have rows of the video, where there is an image.
    """
    config, world = run.config, run.mesh.world
    paths = [Path(path) for path in (config.image, config.last_image) if path is not None]
    if not paths:
        return Condition()
    images = on_every_rank(world, lambda: [_read(path) for path in paths] if run.is_first else [])
    tokens = _image_tokens(run, encoder, images)
    pixels = _pixels(run, images, len(paths))
    if run.checkpoint.expand_timesteps:
        return FirstFrame(image_tokens=tokens, frame=_latents(run, vae, pixels, 1))
    video = config.video
    assert video.num_frames is not None, "resolved before"
    latents = _latents(run, vae, pixels, video.num_frames)
    stride = run.checkpoint.configs["vae"].get("scale_factor_temporal", 4)
    mask = frame_mask(tuple(latents.shape), stride, last=len(paths) == 2).to(latents)
    return ImageChannels(image_tokens=tokens, channels=torch.cat([mask, latents], dim=1))


def _read(path: Path) -> Any:
    """It was read before the ranks started; only a file that has changed since can fail."""
    try:
        return read_image(path)
    except ImageError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _image_tokens(run: Run, weights: MatchedWeights | None, images: list[Any]) -> torch.Tensor | None:
    """The image encoder's output, fp32 `[n, tokens, width]`; None where the model has no such encoder."""
    checkpoint, world = run.checkpoint, run.mesh.world
    if not checkpoint.has_image_tokens:
        return None

    def encode() -> torch.Tensor | None:
        if weights is None:
            return None
        folder = checkpoint.path / "image_processor"
        load = image_encoder.load_image_processor
        processor = from_files(folder, lambda: load(folder, checkpoint.class_name("image_processor") or ""))
        model = fill(weights, device=run.device, bytes_read=run.report.bytes_read, component="image_encoder")
        if run.plan.how("image_encoder") == RESIDENT:
            run.kept.append(model)
        encode = partial(image_encoder.encode_images, model, processor, images, run.device)
        return from_files(folder, encode).float()

    encoded = on_every_rank(world, encode)
    shape = gather_objects(world, None if encoded is None else tuple(encoded.shape))[0]
    tokens = torch.empty(shape, device=run.device) if encoded is None else encoded.contiguous()
    return broadcast(world, tokens)


def _pixels(run: Run, images: list[Any], count: int) -> torch.Tensor:
    """`[count, 3, H, W]` in [-1, 1], fp32, on every rank."""
    video, world = run.config.video, run.mesh.world
    assert video.height and video.width, "resolved before"
    pixels = torch.empty(count, 3, video.height, video.width, device=run.device)
    if run.is_first:
        stride = run.checkpoint.configs["vae"].get("scale_factor_spatial", 8)
        pixels.copy_(image_encoder.pixels(images, video.height, video.width, stride))
    return broadcast(world, pixels)


def _latents(run: Run, vae: ParallelVae | None, pixels: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Normalised latents `[1, z, T, H, W]`, fp32, of a video whose first frame (and last, if two are given) is an image
    and whose other frames are mid-grey, which is 0."""
    first, *last = pixels

    def rows(begin: int, end: int) -> torch.Tensor:
        part = pixels.new_zeros(1, 3, num_frames, end - begin, pixels.shape[3])
        part[0, :, 0] = first[:, begin:end]
        if last:
            part[0, :, -1] = last[0][:, begin:end]
        return part

    frames = 1 if num_frames == 1 else run.latent_shape[2]
    shape = (*run.latent_shape[:2], frames, *run.latent_shape[3:])
    latents = torch.empty(shape, device=run.device)
    if vae is not None:
        encoded = vae.encode(num_frames, pixels.shape[2], rows)
        if encoded is not None:
            latents.copy_(normalised(vae.model, encoded.float()))
    wait_for_first(run.mesh, "images encoded")
    return broadcast(run.mesh.world, latents)
