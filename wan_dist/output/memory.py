"""Memory as this process finds it: its own anonymous host memory (what it allocated, without the pages of mapped
files), and what is free."""

import ctypes
import gc
import os
import resource
import threading
from pathlib import Path

import torch

_PAGE = os.sysconf("SC_PAGE_SIZE")
_M_MMAP_THRESHOLD = -3  # of malloc.h
_PROBE_BYTES = 64 << 20  # long enough to be bound by the link


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

    def __init__(self, interval_s: float = 0.003) -> None:
        self.base = self.peak = anonymous_bytes()
        self._interval = interval_s
        self._stopped = threading.Event()
        self._one_at_a_time = threading.Lock()
        threading.Thread(target=self._sample_until_stopped, name="host-memory", daemon=True).start()

    def _sample_until_stopped(self) -> None:
        while not self._stopped.wait(self._interval):
            self.sample()

    def stop(self) -> int:
        """The peak; nothing is sampled any more."""
        self._stopped.set()
        return self.sample()

    def sample(self) -> int:
        with self._one_at_a_time:  # else the thread's older sample might be written over a newer one
            self.peak = max(self.peak, anonymous_bytes())
            return self.peak


def return_large_tensors_at_once() -> None:
    """Have glibc give tensors of a mebibyte and more pages of their own, which go back to the system when they are
    freed. Left to itself it keeps up to 32 MiB of each size for later, and a run takes now 190 MB, now 270 (at half a
    mebibyte and below, small videos would be slower by a half)."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, 1 << 20)


def return_free_memory() -> None:
    """Have the C library return to the system what was freed (glibc; elsewhere nothing is done)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def return_device_memory(device: torch.device) -> None:
    """Free what only cycles of references hold, and give back what torch (on a CPU, the C library) keeps for later:
    others than torch allocate on a GPU too, NCCL at the first message between two ranks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        return_free_memory()


def host_to_device_rate(device: torch.device) -> float:
    """Bytes a second of copies from pinned host memory to a GPU, as measured now."""
    host = torch.empty(_PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    there, marks = torch.empty_like(host, device=device), [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    there.copy_(host, non_blocking=True)  # the first one pays for setting up
    marks[0].record()
    there.copy_(host, non_blocking=True)
    marks[1].record()
    marks[1].synchronize()
    return _PROBE_BYTES / (marks[0].elapsed_time(marks[1]) / 1e3)
