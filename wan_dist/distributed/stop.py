"""Stopping on request: SIGTERM and SIGUSR1 reach ranks one by one, and all of them must stop at the same step.

Outside the denoising loop a rank that is asked just leaves. Inside it, where there is a state to save, the ranks agree
at the end of each step whether any of them has been asked.
"""

import signal
from types import FrameType

import torch

from wan_dist.distributed.collectives import any_rank
from wan_dist.distributed.mesh import Axis
from wan_dist.topology import STOP_SIGNALS


class StoppedError(BaseException):
    """This run has been asked to stop; not an Exception, so that nothing but the rank's end handles it.

    signal: the name of what asked. saved: of how many `steps` the state is on disk; None where there is none.
    """

    def __init__(self, signal: str, saved: int | None = None, steps: int = 0) -> None:
        super().__init__(f"stopped by {signal}")
        self.signal, self.saved, self.steps = signal, saved, steps


class StopRequest:
    """Whether this rank has been asked to stop, and by which signal (None: it has not)."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._held = False

    def listen(self) -> None:
        """From now on a stop signal raises StoppedError in the main thread, once; where it is held, it is noted."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask)

    @staticmethod
    def ignore_no_more() -> None:
        """From now on a stop signal ends the process: it is on its way out."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def hold(self) -> None:
        """Note signals from here on, raise nothing."""
        self._held = True

    def release(self) -> None:
        """The opposite of `hold`. Raises StoppedError where a signal came in between."""
        self._held = False
        if self.signal is not None:
            raise StoppedError(self.signal.name)

    def agreed(self, axis: Axis, device: torch.device) -> bool:
        """Whether any rank of the axis has been asked; all of them call this, and have the same answer."""
        return any_rank(axis, self.signal is not None, device)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        first, self.signal = self.signal is None, self.signal or signal.Signals(number)
        if first and not self._held:
            raise StoppedError(self.signal.name)
