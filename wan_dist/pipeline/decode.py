"""`task=decode`: from latents on disk to a video, on any mesh; it is what a run that failed after denoising has left
to do."""

from functools import partial
from pathlib import Path

import torch

from wan_dist.config.schema import Config
from wan_dist.distributed.collectives import broadcast
from wan_dist.loading.checkpoint import open_checkpoint
from wan_dist.loading.components import match_vae
from wan_dist.loading.tensor_files import CheckpointError
from wan_dist.loading.weights import from_files, on_every_rank
from wan_dist.output.record import RankReport
from wan_dist.pipeline.generate import finish_run
from wan_dist.pipeline.plan import agreed_plan
from wan_dist.pipeline.run import Run, latent_shape, run_mesh, wants_pixels
from wan_dist.pipeline.video import load_vae, write_latents, write_video
from wan_dist.planning.workload import Task
from wan_dist.topology import RankEnv


@torch.no_grad()
def decode(config: Config, env: RankEnv, device: torch.device, report: RankReport) -> dict[str, str]:
    """The video of `config.latents`, whose shape decided the video's. Returns the files written, by kind, on rank 0.

    Raises CheckpointError on every rank if any rank's files are at fault.
    """
    with run_mesh(config, env, device) as mesh:
        with report.timed("check"):
            checkpoint = on_every_rank(mesh.world, lambda: open_checkpoint(Path(str(config.model.path))))
            report.plan = plan = agreed_plan(config, checkpoint, Task.of_decoding(config), mesh, report)
            run = Run(config, checkpoint, plan, [], latent_shape(config, checkpoint), mesh, device, report)
            needs_vae = run.runs_vae and wants_pixels(run)
            match = partial(match_vae, checkpoint, dtype=getattr(torch, config.runtime.vae_dtype), encoder=False)
            weights = on_every_rank(mesh.world, lambda: match() if needs_vae else None)
        with report.timed("load"):
            latents = _read(run)
            vae = load_vae(run, weights)
        spare = write_latents(run, latents)
        write_video(run, vae, latents)
        files = finish_run(run, spare)
        del run, vae, mesh
    return files


def _read(run: Run) -> torch.Tensor:
    """The file's latents, fp32, on every rank; read by the first."""
    from safetensors.torch import load_file

    file = Path(str(run.config.latents))

    def read() -> torch.Tensor | None:
        found = from_files(file, lambda: load_file(file)["latents"]) if run.is_first else None
        if found is not None and tuple(found.shape) != run.latent_shape:
            raise CheckpointError(f"{file}: 'latents' has another shape now than when the run started")
        return found

    found = on_every_rank(run.mesh.world, read)
    latents = torch.empty(run.latent_shape, device=run.device)
    if found is not None:
        latents.copy_(found)
    return broadcast(run.mesh.world, latents)
