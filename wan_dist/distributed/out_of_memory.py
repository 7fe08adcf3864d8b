"""Telling that memory ran out from all other errors, in which libraries and collectives may dress it."""

import errno

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Of a device, or of the host: torch's CPU allocator says so in the words of a RuntimeError only."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return getattr(error, "errno", None) == errno.ENOMEM or "can't allocate memory" in str(error)
