"""The names of one generation's files. Imports no torch."""

from pathlib import Path

_SUFFIXES = {"mp4": ".mp4", "frames": ".frames.safetensors", "latents": ".latents.safetensors", "record": ".json"}

KINDS = tuple(_SUFFIXES)
PLAN_FILE = "plan.txt"  # in the run's folder: what was predicted, to be shown if a rank is killed
STATE_FILE = "state.safetensors"  # in the run's folder: the denoising loop, to go on from where it was stopped


def output_path(folder: Path, name: str, kind: str) -> Path:
    """The file of one kind: `mp4`, `frames`, `latents` or `record`."""
    return folder / f"{name}{_SUFFIXES[kind]}"


def temporary_path(target: Path) -> Path:
    """What a file is called until it is whole."""
    return target.with_name(target.name + ".tmp")


def output_paths(folder: Path, name: str) -> list[Path]:
    """The files of all kinds."""
    return [output_path(folder, name, kind) for kind in _SUFFIXES]


def run_folder(folder: Path, name: str) -> Path:
    """Where a run keeps its frozen config, its plan and its ranks' logs."""
    return folder / ".run" / name
