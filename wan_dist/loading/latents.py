"""A file of latents, as its header describes it: what `task=decode` starts from. Imports no torch."""

import json
from dataclasses import dataclass
from pathlib import Path

from wan_dist.loading.tensor_files import CheckpointError, read_header

_RATES = (0.1, 1000)  # those that `video.fps` may have
_FLOATS = ("F32", "F16", "BF16", "F64")
MODEL, FPS = "model.path", "video.fps"  # keys of the header's metadata: what a decoder cannot know otherwise


@dataclass(frozen=True)
class LatentsFile:
    """shape: `(1, z, T, H, W)` of its tensor `latents`. model_path, fps: what the run that wrote it put in, if any."""

    shape: tuple[int, ...]
    model_path: str | None
    fps: float | None


def describe_latents(file: Path) -> LatentsFile:
    """Raises CheckpointError, naming the file, where it is no safetensors file with floats `latents` of that form."""
    try:
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file")
        entries = read_header(file)
        metadata = _metadata(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    entry = entries.get("latents")
    if entry is None:
        raise CheckpointError(f"{file}: holds no tensor 'latents' (but {', '.join(sorted(entries)[:3]) or 'nothing'})")
    if len(entry.shape) != 5 or entry.shape[0] != 1 or 0 in entry.shape or entry.dtype not in _FLOATS:
        why = f"{entry.dtype} of shape {entry.shape}"
        raise CheckpointError(f"{file}: tensor 'latents' is {why}, not floats of shape (1, z, T, H, W)")
    return LatentsFile(entry.shape, metadata.get(MODEL), _rate(metadata.get(FPS)))


def _metadata(file: Path) -> dict[str, str]:
    """The header's free texts. The header was read before, so that it is known to be one."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    found = header.get("__metadata__")
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def _rate(text: str | None) -> float | None:
    try:
        rate = float(text or "nan")
    except ValueError:
        return None
    return rate if _RATES[0] <= rate <= _RATES[1] else None
