"""A checkpoint in diffusers format, as its JSON files describe it. Imports no torch and reads no weights."""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wan_dist.loading.tensor_files import CheckpointError, read_component, weight_files

EXPERTS = ("transformer", "transformer_2")  # high noise (or the only one), low noise
_WITH_WEIGHTS = ("text_encoder", "image_encoder", "vae", *EXPERTS)

_SAMPLES, _SAMPLE_BYTES = 32, 4096  # of a weight file, for its fingerprint


@dataclass(frozen=True)
class Checkpoint:
    """`configs` holds the config.json of each component that is present, by component name."""

    path: Path
    index: dict[str, Any]
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)

    @property
    def experts(self) -> tuple[str, ...]:
        return tuple(name for name in EXPERTS if name in self.configs)

    @property
    def boundary_ratio(self) -> float | None:
        return self.index.get("boundary_ratio")

    def class_name(self, component: str) -> str | None:
        """The class that the index names for a component; None where it names none."""
        return _class_name(self.index, component)

    @property
    def expand_timesteps(self) -> bool:
        """Whether tokens have timesteps of their own, so that a first frame can be given (Wan2.2 TI2V)."""
        return bool(self.index.get("expand_timesteps"))

    @property
    def has_image_tokens(self) -> bool:
        """Whether a transformer attends to what an image encoder says of the images (Wan2.1 image-to-video)."""
        return any(self.configs[name].get("image_dim") is not None for name in self.experts)

    @property
    def transformer_config(self) -> dict[str, Any]:
        """The config of either expert: both take the same latents and text."""
        return self.configs[self.experts[0]]


def open_checkpoint(path: Path) -> Checkpoint:
    """Read `model_index.json` and the configs it names. Raises CheckpointError where one is missing or damaged."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if not (path / "model_index.json").is_file():
        raise CheckpointError(f"{path}: not a diffusers checkpoint (no model_index.json)")
    index = _read_json(path / "model_index.json")
    configs = {}
    for name in _WITH_WEIGHTS:
        if _class_name(index, name) is not None:
            configs[name] = _read_json(path / name / "config.json")
    for name in ("text_encoder", "vae"):
        if name not in configs:
            raise CheckpointError(f"{path}/model_index.json: names no {name}")
    if not any(name in configs for name in EXPERTS):
        raise CheckpointError(f"{path}/model_index.json: names no transformer")
    boundary = index.get("boundary_ratio")
    if boundary is not None and (isinstance(boundary, bool) or not isinstance(boundary, (int, float))):
        raise CheckpointError(f"{path}/model_index.json: boundary_ratio is {boundary!r}, not a number")
    if not (path / "tokenizer").is_dir():
        raise CheckpointError(f"{path / 'tokenizer'}: no such folder")
    checkpoint = Checkpoint(path, index, configs, _read_json(path / "scheduler" / "scheduler_config.json"))
    if checkpoint.has_image_tokens:
        for name in ("image_encoder", "image_processor"):
            if _class_name(index, name) is None:
                raise CheckpointError(f"{path}/model_index.json: names no {name}, which its transformer wants")
        _read_json(path / "image_processor" / "preprocessor_config.json")
    return checkpoint


def _class_name(index: dict[str, Any], component: str) -> str | None:
    """Of an entry `[library, class]`; a component that is left out is `[null, null]`, or not there."""
    value = index.get(component)
    return value[1] if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str) else None


def weight_problems(checkpoint: Checkpoint, components: Collection[str] | None = None) -> list[str]:
    """Components without weights that can be loaded, each with the reason; shards and headers are not opened.

    components: those that matter; None is all that the checkpoint names.
    """
    problems = []
    for name in checkpoint.configs if components is None else components:
        try:
            weight_files(checkpoint.path / name)
        except CheckpointError as error:
            if "shard is missing" not in str(error):  # a fault of the files, reported when they are read
                problems.append(str(error))
    return problems


def header_problems(checkpoint: Checkpoint) -> list[str]:
    """Faults of the weight files that are here, as far as their headers tell: the first of each component."""
    problems = []
    for name in checkpoint.configs:
        try:
            read_component(checkpoint.path / name)
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
    return problems


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 over the checkpoint's JSON files and, of every weight file, name, length, header and samples of its bytes
    at even distances: cheap, yet another architecture, dtype or sharding changes it, and other weights do."""
    digest = hashlib.sha256()
    path = checkpoint.path
    folders = [path / name for name in sorted({*checkpoint.configs, "scheduler", "tokenizer", "image_processor"})]
    for file in [path / "model_index.json", *(file for folder in folders for file in sorted(folder.glob("*.json")))]:
        digest.update(str(file.relative_to(path)).encode() + b"\0" + file.read_bytes())
    for file in [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]:
        with file.open("rb") as stream:
            header = stream.read(min(int.from_bytes(stream.read(8), "little"), 1 << 26))
            size = file.stat().st_size
            digest.update(f"{file.relative_to(path)}:{size}".encode() + header)
            for part in range(_SAMPLES):
                stream.seek(part * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return value
