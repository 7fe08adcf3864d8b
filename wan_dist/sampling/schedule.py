"""The schedule: everything that is known about the steps before the first one is taken.

Computed on the CPU and read by all that follows: which expert, whether guided, what to prefetch or show.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One denoising step. `expert` is a component's name; `guided` says whether the negative branch is needed."""

    index: int
    timestep: float
    expert: str
    guidance: float
    guided: bool


def is_guided(guidance: float, first_guidance: float) -> bool:
    """Whether a step of this scale needs the negative branch; `first_guidance` is the high-noise expert's.

    Guidance is on above 1, as in diffusers, and it is a property of the step: (1, 4) guides the second expert, which
    diffusers silently does not. Below 1 (other than 1 itself) diffusers interpolates where the run is guided.
    """
    return guidance > 1 or (guidance != 1 and first_guidance > 1)


def build_schedule(
    timesteps: Sequence[float],
    *,
    guidance_scale: float,
    guidance_scale_2: float,
    boundary_ratio: float | None,
    num_train_timesteps: int,
) -> list[Step]:
    """The steps in order. With a boundary, `t >= boundary_ratio * num_train_timesteps` is the first expert's; the
    product is compared as it is, never truncated."""
    boundary = None if boundary_ratio is None else boundary_ratio * num_train_timesteps
    steps = []
    for index, timestep in enumerate(timesteps):
        low_noise = boundary is not None and timestep < boundary
        guidance = guidance_scale_2 if low_noise else guidance_scale
        expert = "transformer_2" if low_noise else "transformer"
        steps.append(Step(index, float(timestep), expert, guidance, is_guided(guidance, guidance_scale)))
    return steps
