"""What a null means: the recipe named by an explicit `model=`, then the checkpoint, then diffusers' own defaults."""

from copy import deepcopy
from typing import Any

from wan_dist.config.schema import Config, RecipeConfig
from wan_dist.loading.checkpoint import Checkpoint

# Defaults of `diffusers.WanPipeline.__call__` (a test compares them with its signature). `fps` is not an argument
# there; 16 is what the Wan models were trained at.
PIPELINE_DEFAULTS = {"height": 480, "width": 832, "num_frames": 81, "steps": 50, "guidance_scale": 5.0, "fps": 16.0}

# The shapes that benchmarks take where none is given: small enough for a CPU; Wan2.1 1.3B at 480p on a GPU; `load`
# writes eight of the 1.3B's blocks to a disk; `scale`, which runs on nothing, takes the 14B; `vae` 256x256x5 on a CPU,
# 720x1280x81 on a GPU; `offload`, whose cases are many, the smallest on a CPU and the 14B at 720p on a GPU; `state` the
# tiny model's on a CPU (the shortest step that there is to disturb), the 1.3B at 720p on a GPU.
BENCH_DEFAULTS = {
    "cpu": {
        "blocks": 8, "heads": 8, "head_dim": 64, "ffn": 2048, "text_dim": 512,
        "frames": 4, "rows": 64, "columns": 64,
    },
    "cuda": {
        "blocks": 30, "heads": 12, "head_dim": 128, "ffn": 8960, "text_dim": 4096,
        "frames": 21, "rows": 60, "columns": 104,
    },
    "load": {"blocks": 8, "heads": 12, "head_dim": 128, "ffn": 8960, "text_dim": 4096},
    "vae": {"frames": 2, "rows": 32, "columns": 32},
    "vae on cuda": {"frames": 21, "rows": 90, "columns": 160},
    "offload": {
        "blocks": 8, "heads": 4, "head_dim": 64, "ffn": 1024, "text_dim": 256,
        "frames": 2, "rows": 32, "columns": 32,
    },
    "offload on cuda": {
        "blocks": 40, "heads": 40, "head_dim": 128, "ffn": 13824, "text_dim": 4096,
        "frames": 21, "rows": 90, "columns": 160,
    },
    "state": {
        "blocks": 4, "heads": 4, "head_dim": 24, "ffn": 192, "text_dim": 32,
        "frames": 3, "rows": 4, "columns": 6,
    },
    "state on cuda": {
        "blocks": 30, "heads": 12, "head_dim": 128, "ffn": 8960, "text_dim": 4096,
        "frames": 21, "rows": 90, "columns": 160,
    },
    "scale": {"blocks": 40, "heads": 40, "head_dim": 128, "ffn": 13824, "text_dim": 4096},
}  # fmt: skip

# diffusers' scheduler classes <-> `sampler.solver`.
SOLVERS = {
    "UniPCMultistepScheduler": "unipc",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpm++",
}


def resolve(config: Config, checkpoint: Checkpoint, *, recipe_applies: bool) -> Config:
    """A copy of `config` whose null sampler and video settings are filled in."""
    resolved = deepcopy(config)
    recipe = config.model.recipe if recipe_applies else RecipeConfig()
    sampler, video = resolved.sampler, resolved.video
    guidance_was_said = sampler.guidance_scale is not None
    sampler.steps = _first(sampler.steps, recipe.steps, PIPELINE_DEFAULTS["steps"])
    sampler.guidance_scale = _first(sampler.guidance_scale, recipe.guidance_scale, PIPELINE_DEFAULTS["guidance_scale"])
    if sampler.guidance_scale_2 is None:
        # A scale the user set for one expert must not leave the recipe's on the other.
        theirs = None if guidance_was_said else recipe.guidance_scale_2
        sampler.guidance_scale_2 = _first(theirs, sampler.guidance_scale)
    scheduler = checkpoint.scheduler
    sampler.flow_shift = _first(
        sampler.flow_shift, recipe.flow_shift, scheduler.get("flow_shift"), scheduler.get("shift"), 1.0
    )
    sampler.solver = _first(sampler.solver, SOLVERS.get(scheduler.get("_class_name", "")))
    sampler.seed = _first(sampler.seed, 0)
    sampler.boundary_ratio = _first(sampler.boundary_ratio, checkpoint.boundary_ratio)
    for name in ("height", "width", "num_frames", "fps"):
        setattr(video, name, _first(getattr(video, name), getattr(recipe, name), PIPELINE_DEFAULTS[name]))
    return resolved


def resolve_bench(config: Config) -> None:
    """Fill the null shapes of `config.bench`, in place. The device must be chosen."""
    bench, device = config.bench, config.runtime.device
    kinds = (f"{bench.kind} on {device}", bench.kind, device)
    for name, value in BENCH_DEFAULTS[next(kind for kind in kinds if kind in BENCH_DEFAULTS)].items():
        setattr(bench, name, _first(getattr(bench, name), value))


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
