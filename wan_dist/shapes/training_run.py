"""A run of the training of `wan_shapes`: its two stages, their evaluations, and the state from which it goes on."""

import json
import pickle
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from wan_dist.output.files import atomic
from wan_dist.output.names import temporary_path
from wan_dist.shapes.autoencoder_training import AutoencoderRecipe, AutoencoderTraining
from wan_dist.shapes.checkpoint import load_checkpoint, save_checkpoint
from wan_dist.shapes.clips import DRAWN
from wan_dist.shapes.denoiser_training import DenoiserRecipe, DenoiserTraining
from wan_dist.shapes.optimizer import Trained
from wan_dist.stop import StoppedError

_SAVE_EVERY_S, _TELL_EVERY_S = 60.0, 10.0
_EVALUATIONS = 8  # of a stage, after the one at its start; but at least so many steps apart:
_APART = 50

Pause = Callable[[], None]


@dataclass(frozen=True)
class Settings:
    """What was asked for. fraction: of the recipe's steps; batch: of its batch sizes; evaluate: scenes in an
    evaluation; finetune: a checkpoint whose denoiser is trained on, with its VAE as it is."""

    output: Path
    fraction: float
    batch: float
    seed: int
    device: torch.device
    evaluate: int
    finetune: Path | None = None

    @property
    def identity(self) -> dict[str, float | str]:
        """What a state must share to be gone on from."""
        shared: dict[str, float | str] = {"fraction": self.fraction, "batch": self.batch, "seed": self.seed}
        return shared if self.finetune is None else {**shared, "finetune": str(self.finetune.resolve())}


class Stage(Protocol):
    """A stage of the training, between two steps."""

    name: str
    steps: int
    trained: Trained

    def train_step(self) -> float:
        """Take the next step; returns its loss."""

    def evaluate(self, count: int, pause: Pause) -> dict[str, float]:
        """Figures by name, of the mean weights."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The opposite of `state_dict`."""


class TrainingRun:
    """From the state on disk, if there is one, to the checkpoint. pause: called often where nothing is half done; it
    raises StoppedError where the run is asked to stop."""

    def __init__(self, settings: Settings, pause: Pause) -> None:
        """Raises ValueError for a state or a checkpoint that cannot be gone on from."""
        self.settings, self.pause = settings, pause
        self.file = settings.output / "state.pt"
        temporary_path(self.file).unlink(missing_ok=True)
        self.folder = settings.output / "checkpoint"
        self.stage = AutoencoderTraining.name  # the one that is under way
        self._found, self._base = _read_state(self.file, settings), None
        if settings.finetune is not None:
            self.stage = DenoiserTraining.name
            if settings.finetune.resolve() == self.folder.resolve():
                raise ValueError(f"{self.folder} is what this run would replace: type another --output")
            if self._found is None:  # a state holds all that was taken from it
                self._base = load_checkpoint(settings.finetune)
        self._saved_at = time.monotonic()

    def train(self) -> Path:
        """Returns the checkpoint's folder. Raises StoppedError once the state is saved."""
        settings = self.settings
        found, self._found = self._found, None
        if found is not None and found["stage"] == DenoiserTraining.name:
            weights = found["state"]["autoencoder"]
        elif self._base is not None:
            weights = self._base.vae.state_dict()
        else:
            first = AutoencoderTraining(
                AutoencoderRecipe().scaled(settings.fraction, settings.batch), settings.seed, settings.device
            )
            self._train_stage(first, found)
            weights, found = first.trained.mean.state_dict(), None
        recipe, finetune = DenoiserRecipe().scaled(settings.fraction, settings.batch), settings.finetune is not None
        second = DenoiserTraining(recipe, settings.seed, settings.device, weights, finetune)
        if self._base is not None:
            second.begin_with(self._base)
        self._train_stage(second, found, second.prepare)
        save_checkpoint(second.parts(), self.folder)
        return self.folder

    def _train_stage(
        self, stage: Stage, found: dict[str, Any] | None, prepare: Callable[[Pause], None] | None = None
    ) -> None:
        """All steps that are left of it. found: its state, if there is one."""
        self.stage = stage.name
        if found is not None:
            stage.load_state_dict(found["state"])
            _tell(f"going on from step {stage.trained.steps_done} of {stage.steps} of the {stage.name}")
        try:
            if prepare is not None:
                prepare(self.pause)
            self._take_steps(stage)
        except StoppedError as stop:
            self._save(stage)
            raise StoppedError(stop.signal, stage.trained.steps_done, stage.steps) from stop
        self._save(stage)

    def _take_steps(self, stage: Stage) -> None:
        every = max(_APART, -(-stage.steps // _EVALUATIONS))
        losses: list[float] = []
        begin = told_at = time.monotonic()
        while True:
            step = stage.trained.steps_done
            if step % every == 0 or step == stage.steps:
                seconds = time.monotonic() - begin
                self._report(stage, losses, seconds, stage.evaluate(self.settings.evaluate, self.pause))
                losses, begin = [], time.monotonic()
            if step == stage.steps:
                return
            self.pause()
            losses.append(stage.train_step())
            if time.monotonic() - told_at > _TELL_EVERY_S:
                told_at = time.monotonic()
                _tell(f"{stage.name}: step {step + 1} of {stage.steps}, loss {losses[-1]:.4f}")
            if time.monotonic() - self._saved_at > _SAVE_EVERY_S:
                self._save(stage)

    def _report(self, stage: Stage, losses: list[float], seconds: float, figures: dict[str, float]) -> None:
        """One JSON line. loss: the mean since the last line, and step_s with it: null where no step was taken."""
        taken = len(losses)
        line: dict[str, Any] = {"stage": stage.name, "step": stage.trained.steps_done, "steps": stage.steps}
        line["loss"] = round(sum(losses) / taken, 5) if taken else None
        line["step_s"] = round(seconds / taken, 4) if taken else None
        print(json.dumps({**line, **{name: round(value, 4) for name, value in figures.items()}}), flush=True)

    def _save(self, stage: Stage) -> None:
        content = {"arguments": self.settings.identity, "clips": DRAWN, "stage": stage.name}
        content["state"] = stage.state_dict()
        with atomic(self.file) as scratch:
            torch.save(content, scratch)
        self._saved_at = time.monotonic()


def _read_state(file: Path, settings: Settings) -> dict[str, Any] | None:
    """The state in `file`, or None where there is none. Raises ValueError where it is of other arguments or damaged."""
    if not file.exists():
        return None
    remedy = f"type these, or another --output, or remove {file}"
    try:
        found = torch.load(file, map_location=settings.device, weights_only=True)
        arguments, *_ = found["arguments"], found["stage"], found["state"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} is no state of this training that can be read: remove it to begin anew") from error
    if found.get("clips") != DRAWN:
        raise ValueError(f"{file} is the state of another version, in which seeds draw other clips: remove it")
    if arguments != settings.identity:
        typed = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in arguments.items())
        if settings.finetune is not None and "finetune" not in arguments:
            typed += " and no --finetune"
        raise ValueError(f"{file} is the state of a run with {typed}: {remedy}")
    return dict(found)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
