"""Progress over steps: a bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable
from typing import TextIO

_QUIET_S = 0.5  # plain lines come at most this often, so that fast steps do not flood a log


class Progress:
    """Call it after each step. The first and the last step are always shown. done: steps of an earlier run."""

    def __init__(
        self,
        total: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
        *,
        unit: str = "step",
        done: int = 0,
    ) -> None:
        self._total = total
        self._unit = unit
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._done = self._before = done
        self._start = self._shown_at = clock()
        self._bar = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit=self._unit, file=self._stream, dynamic_ncols=True)

    def step(self) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update()
            return
        now = self._clock()
        if self._done in (self._before + 1, self._total) or now - self._shown_at >= _QUIET_S:
            per_step = (now - self._start) / (self._done - self._before)
            left = per_step * (self._total - self._done)
            line = f"{self._unit} {self._done}/{self._total}  {per_step:.2f} s/{self._unit}  {_clock_time(left)} left"
            with contextlib.suppress(OSError):  # a reader that has gone away is no reason to stop
                print(line, file=self._stream, flush=True)
            self._shown_at = now

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _clock_time(seconds: float) -> str:
    """`1:05:03`, `5:03`, `0:03`."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
