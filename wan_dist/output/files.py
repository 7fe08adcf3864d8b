"""Writing the files of one generation: whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from wan_dist.output.names import output_paths, temporary_path


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove temporaries that an earlier run of `name` left when it was killed."""
    for path in output_paths(folder, name):
        temporary_path(path).unlink(missing_ok=True)


@contextmanager
def atomic(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`; on leaving it is synced and takes target's name, on failure it is removed. An
    error of the disk names `target`."""
    scratch = temporary_path(target)
    try:
        yield scratch
        scratch.chmod(0o666 & ~_umask())  # some writers make private files
        _sync(scratch)
        scratch.replace(target)
        _sync(target.parent)
    except BaseException as error:
        with suppress(OSError):
            scratch.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror or str(error), str(target)) from error
        raise


def _umask() -> int:
    """The process's. Asked for by setting it, it would for a moment be another one for all threads."""
    try:
        status = Path("/proc/self/status").read_text(errors="replace")
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("Umask:")), 8)
    except (OSError, StopIteration):
        mask = os.umask(0)
        os.umask(mask)
        return mask


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_tensor(target: Path, name: str, tensor: torch.Tensor, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with one tensor, and texts in its header."""
    from safetensors.torch import save

    data = save({name: tensor.contiguous().cpu()}, metadata)  # its own writer hides which error a disk had
    with atomic(target) as scratch:
        scratch.write_bytes(data)
