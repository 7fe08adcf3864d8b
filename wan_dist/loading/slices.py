"""Reading a slice of a tensor from its file: the bytes of the slice, all of them and no others.

Storage is always freshly allocated: CPU kernels give other last bits on the unaligned memory of a mapped file.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from math import prod
from pathlib import Path
from types import TracebackType

import torch

from wan_dist.layers.weight_loader import Ranges
from wan_dist.loading.tensor_files import DTYPE_BYTES, TensorEntry, read_exactly

_TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_CPU = torch.device("cpu")


def rows_within(ranges: Ranges, begin: int, end: int) -> Ranges:
    """Rows `begin` to `end` of the slice that `ranges` cut out: FSDP divides what tensor parallelism has left."""
    (first, last), *others = ranges
    assert 0 <= begin <= end <= last - first, f"rows {begin} to {end} of {last - first}"
    return ((first + begin, first + end), *others)


def contiguous_runs(shape: tuple[int, ...], ranges: Ranges) -> Iterator[tuple[int, int]]:
    """`(first element, number of elements)` of the runs of a row-major tensor that a slice consists of, in order.

    >>> list(contiguous_runs((3, 4), ((1, 3), (0, 4))))
    [(4, 8)]
    >>> list(contiguous_runs((3, 4), ((1, 3), (2, 4))))
    [(6, 2), (10, 2)]
    """
    if any(begin == end for begin, end in ranges):
        return
    partial = [dim for dim, (size, cut) in enumerate(zip(shape, ranges, strict=True)) if cut != (0, size)]
    last = partial[-1] if partial else 0  # everything behind it is whole, so that rows of it lie together
    behind = prod(shape[last + 1 :])
    begin, end = ranges[last] if shape else (0, 1)
    strides = [prod(shape[dim + 1 :]) for dim in range(last)]
    for index in product(*(range(*cut) for cut in ranges[:last])):
        outer = sum(i * stride for i, stride in zip(index, strides, strict=True))
        yield outer + begin * behind, (end - begin) * behind


class SliceReader:
    """Reads slices of a checkpoint's tensors, keeping the files open; a context manager. `bytes_read` counts."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self._files: dict[Path, int] = {}
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._stack = ExitStack()

    def __enter__(self) -> "SliceReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(
        self,
        entry: TensorEntry,
        ranges: Ranges,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device = _CPU,
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The slice in `dtype` (None: the file's), on `device`; or written into the contiguous CPU tensor `into`, of
        the slice's shape and `dtype`, which is returned. Raises CheckpointError where the file ends early or cannot be
        read, OSError where it cannot be opened."""
        if entry.file not in self._files:
            self._files[entry.file] = os.open(entry.file, os.O_RDONLY)
            self._stack.callback(os.close, self._files[entry.file])
        on_disk, size = _TORCH_DTYPES[entry.dtype], DTYPE_BYTES[entry.dtype]
        shape = tuple(end - begin for begin, end in ranges)
        is_kept = dtype in (None, on_disk) and device.type == "cpu"
        raw = self._buffer(prod(shape) * size, is_kept, into)
        memory, done = memoryview(raw.numpy()), 0
        for first, count in contiguous_runs(entry.shape, ranges):
            run = memory[done : done + count * size]
            read_exactly(self._files[entry.file], run, entry.start + first * size, entry)
            done += count * size
        self.bytes_read += done
        tensor = raw.view(on_disk).view(shape)
        if is_kept:
            return tensor if into is None else into
        return tensor.to(device, dtype or on_disk, copy=True) if into is None else into.copy_(tensor)

    def _buffer(self, nbytes: int, is_kept: bool, into: torch.Tensor | None) -> torch.Tensor:
        """Memory to read into: that of the result where it takes the bytes as they are, else the same for all tensors.
        Freed between tensors that live on, it would stay with the C library: hundreds of megabytes for one expert."""
        if is_kept:
            return torch.empty(nbytes, dtype=torch.uint8) if into is None else into.view(-1).view(torch.uint8)
        if self._staging.numel() < nbytes:
            self._staging = torch.empty(nbytes, dtype=torch.uint8)
        return self._staging[:nbytes]
