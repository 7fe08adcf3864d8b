"""Several forwards of one model side by side, each streamed block serving all of them before the next one comes.

Every forward runs as it is written, in a thread of its own; one of them runs at a time, and they take turns behind each
streamed block. So the order of all operations and collectives is fixed, the results are those of one forward after the
other, and the weights travel once.
"""

import contextvars
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch

from wan_dist.offload.layerwise import LayerwiseStream

Result = TypeVar("Result")


class _AbandonedError(BaseException):
    """Another forward failed: this one ends where it is. Not an Exception, lest a model take it for one of its own."""


class _Turns:
    """Whose turn it is, of those that still run; the others wait. Only the one whose turn it is may call."""

    def __init__(self, count: int) -> None:
        self.error: BaseException | None = None
        self._running = list(range(count))
        self._turn = 0
        self._changed = threading.Condition()

    @property
    def is_last(self) -> bool:
        """Whether all others have passed here already."""
        return self._turn == self._running[-1]

    def pass_on(self) -> None:
        """Let the others come here too. Raises _AbandonedError if one of them failed."""
        me = self._turn
        self._give_to(self._after(me))
        self.wait_for(me)

    def wait_for(self, runner: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == runner)
        if self.error is not None:
            raise _AbandonedError

    def leave(self, runner: int, error: BaseException | None) -> None:
        """This one is through, or has failed with `error`."""
        if error is not None and self.error is None and not isinstance(error, _AbandonedError):
            self.error = error
        follower = self._after(runner)
        self._running.remove(runner)
        self._give_to(follower)

    def _after(self, runner: int) -> int:
        place = self._running.index(runner)
        return self._running[(place + 1) % len(self._running)]

    def _give_to(self, runner: int) -> None:
        with self._changed:
            self._turn = runner
            self._changed.notify_all()


def in_lockstep(stream: LayerwiseStream, forwards: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of `forwards`, all of the model that `stream` streams, in their order.

    If one fails, its error is raised once all have ended.
    """
    turns = _Turns(len(forwards))
    results: list[Result | None] = [None] * len(forwards)
    grad, device = torch.is_grad_enabled(), stream.ring.device  # both are a thread's own
    cuda_stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def run(number: int) -> None:
        error: BaseException | None = None
        try:
            turns.wait_for(number)
            with torch.set_grad_enabled(grad), torch.cuda.stream(cuda_stream) if cuda_stream else nullcontext():
                results[number] = forwards[number]()
        except BaseException as failure:
            error = failure
        turns.leave(number, error)

    threads = []
    for number in range(1, len(forwards)):
        context: Any = contextvars.copy_context()
        threads.append(threading.Thread(target=context.run, args=(run, number), daemon=True))
    stream.turns = turns
    try:
        for thread in threads:
            thread.start()
        run(0)
        for thread in threads:
            thread.join()
    finally:
        stream.turns = None
    if turns.error is not None:
        raise turns.error
    return cast(list[Result], results)
