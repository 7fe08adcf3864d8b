"""Anonymous host memory of this process: what it allocated, without the pages of mapped files."""

import os
import resource
import threading
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")


def anonymous_bytes() -> int:
    """Resident memory less shared (file-backed) pages, from /proc/self/statm; where there is no /proc (macOS), the
    peak of all resident memory."""
    try:
        _, resident, shared = Path("/proc/self/statm").read_text().split()[:3]
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (int(resident) - int(shared)) * _PAGE


class PeakHostMemory:
    """The peak of `anonymous_bytes`, sampled by a thread (the kernel keeps a peak only with file pages in it)."""

    def __init__(self, interval_s: float = 0.01) -> None:
        self.base = self.peak = anonymous_bytes()
        self._interval = interval_s
        threading.Thread(target=self._sample_for_ever, name="host-memory", daemon=True).start()

    def _sample_for_ever(self) -> None:
        tick = threading.Event()
        while not tick.wait(self._interval):
            self.sample()

    def sample(self) -> int:
        self.peak = max(self.peak, anonymous_bytes())
        return self.peak
