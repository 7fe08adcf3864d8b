"""diffusers' schedulers, made from the checkpoint's scheduler_config.json and the user's solver and flow shift."""

from typing import Any

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
