"""A file of latents, as its header describes it: what `task=decode` starts from. Imports no torch."""

from pathlib import Path

from wan_dist.loading.tensor_files import CheckpointError, read_header

_FLOATS = ("F32", "F16", "BF16", "F64")


def latents_shape(file: Path) -> tuple[int, ...]:
    """`(1, z, T, H, W)` of the tensor `latents` in a safetensors file. Raises CheckpointError, naming the file, where
    there is none of that form."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        entries = read_header(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    entry = entries.get("latents")
    if entry is None:
        raise CheckpointError(f"{file}: holds no tensor 'latents' (but {', '.join(sorted(entries)[:3]) or 'nothing'})")
    if len(entry.shape) != 5 or entry.shape[0] != 1 or 0 in entry.shape or entry.dtype not in _FLOATS:
        why = f"{entry.dtype} of shape {entry.shape}"
        raise CheckpointError(f"{file}: tensor 'latents' is {why}, not floats of shape (1, z, T, H, W)")
    return entry.shape
