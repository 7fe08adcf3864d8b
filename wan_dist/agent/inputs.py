"""The files that a request names besides the model: pictures and latents, read as far as decides whether it can run."""

from dataclasses import replace
from pathlib import Path

from wan_dist.config.schema import Config
from wan_dist.loading.latents import LatentsFile, describe_latents
from wan_dist.loading.tensor_files import CheckpointError
from wan_dist.output.names import KINDS, output_path, output_paths, temporary_path
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
            read_image(Path(given))
            setattr(config, key, str(Path(given).absolute()))
        except ImageError as error:
            why, _, remedy = str(error).partition("; ")
            found.append(Refusal(key, given, why, remedy or "name a picture that Pillow reads, such as PNG or JPEG"))
    return found


def input_refusals(config: Config) -> list[Refusal]:
    """Files to be read that the run would itself write, or remove as left over from an earlier one; latents and images
    for tasks that read none. `output.dir` is resolved."""
    folder, output = Path(str(config.output.dir)), config.output
    kinds = {"record", *output.formats, *(["latents"] if config.task == "generate" else [])}
    known = kinds.intersection(KINDS)  # another format is refused elsewhere
    written = {path.resolve(): path for path in (output_path(folder, output.name, kind) for kind in sorted(known))}
    written |= {temporary_path(path).resolve(): temporary_path(path) for path in output_paths(folder, output.name)}
    found = []
    for key in ("image", "last_image", "latents"):
        given = getattr(config, key)
        if given is None:
            continue
        if config.task not in (("decode",) if key == "latents" else ("generate", "plan")):
            task = "decode" if key == "latents" else "generate"
            found.append(Refusal(key, given, f"only task={task} reads it", "leave it out"))
        elif (target := written.get(Path(given).resolve())) is not None:
            why = f"this run writes (or removes) {target.name} itself"
            found.append(Refusal(key, given, why, "use another output.name, or leave that format out"))
    return found


def take_over_model(config: Config) -> list[Refusal]:
    """Where latents are to be decoded and no model is named: the one they were made with, in place; refused where they
    do not say, or it is not here."""
    latents = _described(config)
    if not isinstance(latents, LatentsFile):
        return []  # which is said elsewhere
    remedy = "name the model that made them: model=NAME or model.path=FOLDER"
    if latents.model_path is None:
        return [Refusal("latents", config.latents, "the file does not say which model made it", remedy)]
    if not Path(latents.model_path).is_dir():
        return [Refusal("latents", config.latents, f"made with {latents.model_path}, which is not here", remedy)]
    config.model.path = latents.model_path
    return []


def take_over_request(given: Config, resolved: Config, shape: ModelShape) -> list[Refusal]:
    """Set the video's size to that of the latents to decode, and what is not given to what they say of the run that
    made them, in place; returns what does not fit them."""
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
    for key, value in latents.request.items():
        setattr(resolved, key, value if getattr(given, key) is None else getattr(given, key))
    resolved.sampler = replace(given.sampler)  # nothing is sampled: neither a recipe nor a default says how it was
    for key, value in latents.sampler.items():
        if getattr(given.sampler, key) is None:
            setattr(resolved.sampler, key, value)
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
