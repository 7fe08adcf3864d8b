"""Whether something fits a device. Imports no torch."""

_TO_SPARE = 0.1  # of what is free: activations and the allocator's fragments want room too


def does_not_fit(nbytes: int | None, free: int | None) -> bool:
    """Whether `nbytes` of weights leave less than a tenth of `free` bytes. Weights of unknown size do; where it is
    unknown what is free, everything fits."""
    return free is not None and (nbytes is None or nbytes > (1 - _TO_SPARE) * free)
