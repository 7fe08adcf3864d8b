"""The files that a request names besides the model: pictures and latents, read as far as decides whether it can run."""

from pathlib import Path

from wan_dist.config.schema import Config
from wan_dist.loading.latents import LatentsFile, describe_latents
from wan_dist.loading.tensor_files import CheckpointError
from wan_dist.planning.refusal import Refusal
from wan_dist.planning.video_shape import ModelShape


def image_file_refusals(config: Config) -> list[Refusal]:
    """Read the pictures of a generation, so that none can fail later; their paths are made absolute, in place."""
    if config.task != "generate" or (config.image is None and config.last_image is None):
        return []
    from wan_dist.loading.images import ImageError, read_image

    found = []
    for key in ("image", "last_image"):
        given = getattr(config, key)
        if given is None:
            continue
        try:
            if "://" in given:
                raise ImageError("is an address, not a file; download it first")
            setattr(config, key, str(Path(given).absolute()))
            read_image(Path(given))
        except ImageError as error:
            found.append(Refusal(key, given, str(error), "name a picture that Pillow reads, such as PNG or JPEG"))
    return found


def take_over_model(config: Config) -> None:
    """Where latents are to be decoded and no model is named: the one they were made with, in place, if they say so."""
    latents = _described(config)
    if isinstance(latents, LatentsFile):
        config.model.path = latents.model_path


def take_over_size(given: Config, resolved: Config, shape: ModelShape) -> list[Refusal]:
    """Set the video's size to that of the latents to decode, and a rate that is not given to theirs, in place; returns
    what does not fit them."""
    latents = _described(given)
    if latents is None:
        return []  # which is said elsewhere
    if isinstance(latents, Refusal):
        return [latents]
    resolved.latents = str(Path(str(given.latents)).absolute())
    if latents.shape[1] != shape.channels:
        why = f"they have {latents.shape[1]} channels, this model's VAE {shape.channels}"
        return [Refusal("latents", given.latents, why, "name the model that they were made with")]
    if given.video.fps is None and latents.fps is not None:
        resolved.video.fps = latents.fps
    found = []
    for name, theirs in zip(("num_frames", "height", "width"), shape.video_of(latents.shape), strict=True):
        asked = getattr(given.video, name)
        if asked not in (None, theirs):
            found.append(Refusal(f"video.{name}", asked, f"the latents are those of {theirs}", "leave it out"))
        setattr(resolved.video, name, theirs)
    return found


def _described(config: Config) -> LatentsFile | Refusal | None:
    """What the file of latents says of itself, or why it cannot be used; None where none is given."""
    if config.latents is None:
        return None
    file = Path(config.latents)
    try:
        return describe_latents(file)
    except CheckpointError as error:
        remedy = "give a file that output.formats=[latents] or output.keep_latents wrote"
        return Refusal("latents", config.latents, str(error).removeprefix(f"{file}: "), remedy)
