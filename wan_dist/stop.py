"""Stopping on request: what SIGTERM and SIGUSR1 mean to a rank. Imports no torch: a rank listens before it imports.

A thread waits for the signals, since Python's own handlers wait for the main thread, which may be in a library for
minutes; and it sees who sent one: SIGTERM from the agent is no request, it ends this rank.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from wan_dist.topology import EXIT_ENDED, STOP_SIGNALS

_WAKE = signal.SIGURG  # has no meaning of its own to us, and none by default
_ASK_AGAIN_S = 0.2


class StoppedError(BaseException):
    """This run has been asked to stop; not an Exception, so that nothing but the rank's end handles it.

    signal: the name of what asked. saved: of how many `steps` the state is on disk; None where there is none.
    """

    def __init__(self, signal: str, saved: int | None = None, steps: int = 0) -> None:
        super().__init__(f"stopped by {signal}")
        self.signal, self.saved, self.steps = signal, saved, steps


class StopRequest:
    """Whether this rank has been asked to stop, and by which signal (None: it has not).

    ended: set when the agent has told this rank to end though it is leaving already.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.ended = threading.Event()
        self._begun = self._held = self._leaving = self._raised = False

    def listen(self, agent: int | None) -> None:
        """From now on a stop signal ends this process at once, and after `begin` it is a request. To be called by the
        main thread before there are others, which would take the signals. agent: its process id, where that ends its
        ranks with SIGTERM; None under torchrun, which uses the same signal for both."""
        signal.signal(_WAKE, self._wake)
        if not hasattr(signal, "sigwaitinfo"):  # macOS: one has to do without the sender
            for number in STOP_SIGNALS:
                signal.signal(number, lambda number, _frame: self._asked(number, None, agent))
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=self._listen, args=(agent,), name="stop request", daemon=True).start()

    def begin(self, failed: Callable[[], bool] = lambda: False) -> None:
        """Everything is imported (which cannot be interrupted and tried again): from now on a stop signal raises
        StoppedError in the main thread; where it is held, it is noted. failed: whether another rank has failed: then
        SIGTERM from torchrun is no request."""
        self._failed = failed
        self._begun = True

    def hold(self) -> None:
        """Note requests from here on, raise nothing."""
        self._held = True

    def release(self) -> None:
        """The opposite of `hold`. Raises StoppedError where a request came in between."""
        self._held = False
        self._raise()

    def leave(self) -> None:
        """This rank is about to end by itself: nothing that is asked from here on changes that."""
        self._leaving = True

    def _listen(self, agent: int | None) -> None:
        while True:
            info = signal.sigwaitinfo(STOP_SIGNALS)
            self._asked(info.si_signo, info.si_pid, agent)

    def _asked(self, number: int, sender: int | None, agent: int | None) -> None:
        by_agent = number == signal.SIGTERM and agent is not None and sender == agent
        if by_agent and self._leaving:
            self.ended.set()
        elif by_agent or not self._begun:
            _exit()
        elif self.signal is None and not self._leaving:
            self.signal = signal.Signals(number)
            if not self._held:
                signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)
            if agent is None and number == signal.SIGTERM:
                threading.Thread(target=self._follow, name="failed rank", daemon=True).start()

    def _follow(self) -> None:
        """Under torchrun: end with a rank that has failed, wherever this one waits for it."""
        while not self._failed():
            time.sleep(_ASK_AGAIN_S)
        if not self._leaving:
            _exit()

    def _wake(self, _number: int, _frame: FrameType | None) -> None:
        if not (self._held or self._leaving):
            self._raise()

    def _raise(self) -> None:
        """Once: the first is on its way, and what handles it is not to be interrupted."""
        if self.signal is not None and not self._raised:
            self._raised = True
            raise StoppedError(self.signal.name)


def _exit() -> None:
    sys.stderr.flush()
    os._exit(EXIT_ENDED)
