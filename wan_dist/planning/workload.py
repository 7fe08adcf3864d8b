"""From a config and a checkpoint to what placement needs to know: bytes, by component and phase, and seconds.

Imports no torch: sizes are those of safetensors headers, or of the architecture where no file is at hand.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from wan_dist.config.schema import Config
from wan_dist.loading.checkpoint import Checkpoint
from wan_dist.planning.activations import (
    TransformerSize,
    denoise_bytes,
    image_encoder_bytes,
    process_bytes,
    text_encoder_bytes,
    vae_decode_bytes,
    vae_encode_bytes,
)
from wan_dist.planning.cost import Flops, forward_flops
from wan_dist.planning.degrees import fsdp_division
from wan_dist.planning.footprint import DECODE, DENOISE, ENCODE_IMAGES, ENCODE_TEXT, Work
from wan_dist.planning.image_input import MUST, image_input
from wan_dist.planning.rates import rates_of
from wan_dist.planning.traffic import StepShape, first_rank_share, forwards_per_step
from wan_dist.planning.video_shape import ModelShape
from wan_dist.planning.weights import Weights, component_weights

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
_FEW_STEPS = 8  # the most that step-distilled Wan models take
PIXEL_FORMATS = ("mp4", "frames")


@dataclass(frozen=True)
class Task:
    """What a run does. experts: those that steps fall to, none where nothing is denoised. guided: if any step is."""

    experts: tuple[str, ...]
    guided: bool
    steps: int
    encodes_images: bool
    decodes: bool

    @classmethod
    def of_schedule(cls, config: Config, schedule: Sequence[Any]) -> "Task":
        """Of a generation whose steps (`expert`, `guided`) are known."""
        experts = tuple(sorted({step.expert for step in schedule}))
        return cls._of(config, experts, any(step.guided for step in schedule), len(schedule))

    @classmethod
    def of_request(cls, config: Config, checkpoint: Checkpoint, *, guided: bool) -> "Task":
        """Of a generation before its schedule is made (which takes torch): every expert may have steps. Without an
        image, a model that makes a video of one will be given one."""
        boundary, experts = config.sampler.boundary_ratio, checkpoint.experts
        if boundary is not None and (boundary > 1 or boundary <= 0):  # all timesteps lie on one side of it
            only = "transformer_2" if boundary > 1 else "transformer"
            experts = (only,) if only in experts else experts
        task = cls._of(config, experts, guided, config.sampler.steps or 0)
        takes = image_input(
            checkpoint.transformer_config, checkpoint.configs["vae"], expand_timesteps=checkpoint.expand_timesteps
        )
        return replace(task, encodes_images=task.encodes_images or takes.first == MUST)

    @classmethod
    def of_decoding(cls, config: Config) -> "Task":
        return cls._of(config, (), False, 0)

    @classmethod
    def _of(cls, config: Config, experts: tuple[str, ...], guided: bool, steps: int) -> "Task":
        decodes = bool(set(PIXEL_FORMATS) & set(config.output.formats))
        return cls(experts, guided, steps, config.image is not None and bool(experts), decodes)


class Sizes:
    """Of a checkpoint's components on one rank, read once for each way of dividing them. on_disk: dtypes of files that
    are not here."""

    def __init__(self, checkpoint: Checkpoint, task: Task, on_disk: Mapping[str, str] | None = None) -> None:
        self._checkpoint, self._task, self._on_disk = checkpoint, task, on_disk
        self._known: dict[tuple[str, int, int, int], Weights | None] = {}

    def of(self, config: Config, name: str, *, tp: int = 1, shards: int = 1) -> Weights | None:
        key = (name, tp if name in self._checkpoint.experts else 1, shards, _dtype_bytes(config, name))
        if key not in self._known:
            self._known[key] = component_weights(
                self._checkpoint,
                name,
                dtype_bytes=key[3],
                tp=key[1],
                shards=shards,
                encoder=self._task.encodes_images,
                on_disk=self._on_disk,
            )
        return self._known[key]


def work_of(
    config: Config,
    checkpoint: Checkpoint,
    task: Task,
    *,
    degrees: Mapping[str, int],
    device: str,
    local_ranks: int,
    threads: int,
    sizes: Sizes | None = None,
) -> Work:
    """config: resolved. degrees: of the mesh. threads: of a rank on a CPU. sizes: where several meshes share them."""
    _, shards = fsdp_division(config.parallelism.fsdp, degrees)
    names = [*task.experts]
    names += ["text_encoder"] if task.experts else []
    names += ["image_encoder"] if task.experts and checkpoint.has_image_tokens else []
    names += ["vae"] if task.decodes or task.encodes_images else []
    sizes = sizes or Sizes(checkpoint, task)
    order = ("text_encoder", "image_encoder", "transformer", "transformer_2", "vae")
    forwards = forwards_per_step(degrees, guided=task.guided)
    return Work(
        weights={name: sizes.of(config, name, tp=degrees["tp"], shards=shards) for name in order if name in names},
        working=_working(config, checkpoint, task, degrees, device),
        streamed=_denoising(config, checkpoint, task, degrees, device, streamed=True) if task.experts else 0,
        branches=forwards,
        block_s=_block_seconds(config, checkpoint, degrees, device) if task.experts else None,
        shards=shards,
        copies=min(degrees["tp"], local_ranks),
        process=process_bytes(threads=threads if device == "cpu" else 1),
        writing=process_bytes(pixels=_mp4_pixels(config)) - process_bytes(),
        vae_ranks=_vae_ranks(config, checkpoint, degrees),
        few_steps=0 < task.steps <= _FEW_STEPS and not task.guided,
    )


def _vae_ranks(config: Config, checkpoint: Checkpoint, degrees: Mapping[str, int]) -> int:
    """Ranks that have rows of the video: each has one of the latents at least."""
    rows = _latent_rows(config, checkpoint)["rows"]
    return 1 if config.parallelism.vae == "off" else min(rows, prod(degrees.values()))


def _dtype_bytes(config: Config, component: str) -> int:
    if component == "vae":
        return DTYPE_BYTES[config.runtime.vae_dtype]
    return 4 if component == "image_encoder" else DTYPE_BYTES[str(config.runtime.dtype)]


def _mp4_pixels(config: Config) -> int:
    """Of a frame that is encoded; 0 where none is."""
    video = config.video
    return (video.height or 0) * (video.width or 0) if "mp4" in config.output.formats else 0


def _working(
    config: Config, checkpoint: Checkpoint, task: Task, degrees: Mapping[str, int], device: str
) -> dict[str, int]:
    """Bytes beside the weights, by phase. A config that its library is going to refuse counts nothing here."""
    phases: dict[str, int] = {}
    vae: dict[str, Any] = {
        **_latent_rows(config, checkpoint),
        "ranks": _vae_ranks(config, checkpoint, degrees),
        "dtype_bytes": DTYPE_BYTES[config.runtime.vae_dtype],
        "cpu": device == "cpu",
    }
    configs = checkpoint.configs
    if task.experts:
        prompts, dtype_bytes = 2 if task.guided else 1, _dtype_bytes(config, "text_encoder")
        encoder = configs["text_encoder"]
        phases[ENCODE_TEXT] = _or_nothing(lambda: text_encoder_bytes(encoder, dtype_bytes=dtype_bytes, prompts=prompts))
        if task.encodes_images:
            phases[ENCODE_IMAGES] = max(
                _or_nothing(lambda: vae_encode_bytes(configs["vae"], **vae)),
                _or_nothing(lambda: image_encoder_bytes(configs["image_encoder"], images=2))
                if checkpoint.has_image_tokens
                else 0,
            )
        phases[DENOISE] = _denoising(config, checkpoint, task, degrees, device, streamed=False)
    if task.decodes:
        phases[DECODE] = _or_nothing(lambda: vae_decode_bytes(configs["vae"], **vae))
    return phases


def _or_nothing(count: Callable[[], int]) -> int:
    try:
        return count()
    except (KeyError, TypeError, ValueError):
        return 0


def _latent_rows(config: Config, checkpoint: Checkpoint) -> dict[str, int]:
    """The latents' frames, rows and columns."""
    video = config.video
    shape = ModelShape.from_configs(checkpoint.transformer_config, checkpoint.configs["vae"])
    assert video.num_frames and video.height and video.width, "resolved before"
    _, _, frames, rows, columns = shape.latent_shape(video.num_frames, video.height, video.width)
    return {"frames": frames, "rows": rows, "columns": columns}


