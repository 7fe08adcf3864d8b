"""What a null means: the recipe, then the checkpoint, then diffusers' own defaults."""

import inspect
from pathlib import Path

import pytest

from wan_dist.config.schema import Config, RecipeConfig
from wan_dist.loading.checkpoint import Checkpoint
from wan_dist.planning.defaults import PIPELINE_DEFAULTS, SOLVERS, resolve

RECIPE = RecipeConfig(
    steps=7, guidance_scale=4.0, guidance_scale_2=3.0, flow_shift=12.0, height=64, width=96, num_frames=17, fps=8.0
)


def checkpoint(boundary_ratio: float | None = 0.875, **scheduler) -> Checkpoint:
    scheduler = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 5.0, **scheduler}
    return Checkpoint(Path("x"), {"boundary_ratio": boundary_ratio}, {}, scheduler)


def config(**sampler) -> Config:
    made = Config()
    made.model.recipe = RECIPE
    for name, value in sampler.items():
        setattr(made.sampler, name, value)
    return made


def test_the_recipe_comes_first():
    resolved = resolve(config(), checkpoint(), recipe_applies=True)
    sampler, video = resolved.sampler, resolved.video
    assert (sampler.steps, sampler.guidance_scale, sampler.guidance_scale_2, sampler.flow_shift) == (7, 4.0, 3.0, 12.0)
    assert (video.height, video.width, video.num_frames, video.fps) == (64, 96, 17, 8.0)
    assert (sampler.solver, sampler.seed, sampler.boundary_ratio) == ("unipc", 0, 0.875)


def test_without_a_recipe_the_checkpoint_and_then_the_pipeline():
    resolved = resolve(config(), checkpoint(), recipe_applies=False)
    sampler, video = resolved.sampler, resolved.video
    assert (sampler.steps, sampler.guidance_scale, sampler.guidance_scale_2, sampler.flow_shift) == (50, 5.0, 5.0, 5.0)
    assert (video.height, video.width, video.num_frames, video.fps) == (480, 832, 81, 16.0)


def test_what_was_said_beats_all_of_them():
    said = config(
        steps=3, guidance_scale=2.0, guidance_scale_2=1.5, flow_shift=1.0, solver="euler", seed=9, boundary_ratio=0.0
    )
    said.video.height = 32
    resolved = resolve(said, checkpoint(), recipe_applies=True)
    assert resolved.sampler == said.sampler
    assert (resolved.video.height, resolved.video.width) == (32, 96)


def test_an_explicit_guidance_scale_silences_the_recipes_second_one():
    sampler = resolve(config(guidance_scale=6.0), checkpoint(), recipe_applies=True).sampler
    assert (sampler.guidance_scale, sampler.guidance_scale_2) == (6.0, 6.0)
    sampler = resolve(config(guidance_scale_2=2.0), checkpoint(), recipe_applies=True).sampler
    assert (sampler.guidance_scale, sampler.guidance_scale_2) == (4.0, 2.0)


def test_a_recipe_without_a_second_scale_uses_its_first():
    made = config()
    made.model.recipe = RecipeConfig(guidance_scale=4.5)
    assert resolve(made, checkpoint(), recipe_applies=True).sampler.guidance_scale_2 == 4.5


@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1])
def test_a_seed_stays_and_null_is_zero(seed):
    assert resolve(config(seed=seed), checkpoint(), recipe_applies=True).sampler.seed == seed
    assert resolve(config(), checkpoint(), recipe_applies=True).sampler.seed == 0


@pytest.mark.parametrize(
    ("scheduler", "shift"),
    [({"flow_shift": None, "shift": 3.0}, 3.0), ({"flow_shift": None}, 1.0), ({"flow_shift": 2.0, "shift": 3.0}, 2.0)],
)
def test_the_schedulers_flow_shift(scheduler, shift):
    assert resolve(config(), checkpoint(**scheduler), recipe_applies=False).sampler.flow_shift == shift


@pytest.mark.parametrize(("name", "solver"), [*SOLVERS.items(), ("DDIMScheduler", None)])
def test_the_checkpoints_solver(name, solver):
    assert resolve(config(), checkpoint(_class_name=name), recipe_applies=True).sampler.solver == solver


def test_a_checkpoint_without_a_boundary_has_none():
    assert resolve(config(), checkpoint(None), recipe_applies=True).sampler.boundary_ratio is None


def test_the_given_config_is_not_changed():
    given = config()
    resolve(given, checkpoint(), recipe_applies=True)
    assert given == config()


def test_pipeline_defaults_are_those_of_diffusers():
    from diffusers import WanPipeline

    parameters = inspect.signature(WanPipeline.__call__).parameters
    named = {**PIPELINE_DEFAULTS, "num_inference_steps": PIPELINE_DEFAULTS["steps"]}
    compared = [name for name in named if name in parameters]
    assert set(compared) == {"height", "width", "num_frames", "num_inference_steps", "guidance_scale"}
    assert {name: parameters[name].default for name in compared} == {name: named[name] for name in compared}
    assert parameters["guidance_scale_2"].default is None


def test_solvers_are_schedulers_of_diffusers():
    import diffusers

    assert all(hasattr(diffusers, name) for name in SOLVERS)
