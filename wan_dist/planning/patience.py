"""How long a phase may go on without a sign of progress before that is a stall. Pure arithmetic; imports no torch.

Either the user says (`runtime.stall_timeout_s`), or it follows from what the planner expects one unit of progress to
take: a component loaded, a step, a latent frame decoded. Such an estimate is off by an order of magnitude on a machine
that it does not know; therefore it only ever lengthens a generous minimum.
"""

from collections.abc import Mapping
from math import prod

from wan_dist.config.schema import Config
from wan_dist.loading.checkpoint import Checkpoint
from wan_dist.planning.activations import MAX_TEXT_TOKENS
from wan_dist.planning.cost import Rates
from wan_dist.planning.footprint import Machine, Work
from wan_dist.planning.placement import Plan
from wan_dist.planning.rates import rates_of
from wan_dist.planning.survey import Place, bytes_from_disk, decode_seconds, step_cost
from wan_dist.planning.video_shape import ModelShape
from wan_dist.planning.workload import DTYPE_BYTES, Sizes, Task

_FACTOR = 20  # times the estimate: 10 by which it may be off, and 2 to spare
_MINIMUM_S = 300.0  # kernels compiled at first use, a GPU or a disk that others use too, a machine that swaps
# Shorter than a collective may take (`runtime.timeout_s`, 600): else who waits for the rank that stalls fails first.
_READING_S = 540.0  # where files are read: umT5's largest tensor (4.2 GB) from a network disk at 8 MB/s
START_S = 540.0  # ranks import as many files, and then wait for the last one
# Minima by phase. `start` is what comes before the ranks have met: it takes as long on an idle model as on a large one.
_MINIMA = {
    "start": START_S, "check": _READING_S, "encode": _READING_S, "load": _READING_S,
    "denoise": _MINIMUM_S, "decode": _MINIMUM_S, "write": _MINIMUM_S,
}  # fmt: skip
_WRITTEN_PER_S = 5e6  # pixels that one core encodes as H.264, or bytes that a slow disk takes


def stall_limits(asked: float | None, *, seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds without progress that are a stall, by phase.

    asked: `runtime.stall_timeout_s`, which then holds for all phases but `start`, where it only lengthens the minimum:
    imports take tens of seconds on a busy machine, and ranks that are through wait for the others. seconds: expected
    for one unit of progress, by phase (`phase_seconds`); empty before there is a plan.

    >>> stall_limits(None, seconds={"denoise": 60.0, "decode": 1.0})["denoise"]
    1200.0
    >>> sorted(stall_limits(5.0, seconds={}).items())[:2]
    [('check', 5.0), ('decode', 5.0)]
    """
    if asked is not None:
        return {phase: max(asked, START_S) if phase == "start" else asked for phase in _MINIMA}
    return {phase: max(minimum, _FACTOR * seconds.get(phase, 0.0)) for phase, minimum in _MINIMA.items()}


def phase_seconds(
    config: Config,
    checkpoint: Checkpoint,
    task: Task,
    machine: Machine,
    *,
    degrees: Mapping[str, int],
    work: Work,
    plan: Plan,
    sizes: Sizes | None = None,
) -> dict[str, float]:
    """Seconds expected for one unit of progress, by phase, on the first rank, which has the most to do: all of
    `encode`, whose parts are few; a component of `load`; a step; a latent frame decoded, and written.

    config: resolved. work, plan: of this config on `machine`. sizes: where they are known already.
    """
    ranks, rates = prod(degrees.values()), rates_of(config.plan, machine.device)
    nodes = -(-ranks // machine.local_ranks)
    place = Place(ranks, nodes, machine.device, machine.device_bytes, machine.host_bytes)
    sizes = sizes or Sizes(checkpoint, task)
    read = bytes_from_disk(config, place, work=work, plan=plan, sizes=sizes)
    load_s = {name: size / rates.disk for name, size in read.items()}
    frames, pixels = _latent_frames(config, checkpoint), _pixels(config)
    decode_s = decode_seconds(config, checkpoint, place, rates)
    seconds = {"load": max(load_s.values(), default=0.0), "write": pixels / frames / _WRITTEN_PER_S}
    if task.decodes:
        seconds["decode"] = decode_s / frames
    if task.experts:
        _, step = step_cost(config, checkpoint, task, place, degrees=degrees, work=work, plan=plan, rates=rates)
        seconds["denoise"] = step["total"]
        encoders = sum(load_s.get(name, 0.0) for name in ("text_encoder", "image_encoder"))
        # Encoding a video takes the VAE no longer than decoding it: its encoder is the narrower half.
        images = load_s.get("vae", 0.0) + decode_s if task.encodes_images else 0.0
        seconds["encode"] = encoders + _text_seconds(config, task, work, rates) + images
    return seconds


def _text_seconds(config: Config, task: Task, work: Work, rates: Rates) -> float:
    """Of the prompts through the text encoder: 2 FLOP per weight and token (one more pass where FSDP divides it, which
    is hidden in the factor)."""
    weights, prompts = work.weights.get("text_encoder"), 2 if task.guided else 1
    if weights is None:
        return 0.0
    parameters = weights.total / DTYPE_BYTES[str(config.runtime.dtype)]
    return 2 * parameters * MAX_TEXT_TOKENS * prompts / rates.matmul


def _latent_frames(config: Config, checkpoint: Checkpoint) -> int:
    shape = ModelShape.from_configs(checkpoint.transformer_config, checkpoint.configs["vae"])
    video = config.video
    assert video.num_frames and video.height and video.width, "resolved before"
    return shape.latent_shape(video.num_frames, video.height, video.width)[2]


def _pixels(config: Config) -> int:
    video = config.video
    assert video.num_frames and video.height and video.width, "resolved before"
    return video.num_frames * video.height * video.width