def _denoising(
    config: Config, checkpoint: Checkpoint, task: Task, degrees: Mapping[str, int], device: str, *, streamed: bool
) -> int:
    """Bytes beside the weights while denoising. streamed: blocks drop the text's keys, and serial guidance passes
    through each of them with both branches."""
    forwards = forwards_per_step(degrees, guided=task.guided)
    return denoise_bytes(
        TransformerSize.from_config(checkpoint.transformer_config, image_tokens=_image_tokens(checkpoint)),
        step_shape(config, checkpoint).tokens,
        tp=degrees["tp"],
        ulysses=degrees["ulysses"],
        ring=degrees["ring"],
        dtype_bytes=_dtype_bytes(config, "transformer"),
        branches=forwards,
        cpu=device == "cpu",
        steps=task.steps,
        remembered=not streamed,
        together=streamed and forwards > 1,
        per_token_timesteps=checkpoint.expand_timesteps and task.encodes_images,
    )


def step_shape(config: Config, checkpoint: Checkpoint) -> StepShape:
    """Of a resolved config."""
    transformer, video = checkpoint.transformer_config, config.video
    shape = ModelShape.from_configs(transformer, checkpoint.configs["vae"])
    assert video.num_frames and video.height and video.width, "resolved before"
    patch_t, patch_h, patch_w = shape.patch
    return StepShape(
        blocks=shape.blocks,
        heads=shape.heads,
        head_dim=shape.head_dim,
        ffn=shape.ffn,
        tokens=shape.tokens(video.num_frames, video.height, video.width),
        out_features=(transformer.get("out_channels") or shape.channels) * patch_t * patch_h * patch_w,
        image_tokens=_image_tokens(checkpoint),
    )


