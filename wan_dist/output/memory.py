"""Memory as this process finds it: its own anonymous host memory (what it allocated, without the pages of mapped
files), and what is free."""

import ctypes
import gc
import os
import re
import resource
import threading
from pathlib import Path

import torch

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
        self._stopped = threading.Event()
        threading.Thread(target=self._sample_until_stopped, name="host-memory", daemon=True).start()

    def _sample_until_stopped(self) -> None:
        while not self._stopped.wait(self._interval):
            self.sample()

    def stop(self) -> int:
        """The peak; nothing is sampled any more."""
        self._stopped.set()
        return self.sample()

    def sample(self) -> int:
        self.peak = max(self.peak, anonymous_bytes())
        return self.peak


def return_free_memory() -> None:
    """Have the C library return to the system what was freed (glibc; elsewhere nothing is done)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def return_device_memory(device: torch.device) -> None:
    """Free what only cycles of references hold, and give a GPU back what torch keeps of it for later: others than torch
    allocate there too, NCCL at the first message between two ranks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int | None:
    """What is free on a device; on a CPU, what the host has available (None where it does not say)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except FileNotFoundError:
        return None
    return int(found[1]) * 1024 if found else None
