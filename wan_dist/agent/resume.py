"""Whether a run can go on from the state that an earlier one of its name left: asked before any rank starts.
Imports no torch."""

from pathlib import Path

from wan_dist.config.schema import Config
from wan_dist.loading.checkpoint import Checkpoint, fingerprint
from wan_dist.loading.tensor_files import CheckpointError
from wan_dist.output.identity import differences, read_identity, run_identity
from wan_dist.output.names import STATE_FILE, run_folder
from wan_dist.planning.refusal import Refusal


def state_file(config: Config) -> Path:
    """Where a run's state is. config: resolved."""
    return run_folder(Path(str(config.output.dir)), config.output.name) / STATE_FILE


def resume_refusals(config: Config, checkpoint: Checkpoint) -> list[Refusal]:
    """A state that is there, is to be gone on from, and is damaged or that of another run; none where there is none.

    config: resolved. checkpoint: complete, since all of its files' headers decide. Raises OSError where one of them, or
    a picture, cannot be read.
    """
    file = state_file(config)
    if config.task != "generate" or config.output.resume != "auto" or not file.exists():
        return []
    try:
        saved = read_identity(file)
    except CheckpointError as error:
        return [_refusal(file, f"the saved state cannot be used: {str(error).removeprefix(f'{file}: ')}")]
    found = differences(saved, run_identity(config, fingerprint(checkpoint)))
    return [_refusal(file, f"the saved state is that of another run: {', '.join(found)}")] if found else []


def _refusal(file: Path, why: str) -> Refusal:
    remedy = f"use another output.name, output.resume=off to start over, or remove {file}"
    return Refusal("output.resume", "auto", why, remedy)
