"""What every phase of a run needs to know, and how a run begins."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wan_dist.config.schema import Config
from wan_dist.distributed.mesh import AXES, Mesh, build_mesh
from wan_dist.distributed.process_group import process_group
from wan_dist.loading.checkpoint import Checkpoint
from wan_dist.loading.weights import Sharding, sharding_over
from wan_dist.output.files import remove_leftovers
from wan_dist.output.record import RankReport
from wan_dist.planning.degrees import fsdp_division
from wan_dist.planning.footprint import FSDP
from wan_dist.planning.placement import Plan
from wan_dist.planning.video_shape import ModelShape
from wan_dist.sampling.schedule import Step
from wan_dist.topology import RankEnv

PIXEL_FORMATS = ("mp4", "frames")


@dataclass(frozen=True)
class Run:
    """config: frozen, every null resolved. plan: where each component lives. schedule: empty where nothing is denoised.
    latent_shape: `(1, z, T, H, W)` of the video. kept: what is resident, so that it stays until the run ends.
    first_step: of the schedule; those before it an earlier run has done."""

    config: Config
    checkpoint: Checkpoint
    plan: Plan
    schedule: list[Step]
    latent_shape: tuple[int, ...]
    mesh: Mesh
    device: torch.device
    report: RankReport
    kept: list[Any] = field(default_factory=list)
    first_step: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, str(self.config.runtime.dtype))

    @property
    def remaining(self) -> list[Step]:
        """The steps that this run is to take."""
        return self.schedule[self.first_step :]

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that encodes text, writes files and shows progress."""
        return self.mesh.world.rank == 0

    @property
    def sharding(self) -> Sharding | None:
        """How the transformers are divided, if they are."""
        divided = any(p.how == FSDP for p in self.plan.placements)
        return sharding_over(self.config.parallelism.fsdp, self.mesh) if divided else None

    @property
    def vae_mesh(self) -> Mesh:
        """The mesh that the VAE's rows are split over: the run's, or the first rank alone."""
        if self.config.parallelism.vae == "on":
            return self.mesh
        return build_mesh(dict.fromkeys(AXES, 1), self.device.type)

    @property
    def runs_vae(self) -> bool:
        """Whether this rank has latent rows of its own, and so needs a VAE."""
        axis = self.vae_mesh["vae"]
        return self.is_first or 0 < axis.rank < self.latent_shape[3]


def wants_pixels(run: Run) -> bool:
    """Whether anything asked for has to be decoded."""
    return bool(set(PIXEL_FORMATS) & set(run.config.output.formats))


def latent_shape(config: Config, checkpoint: Checkpoint) -> tuple[int, ...]:
    """`(1, z, T, H, W)` of the video that a resolved config asks for."""
    video, shape = config.video, ModelShape.from_configs(checkpoint.transformer_config, checkpoint.configs["vae"])
    assert video.num_frames and video.height and video.width, "resolved before"
    return shape.latent_shape(video.num_frames, video.height, video.width)


@contextmanager
def run_mesh(config: Config, env: RankEnv, device: torch.device) -> Iterator[Mesh]:
    """The mesh of a run that writes files; what an earlier one left of them half-written is removed first."""
    if env.rank == 0:
        remove_leftovers(Path(str(config.output.dir)), config.output.name)
    degrees = {axis: getattr(config.parallelism, axis) for axis in AXES}
    replicas, _ = fsdp_division(config.parallelism.fsdp, degrees)
    with process_group(env, degrees, device, config.runtime.timeout_s, fsdp_replicas=replicas) as mesh:
        yield mesh
