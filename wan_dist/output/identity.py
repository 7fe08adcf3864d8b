"""What a saved state says of itself in its header: how far it got, and whose it is. Imports no torch.

A state goes on only with what decides the result of denoising: the model, the request, the sampler, the size and the
dtype. The mesh, the placement of weights and the kinds of output may be others.
"""

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from wan_dist.config.schema import Config
from wan_dist.loading.tensor_files import CheckpointError, TensorEntry, read_header

_VERSION = 1
_KEY = "wan_dist_state"  # of a JSON text in the header's metadata
_SHOWN = 40  # characters of a prompt


@dataclass(frozen=True)
class SavedState:
    """The header of a state. entries: its tensors, by name, and strides: those they had in memory. numbers: the
    solver's."""

    steps_done: int
    steps: int
    identity: dict[str, Any]
    numbers: dict[str, Any]
    strides: dict[str, list[int]]
    entries: dict[str, TensorEntry]


def run_identity(config: Config, fingerprint: str) -> dict[str, Any]:
    """What decides the result of denoising, by key of the config. config: resolved. fingerprint: the checkpoint's.

    Raises OSError where a picture cannot be read: a picture is what its file holds, wherever it lies.
    """
    sampler, video, runtime = config.sampler, config.video, config.runtime
    return {
        "model": fingerprint,
        "prompt": config.prompt,
        "negative_prompt": config.negative_prompt or "",
        "image": _digest(config.image),
        "last_image": _digest(config.last_image),
        **{f"sampler.{field.name}": getattr(sampler, field.name) for field in fields(sampler)},
        **{f"video.{name}": getattr(video, name) for name in ("height", "width", "num_frames")},
        "runtime.dtype": runtime.dtype,
        "runtime.vae_dtype": runtime.vae_dtype if config.image is not None else None,  # it encodes nothing else
    }


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In which keys two identities differ, a few words each: `sampler.seed was 1 and is 2`."""
    pictures = [key for key in ("image", "last_image") if (saved.get(key) is None) != (now.get(key) is None)]
    found = []
    for key in [*now, *(key for key in saved if key not in now)]:
        was, now_is = saved.get(key), now.get(key)
        if was == now_is or (key == "runtime.vae_dtype" and pictures):
            continue
        if key == "model":
            found.append("the model is another one (its files differ)")
        elif key in ("image", "last_image"):
            words = {True: "null", False: "a picture"}
            change = f"was {words[was is None]} and is {words[now_is is None]}"
            found.append(f"{key} {change if key in pictures else 'is another picture'}")
        elif isinstance(was, str) and isinstance(now_is, str) and key.endswith("prompt"):
            found.append("{} was {} and is {}".format(key, *_where_they_differ(was, now_is)))
        else:
            found.append(f"{key} was {_shown(was)} and is {_shown(now_is)}")
    return found


def state_metadata(
    *, steps_done: int, steps: int, numbers: dict[str, Any], strides: dict[str, list[int]], identity: dict[str, Any]
) -> dict[str, str]:
    """The metadata by which `describe_state` knows a state. ASCII: a prompt need not be Unicode."""
    told = {"steps_done": steps_done, "steps": steps, "numbers": numbers, "strides": strides, "identity": identity}
    return {_KEY: json.dumps({"version": _VERSION, **told})}


def describe_state(file: Path) -> SavedState:
    """Read the header. Raises CheckpointError, naming the file, where it is no whole state of this format."""
    try:
        entries = read_header(file)
        with file.open("rb") as stream:  # the header was read before, so that it is known to be one
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    try:
        told = json.loads(header["__metadata__"][_KEY])
        version = told["version"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: not the saved state of a run") from error
    if version != _VERSION:
        raise CheckpointError(f"{file}: a state of format {version}; this version reads format {_VERSION}")
    try:
        state = SavedState(**{name: told[name] for name in told if name != "version"}, entries=entries)
    except TypeError as error:
        raise CheckpointError(f"{file}: damaged header ({error})") from error
    if fault := _fault(state):
        raise CheckpointError(f"{file}: {fault}")
    return state


def read_identity(file: Path) -> dict[str, Any]:
    """Whose state it is. Raises CheckpointError as `describe_state` does."""
    return describe_state(file).identity


def _fault(state: SavedState) -> str | None:
    counts = (state.steps_done, state.steps)
    tables = (state.identity, state.numbers, state.strides)
    if not all(type(count) is int for count in counts) or not all(isinstance(table, dict) for table in tables):
        return "damaged header (a value of a wrong type)"
    if not 0 <= state.steps_done <= state.steps:
        return f"damaged header ({state.steps_done} of {state.steps} steps done)"
    for name in ("latents", *state.strides):
        if name not in state.entries:
            return f"tensor {name!r} is missing"
    for name, entry in state.entries.items():
        strides = state.strides.get(name)
        if not isinstance(strides, list) or not all(type(s) is int and s >= 0 for s in strides):
            return f"tensor {name!r} has no strides"
        if entry.dtype != "F32" or len(entry.shape) != 5 or entry.shape[0] != 1 or len(strides) != 5:
            return f"tensor {name!r} is {entry.dtype} of shape {entry.shape}, not F32 of shape (1, z, T, H, W)"
    return None


def _digest(picture: str | None) -> str | None:
    if picture is None:
        return None
    with Path(picture).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _where_they_differ(one: str, other: str) -> tuple[str, str]:
    """Both texts quoted, shortened to where they first differ."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = 0 if max(len(one), len(other)) <= _SHOWN else max(0, same - _SHOWN // 2)
    first, second = (
        repr("…" * (start > 0) + text[start : start + _SHOWN] + "…" * (len(text) > start + _SHOWN))
        for text in (one, other)
    )
    return first, second
