"""diffusers' schedulers, made from the checkpoint's scheduler_config.json and the user's solver and flow shift."""

from typing import Any

from wan_dist.config.schema import SamplerConfig
from wan_dist.sampling.schedule import Step, build_schedule

# What a scheduler's config must say for flow matching, where it comes from a checkpoint that names another class.
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def make_scheduler(scheduler_config: dict[str, Any], solver: str, flow_shift: float) -> Any:
    """A fresh scheduler: `unipc`, `euler` (flow-match Euler) or `dpm++`, shifted by `flow_shift`.

    The checkpoint's settings carry over to another solver as `Scheduler.from_config` carries them.
    """
    if solver == "euler":
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler.from_config(scheduler_config, shift=flow_shift)
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    cls = UniPCMultistepScheduler if solver == "unipc" else DPMSolverMultistepScheduler
    foreign = {} if "use_flow_sigmas" in scheduler_config else _FLOW
    return cls.from_config(scheduler_config, flow_shift=flow_shift, **foreign)


def scheduled(sampler: SamplerConfig, scheduler_config: dict[str, Any], device: Any = "cpu") -> tuple[Any, list[Step]]:
    """The scheduler with its timesteps set on `device`, and the schedule they make. sampler: resolved."""
    assert sampler.solver is not None and sampler.flow_shift is not None and sampler.steps is not None
    assert sampler.guidance_scale is not None and sampler.guidance_scale_2 is not None
    scheduler = make_scheduler(scheduler_config, sampler.solver, sampler.flow_shift)
    scheduler.set_timesteps(sampler.steps, device=device)
    scheduler.set_begin_index(0)
    schedule = build_schedule(
        scheduler.timesteps.tolist(),
        guidance_scale=sampler.guidance_scale,
        guidance_scale_2=sampler.guidance_scale_2,
        boundary_ratio=sampler.boundary_ratio,
        num_train_timesteps=scheduler.config.num_train_timesteps,
    )
    return scheduler, schedule