def _image_tokens(checkpoint: Checkpoint) -> int:
    """That an image encoder gives the transformer's cross-attention: of one image, or of a first and a last one."""
    transformer, encoder = checkpoint.transformer_config, checkpoint.configs.get("image_encoder", {})
    if transformer.get("image_dim") is None:
        return 0
    encoder = encoder.get("vision_config", encoder)
    of_one = (encoder.get("image_size", 224) // max(1, encoder.get("patch_size", 14))) ** 2 + 1
    return transformer.get("pos_embed_seq_len") or of_one


def step_flops(config: Config, checkpoint: Checkpoint, degrees: Mapping[str, int]) -> Flops:
    """Of one forward on rank 0."""
    shape = step_shape(config, checkpoint)
    share = first_rank_share(shape.tokens, shape.heads, degrees)
    return forward_flops(
        blocks=shape.blocks,
        heads=shape.heads,
        head_dim=shape.head_dim,
        ffn=shape.ffn,
        tokens=shape.tokens,
        rank_tokens=share.tokens,
        group_tokens=share.groups[0],
        group_heads=share.heads,
        tp=degrees["tp"],
    )


def decode_flops(config: Config, checkpoint: Checkpoint) -> float:
    """Of the VAE's decoding of the whole video, from those of Wan2.1's (639 TFLOP for 720x1280x81) and of Wan2.2 TI2V's
    (2011 for 704x1280x121), by pixels and by the square of the narrowest level's channels."""
    vae, video = checkpoint.configs["vae"], config.video
    assert video.num_frames and video.height and video.width, "resolved before"
    known, width = (2011e12 / (704 * 1280 * 121), 256) if vae.get("is_residual") else (639e12 / (720 * 1280 * 81), 96)
    channels = vae.get("decoder_base_dim") or vae.get("base_dim", 96)
    return known * (channels / width) ** 2 * video.num_frames * video.height * video.width


def _block_seconds(config: Config, checkpoint: Checkpoint, degrees: Mapping[str, int], device: str) -> float:
    """Of one block in one forward on rank 0, by the rates."""
    flops, rates = step_flops(config, checkpoint, degrees), rates_of(config.plan, device)
    return (flops.linear / rates.matmul + flops.attention / rates.attention) / step_shape(config, checkpoint).blocks
