"""The denoising loop's state: saved while it runs and when the run is asked to stop, gone on from by the next.

Latents and the solver's history are the same on every rank, so the first one reads and writes them, for all; how many
ranks there are, and in which mesh, is no part of the state.
"""

import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from wan_dist.distributed.collectives import any_rank, broadcast, gather_objects, wait_for_first
from wan_dist.loading.checkpoint import fingerprint
from wan_dist.loading.tensor_files import CheckpointError
from wan_dist.loading.weights import from_files, on_every_rank
from wan_dist.log import logger
from wan_dist.output.identity import differences, read_identity, run_identity
from wan_dist.output.names import STATE_FILE, run_folder, temporary_path
from wan_dist.output.state import DenoisingState, StateWriter, read_state
from wan_dist.pipeline.run import Run
from wan_dist.sampling.solver_state import SolverState, restore_solver, solver_state
from wan_dist.stop import StoppedError, StopRequest

_FLUSH_S = 3.0


@dataclass(frozen=True)
class Start:
    """Where the loop begins. latents: fp32 on the run's device, None for the seed's noise."""

    first_step: int = 0
    latents: torch.Tensor | None = None


def state_path(run: Run) -> Path:
    return run_folder(Path(str(run.config.output.dir)), run.config.output.name) / STATE_FILE


def read_start(run: Run, scheduler: Any) -> Start:
    """The state that an earlier run of this name left, put into `scheduler`; the beginning where there is none, or none
    is asked for. Raises CheckpointError, on every rank, where it is not this run's."""
    world = run.mesh.world
    state = on_every_rank(world, lambda: _read(run) if run.is_first else None)
    told = gather_objects(world, None if state is None else _told(state))[0]
    if told is None:
        return Start()
    tensors = {}
    for name, (shape, strides) in told["tensors"].items():
        tensor = torch.empty(shape, device=run.device)
        if state is not None:
            tensor.copy_(state.named()[name])
        # The strides decide which kernel takes it, and so its last bits.
        tensors[name] = torch.empty_strided(shape, strides, device=run.device).copy_(broadcast(world, tensor))
    latents, done = tensors.pop("latents"), told["steps_done"]
    if done < len(run.schedule):
        solver = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
        from_files(state_path(run), lambda: restore_solver(scheduler, SolverState(solver, told["numbers"]["solver"])))
    run.report.steps.extend(told["numbers"]["step_seconds"])
    logger.info("resumed at step %d of %d", done, len(run.schedule))
    if run.is_first:
        print(f"wan-dist: resumed at step {done} of {len(run.schedule)}", file=sys.stderr, flush=True)
    return Start(done, latents)


def _read(run: Run) -> DenoisingState | None:
    file, wanted = state_path(run), run.config.output.resume == "auto"
    if wanted != file.exists():
        what = f"nothing to resume in {file.parent}; beginning at the first step"
        if not wanted:
            what = f"{file} is not gone on from (output.resume=auto), and will be replaced"
        print(f"wan-dist: {what}", file=sys.stderr, flush=True)
    if not wanted or not file.exists():
        return None
    found = differences(read_identity(file), run_identity(run.config, fingerprint(run.checkpoint)))
    if found:
        raise CheckpointError(f"{file}: the saved state is that of another run: {', '.join(found)}")
    state = read_state(file)
    try:
        numbers = {"solver": dict(state.numbers["solver"]), "step_seconds": list(state.numbers["step_seconds"])}
        return replace(state, numbers=numbers)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: damaged header ({error})") from error


def _told(state: DenoisingState) -> dict[str, Any]:
    layouts = {name: (tuple(tensor.shape), tensor.stride()) for name, tensor in state.named().items()}
    return {"steps_done": state.steps_done, "numbers": state.numbers, "tensors": layouts}


class StateKeeper:
    """Saves the loop's state as the config asks, and when the ranks agree to stop; made and used on every rank, it
    writes on the first. A context manager: what was to be saved is on disk when it is left, also by an error."""

    def __init__(self, run: Run, scheduler: Any, stop: StopRequest) -> None:
        self._run, self._scheduler, self._stop = run, scheduler, stop
        self._every = run.config.output.checkpoint_every
        self._identity = on_every_rank(
            run.mesh.world, lambda: run_identity(run.config, fingerprint(run.checkpoint)) if run.is_first else {}
        )
        self._writer: StateWriter | None = None
        self._submitted = -1  # steps done of the last state that was handed over

    def __enter__(self) -> "StateKeeper":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._writer is None:
            return
        if error is None or isinstance(error, StoppedError):
            self._writer.close()
            return
        # What failed may be the disk: others are not to wait for it. A write that is cut off leaves the state before.
        closing = threading.Thread(target=self._writer.close, daemon=True)
        closing.start()
        closing.join(_FLUSH_S)

    def after_step(self, done: int, latents: torch.Tensor) -> None:
        """After each step. Raises StoppedError on every rank where one has been asked to stop, the state saved."""
        steps, asked = len(self._run.schedule), self._agreed_to_stop()
        if asked or (self._every and (done % self._every == 0 or done == steps)):
            self._save(done, latents)
        if asked:
            if self._run.is_first:
                self._stop.leave()
            self._must_be_saved()
            wait_for_first(self._run.mesh, "state saved")
            self._stop.leave()
            raise self._stopped(done)

    def _agreed_to_stop(self) -> bool:
        """Whether any rank has been asked to; the same answer on all."""
        return any_rank(self._run.mesh.world, self._stop.signal is not None, self._run.device)

    def save_result(self, latents: torch.Tensor) -> StoppedError:
        """After the last step: save what the loop ended with, if it is not yet, and return what to raise."""
        self._stop.leave()
        steps = len(self._run.schedule)
        if self._submitted != steps:
            self._save(steps, latents)
        self._must_be_saved()
        return self._stopped(steps)

    def remove(self) -> None:
        """The run is complete: nothing is to be resumed."""
        if self._run.is_first:
            if self._writer is not None:
                self._writer.close()
            for file in (state_path(self._run), temporary_path(state_path(self._run))):
                file.unlink(missing_ok=True)

    def _save(self, done: int, latents: torch.Tensor) -> None:
        if not self._run.is_first:
            return
        if self._writer is None:
            self._writer = StateWriter(state_path(self._run), self._identity, self._tell)
        steps = len(self._run.schedule)
        solver = solver_state(self._scheduler) if done < steps else SolverState({}, {})
        numbers = {"solver": solver.numbers, "step_seconds": list(self._run.report.steps)}
        self._writer.submit(
            DenoisingState(steps_done=done, steps=steps, latents=latents, tensors=solver.tensors, numbers=numbers)
        )
        self._submitted = done

    def _must_be_saved(self) -> None:
        if self._writer is not None:
            self._writer.flush(raise_errors=True)

    def _stopped(self, done: int) -> StoppedError:
        name = "a signal" if self._stop.signal is None else self._stop.signal.name  # another rank may have had it
        return StoppedError(name, saved=done, steps=len(self._run.schedule))

    def _tell(self, error: OSError) -> None:
        if self._stop.signal is None:  # else it is the run's failure, and told as such
            print(
                f"wan-dist: the state cannot be saved ({error}); the run goes on without", file=sys.stderr, flush=True
            )
