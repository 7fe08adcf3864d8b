"""The denoising loop's state on disk, written while the loop goes on, and read back to go on from there.

A safetensors file: latents, the solver's tensors, and a header that says how far it got and whose it is.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wan_dist.loading.slices import SliceReader
from wan_dist.log import logger
from wan_dist.output.files import atomic
from wan_dist.output.identity import describe_state, state_metadata

_SOLVER = "solver."  # before the names of the solver's tensors
_REST = 40  # times the processor time that a write took: its share of a core stays under 2.5 %


@dataclass(frozen=True, kw_only=True)
class DenoisingState:
    """What the loop has between two steps. latents: fp32 `[1, z, T, H, W]`. tensors, numbers: the solver's; all
    tensors are fp32, of the latents' shape. None may be written into once it is here."""

    steps_done: int
    steps: int
    latents: torch.Tensor
    tensors: dict[str, torch.Tensor]
    numbers: dict[str, Any]

    def named(self) -> dict[str, torch.Tensor]:
        """All tensors, by their names in the file."""
        return {"latents": self.latents, **{_SOLVER + name: tensor for name, tensor in self.tensors.items()}}


def write_state(file: Path, state: DenoisingState, identity: dict[str, Any]) -> None:
    """Write a state whole or not at all; raises OSError. identity: of `output.identity.run_identity`."""
    _write(file, state, {name: tensor.cpu() for name, tensor in state.named().items()}, identity)


def _write(file: Path, state: DenoisingState, on_host: dict[str, torch.Tensor], identity: dict[str, Any]) -> None:
    """safetensors' own writer copies every tensor and holds the interpreter's lock for it, while the loop waits; and it
    hides the number of an error of the disk. on_host: the state's tensors in host memory, in any layout."""
    metadata = state_metadata(
        steps_done=state.steps_done,
        steps=state.steps,
        numbers=state.numbers,
        strides={name: list(tensor.stride()) for name, tensor in state.named().items()},
        identity=identity,
    )
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in on_host.items():
        assert tensor.dtype == torch.float32, f"{name} is {tensor.dtype}"
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns data to 8 bytes
    with atomic(file) as scratch:
        with scratch.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for tensor in on_host.values():
                stream.write(memoryview(tensor.contiguous().numpy()))


def read_state(file: Path) -> DenoisingState:
    """The state in `file`, in host memory, every tensor with the strides it had: they decide which kernel takes it, and
    so its last bits. Raises CheckpointError, naming the file, where it is damaged or no state."""
    saved = describe_state(file)
    tensors = {}
    with SliceReader() as reader:
        for name, entry in saved.entries.items():
            tensor = reader.read(entry, tuple((0, size) for size in entry.shape))
            strides = tuple(saved.strides[name])
            if tensor.stride() != strides:
                tensor = torch.empty_strided(entry.shape, strides).copy_(tensor)
            tensors[name] = tensor
    latents = tensors.pop("latents")
    return DenoisingState(
        steps_done=saved.steps_done,
        steps=saved.steps,
        latents=latents,
        tensors={name.removeprefix(_SOLVER): tensor for name, tensor in tensors.items()},
        numbers=saved.numbers,
    )


class StateWriter:
    """Writes the states of one run to `file`, in a thread. One thread submits, flushes and closes.

    Where the disk is slower than the steps, the newest state replaces the one that waits, which is then never written.
    A write that fails leaves the file as it was, and the run goes on: `on_error` is called once, in the writing thread,
    for the first of them; later states are still tried. Any other exception ends the thread, and is raised by the next
    call. written: how many states came to the disk.
    """

    def __init__(
        self, file: Path, identity: dict[str, Any], on_error: Callable[[OSError], None] = lambda error: None
    ) -> None:
        self._file, self._identity, self._on_error = file, identity, on_error
        self._changed = threading.Condition()  # guards the next five
        self._waiting: tuple[DenoisingState, Any] | None = None
        self._writing = self._closed = False
        self._failure: OSError | None = None  # of the last write
        self._broken: Exception | None = None  # what no disk explains; it ends the thread
        self._hurry = threading.Event()
        self._told = False
        self.written = 0
        self._side_stream: Any = None
        self._thread = threading.Thread(target=self._work, name="state-writer", daemon=True)
        self._thread.start()

    def submit(self, state: DenoisingState) -> None:
        """Have a state written; returns at once, without a copy. A CUDA state is read when what was queued so far on
        the current stream is done."""
        ready = None
        if state.latents.is_cuda:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(state.latents.device))
        with self._changed:
            assert not self._closed, "closed before"
            if self._broken is not None:
                raise self._broken
            self._waiting = (state, ready)
            self._changed.notify_all()

    def flush(self, *, raise_errors: bool = False) -> None:
        """Wait until the last state submitted is on disk, or has failed to get there: an OSError if `raise_errors`."""
        self._hurry.set()
        with self._changed:
            self._changed.wait_for(lambda: self._broken or (self._waiting is None and not self._writing))
        self._hurry.clear()
        if self._broken is not None:
            raise self._broken
        if raise_errors and self._failure is not None:
            raise self._failure

    def close(self, *, raise_errors: bool = False) -> None:
        """`flush`, and end the thread; a second time, nothing."""
        try:
            self.flush(raise_errors=raise_errors and not self._closed)
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            self._hurry.set()
            self._thread.join()

    def _work(self) -> None:
        rest = 0.0
        while True:
            self._hurry.wait(rest)
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                if self._waiting is None:
                    return
                (state, ready), self._waiting, self._writing = self._waiting, None, True
            failure, broken, began = None, None, time.thread_time()
            try:
                failure = self._try(state, ready)
            except Exception as error:
                broken = error
            del state, ready  # device memory, if the next state is long in coming
            with self._changed:
                self._failure, self._broken, self._writing = failure, broken, False
                self._changed.notify_all()
            if broken is not None:
                return
            rest = _REST * (time.thread_time() - began)

    def _try(self, state: DenoisingState, ready: Any) -> OSError | None:
        on_host = state.named() if ready is None else self._copies(state.named(), ready)
        try:
            _write(self._file, state, on_host, self._identity)
        except OSError as error:
            if not self._told:
                self._told = True
                logger.warning("%s: the state cannot be written (%s)", self._file, error)
                self._on_error(error)
            return error
        self.written += 1
        return None

    def _copies(self, tensors: dict[str, torch.Tensor], ready: Any) -> dict[str, torch.Tensor]:
        """Tensors of a GPU in pinned host memory. `tensors` keeps them alive until the copy is done, so that their
        memory goes to no one else meanwhile."""
        if self._side_stream is None:
            self._side_stream = torch.cuda.Stream(tensors["latents"].device)
        with torch.cuda.stream(self._side_stream):
            self._side_stream.wait_event(ready)
            on_host = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
                for name, tensor in tensors.items()
            }
            copied = torch.cuda.Event(blocking=True)  # else waiting for it would keep a core busy
            copied.record(self._side_stream)
        copied.synchronize()
        return on_host
