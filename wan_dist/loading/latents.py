"""A file of latents: what `task=decode` starts from, and what the run that wrote it left of itself in its header.
Imports no torch."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wan_dist.config.schema import Config, SamplerConfig, VideoConfig, leaves
from wan_dist.loading.tensor_files import CheckpointError, read_header

_FLOATS = ("F32", "F16", "BF16", "F64")
_ORIGIN = "wan_dist"  # the key of a JSON text in the header's metadata
_REQUEST = ("prompt", "negative_prompt", "image", "last_image")
_RATE = next(rule for name, _, rule in leaves(VideoConfig) if name == "fps")


@dataclass(frozen=True)
class LatentsFile:
    """shape: `(1, z, T, H, W)` of its tensor `latents`. The rest is what was left of the run that wrote it: None, or no
    entry, where it is not known."""

    shape: tuple[int, ...]
    model_path: str | None = None
    fps: float | None = None
    request: dict[str, str] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)


def origin_metadata(config: Config) -> dict[str, str]:
    """The metadata by which `describe_latents` knows the run. config: resolved. ASCII: a path need not be UTF-8."""
    request = {key: getattr(config, key) for key in _REQUEST}
    origin = {
        "model": config.model.path,
        "fps": config.video.fps,
        "request": request,
        "sampler": asdict(config.sampler),
    }
    return {_ORIGIN: json.dumps(origin)}


def describe_latents(file: Path) -> LatentsFile:
    """Raises CheckpointError, naming the file, where it is no safetensors file with floats `latents` of that form."""
    try:
        if not file.is_file():
            raise CheckpointError(f"{file}: {'not a file' if file.exists() else 'no such file'}")
        entries = read_header(file)
        origin = _origin(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    entry = entries.get("latents")
    if entry is None:
        raise CheckpointError(f"{file}: holds no tensor 'latents' (but {', '.join(sorted(entries)[:3]) or 'nothing'})")
    if len(entry.shape) != 5 or entry.shape[0] != 1 or 0 in entry.shape or entry.dtype not in _FLOATS:
        why = f"{entry.dtype} of shape {entry.shape}"
        raise CheckpointError(f"{file}: tensor 'latents' is {why}, not floats of shape (1, z, T, H, W)")
    model, fps = origin.get("model"), origin.get("fps")
    return LatentsFile(
        entry.shape,
        model if isinstance(model, str) and model else None,
        fps if isinstance(fps, float) and _RATE["low"] <= fps <= _RATE["high"] else None,
        {key: value for key, value in _table(origin, "request").items() if key in _REQUEST and isinstance(value, str)},
        {key: value for key, value in _table(origin, "sampler").items() if _is_setting(key, value)},
    )


def _origin(file: Path) -> dict[str, Any]:
    """What `origin_metadata` wrote. The header was read before, so that it is known to be one."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    try:
        origin = json.loads(header["__metadata__"][_ORIGIN])
    except (KeyError, TypeError, ValueError):  # another program's file
        return {}
    return origin if isinstance(origin, dict) else {}


def _table(origin: dict[str, Any], key: str) -> dict[str, Any]:
    value = origin.get(key)
    return value if isinstance(value, dict) else {}


def _is_setting(key: str, value: Any) -> bool:
    """Whether it is a value that `SamplerConfig` can hold."""
    wanted = {"solver": str, "steps": int, "seed": int}.get(key, (int, float))
    return key in SamplerConfig.__dataclass_fields__ and isinstance(value, wanted) and not isinstance(value, bool)
