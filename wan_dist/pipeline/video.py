"""From final latents to the files that were asked for: decoded by the VAE's ranks, written by the first one."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import torch

from wan_dist.distributed.collectives import wait_for_first
from wan_dist.layers.memory_format import wants_channels_last
from wan_dist.loading.latents import origin_metadata
from wan_dist.loading.weights import MatchedWeights, fill, on_every_rank
from wan_dist.models.wan_latents import decode_frames
from wan_dist.models.wan_vae import ParallelVae, parallelize_vae
from wan_dist.output.files import write_tensor
from wan_dist.output.kept_latents import decode_command
from wan_dist.output.names import output_path
from wan_dist.output.preview import Preview
from wan_dist.output.progress import Progress
from wan_dist.output.video import frames_writer, mp4_writer
from wan_dist.pipeline.run import PIXEL_FORMATS, Run, wants_pixels


def load_vae(run: Run, weights: MatchedWeights | None) -> ParallelVae | None:
    """The VAE, taught to work on this rank's rows; None where it is not matched. All ranks call this."""
    channels_last = wants_channels_last(run.config.runtime.vae_channels_last, run.device)

    def load() -> ParallelVae | None:
        if weights is None:
            return None
        vae = fill(weights, device=run.device, bytes_read=run.report.bytes_read, component="vae")
        return parallelize_vae(vae, run.vae_mesh, channels_last=channels_last)

    return on_every_rank(run.mesh.world, load)


def write_latents(run: Run, latents: torch.Tensor) -> Path | None:
    """Before anything is decoded, so that a failure there costs the decoding alone; latents that were given are not
    written again, unless they are asked for. Returns the file to remove when all is well: one that nobody asked for and
    that takes no other's place."""
    asked_for, file = "latents" in run.config.output.formats, _path(run, "latents")
    safety_copy = run.config.output.keep_latents and run.config.task == "generate" and not asked_for
    replaces = file.exists()
    if run.is_first and (safety_copy or asked_for):
        with run.report.timed("write"):
            write_tensor(file, "latents", latents.float(), origin_metadata(run.config))
    return file if safety_copy and (run.first_step or not replaces) else None  # a run that goes on replaces its own


@contextmanager
def latents_kept(run: Run, latents: torch.Tensor) -> Iterator[None]:
    """Should the disk fail what follows, the latents are in a file all the same, and the error says in which: where
    they belong, else in the system's folder for temporary files."""
    try:
        yield
    except OSError as error:
        if not run.is_first or run.config.task != "generate":
            raise
        home = Path(str(run.config.output.dir))
        if not home.exists():
            error.add_note(f"{home} was removed while the run was under way")
        for folder in (home, None):
            with suppress(OSError):
                error.add_note(_kept_in(folder, run, latents))
                break
        raise


def _kept_in(folder: Path | None, run: Run, latents: torch.Tensor) -> str:
    """Where this run's latents are, in a sentence; written there unless they are already. folder: None is a new one
    for temporary files."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    file = output_path(folder or Path(tempfile.mkdtemp(prefix="wan_dist-")), run.config.output.name, "latents")
    if not file.exists() or file.stat().st_mtime < run.report.started:
        write_tensor(file, "latents", latents.float(), origin_metadata(run.config))
    return decode_command(run.config, file) if wants_pixels(run) else f"the latents: {file}"


def write_video(run: Run, vae: ParallelVae | None, latents: torch.Tensor) -> None:
    """Decode and write pixels, a latent frame at a time; returns on no rank before all is written. latents: on every
    rank. vae: on those that have rows of it."""
    if vae is not None:
        _decode_and_write(run, vae, latents)
    wait_for_first(run.mesh, "video written")


def _decode_and_write(run: Run, vae: ParallelVae, latents: torch.Tensor) -> None:
    with ExitStack() as stack:
        append = _writers(run, stack) if run.is_first else []
        preview = Preview(run.config.video.num_frames or 1) if run.is_first and run.config.output.preview else None
        if preview is not None:
            append.append(preview.append)
        progress = Progress(latents.shape[2], unit="latent frame") if run.is_first else None
        for frames in _timed(run, decode_frames(vae, latents)):
            with run.report.timed("write"):
                for write in append:
                    write(frames)
            if progress is not None:
                progress.step()
        with run.report.timed("write"):
            stack.close()
        if progress is not None:
            progress.close()
        if preview is not None:
            preview.show()


def _timed(run: Run, frames: Iterator[torch.Tensor | None]) -> Iterator[torch.Tensor | None]:
    """The same, the seconds that each takes counted as decoding."""
    done = object()
    while True:
        with run.report.timed("decode"):
            item = next(frames, done)
        if item is done:
            return
        yield item


def _writers(run: Run, stack: ExitStack) -> list[Callable[[torch.Tensor], None]]:
    """One function for each file of pixels that takes its next frames; the files are complete when `stack` closes."""
    video, formats = run.config.video, run.config.output.formats
    assert video.height and video.width and video.num_frames and video.fps, "resolved before"
    shape = (video.num_frames, video.height, video.width, 3)
    writers = {
        "mp4": partial(mp4_writer, _path(run, "mp4"), shape[1:3], video.fps),
        "frames": partial(frames_writer, _path(run, "frames"), shape),
    }
    return [stack.enter_context(writers[kind]()) for kind in PIXEL_FORMATS if kind in formats]


def outputs(run: Run) -> dict[str, str]:
    """The files that were asked for, by kind."""
    return {kind: str(_path(run, kind)) for kind in run.config.output.formats}


def _path(run: Run, kind: str) -> Path:
    return output_path(Path(str(run.config.output.dir)), run.config.output.name, kind)
