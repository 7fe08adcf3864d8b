"""The schedule: which expert and which guidance each step has, timesteps and noise as diffusers makes them."""

import json

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor

from wan_dist.config.schema import SamplerConfig
from wan_dist.sampling.denoise import initial_noise
from wan_dist.sampling.schedule import build_schedule, is_guided
from wan_dist.sampling.solvers import make_scheduler, scheduled

UNIPC = json.loads(
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0).to_json_string()
)
EULER = json.loads(FlowMatchEulerDiscreteScheduler(shift=3.0).to_json_string())
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def by_hand(solver: str, shift: float):
    if solver == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    cls = UniPCMultistepScheduler if solver == "unipc" else DPMSolverMultistepScheduler
    return cls(**FLOW, flow_shift=shift)


def steps(scale: float, scale_2: float | None = None, boundary: float | None = 0.875):
    return build_schedule(
        [999.0, 875.5, 875.0, 874.0, 10.0],
        guidance_scale=scale,
        guidance_scale_2=scale if scale_2 is None else scale_2,
        boundary_ratio=boundary,
        num_train_timesteps=1000,
    )


def experts(boundary: float | None) -> list[int]:
    return [1 if step.expert == "transformer" else 2 for step in steps(4.0, boundary=boundary)]


def test_the_boundary_belongs_to_the_first_expert():
    assert experts(0.875) == [1, 1, 1, 2, 2]
    assert experts(None) == [1, 1, 1, 1, 1]
    assert experts(0.0) == [1, 1, 1, 1, 1]
    assert experts(1.1) == [2, 2, 2, 2, 2]


def test_the_boundary_is_not_truncated():
    assert experts(0.8755) == [1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("scales", "guided"),
    [
        ((4.0, 1.0), [True, True, True, False, False]),
        ((1.0, 4.0), [False, False, False, True, True]),
        ((0.5, None), [False] * 5),
        ((1.0, None), [False] * 5),
        ((1.0001, None), [True] * 5),
        ((4.0, 0.5), [True] * 5),
        ((1.0, 0.5), [False] * 5),
    ],
)
def test_guidance_is_a_property_of_the_step(scales, guided):
    made = steps(*scales)
    assert [step.guided for step in made] == guided
    second = scales[0] if scales[1] is None else scales[1]
    assert [step.guidance for step in made] == [scales[0]] * 3 + [second] * 2
    assert [step.index for step in made] == list(range(5))


def test_is_guided_in_a_run_of_one_scale_is_diffusers_own_rule():
    for scale in (-1.0, 0.0, 0.5, 1.0, 1.5, 7.0):
        assert is_guided(scale, scale) is (scale > 1)


@pytest.mark.parametrize("solver", ["unipc", "euler", "dpm++"])
@pytest.mark.parametrize("config", [UNIPC, EULER], ids=["unipc_checkpoint", "euler_checkpoint"])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_timesteps_and_sigmas_equal_a_scheduler_made_by_hand(solver, config, shift):
    sampler = SamplerConfig(steps=7, guidance_scale=4.0, guidance_scale_2=4.0, flow_shift=shift, solver=solver)
    ours, schedule = scheduled(sampler, config)
    theirs = by_hand(solver, shift)
    theirs.set_timesteps(7)
    assert type(ours) is type(theirs)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert [step.timestep for step in schedule] == theirs.timesteps.tolist()


@pytest.mark.parametrize("solver", ["unipc", "euler", "dpm++"])
def test_a_whole_run_of_steps_equals_a_scheduler_made_by_hand(solver):
    sampler = SamplerConfig(steps=5, guidance_scale=4.0, guidance_scale_2=4.0, flow_shift=3.0, solver=solver)
    ours, _ = scheduled(sampler, UNIPC)
    theirs = by_hand(solver, 3.0)
    theirs.set_timesteps(5)
    x = y = initial_noise((1, 4, 2, 4, 4), 0)
    for t in theirs.timesteps:
        x = ours.step(x.tanh(), t, x, return_dict=False)[0]
        y = theirs.step(y.tanh(), t, y, return_dict=False)[0]
        assert torch.equal(x, y)


def test_settings_of_the_checkpoint_carry_over():
    config = {**UNIPC, "solver_order": 3, "num_train_timesteps": 500, "final_sigmas_type": "sigma_min"}
    for solver in ("unipc", "dpm++"):
        made = make_scheduler(config, solver, 2.0)
        assert (made.config.solver_order, made.config.num_train_timesteps, made.config.flow_shift) == (3, 500, 2.0)
        assert made.config.prediction_type == "flow_prediction"
    assert make_scheduler(config, "euler", 2.0).config.num_train_timesteps == 500
    assert make_scheduler(EULER, "euler", 2.0).config.shift == 2.0
    assert config["flow_shift"] == 3.0


def test_a_schedule_follows_the_boundary_of_its_sampler():
    sampler = SamplerConfig(
        steps=10, guidance_scale=4.0, guidance_scale_2=1.0, flow_shift=5.0, solver="unipc", boundary_ratio=0.9
    )
    _, schedule = scheduled(sampler, UNIPC)
    for step in schedule:
        assert (step.expert == "transformer") is (step.timestep >= 900) is step.guided
    assert {step.expert for step in schedule} == {"transformer", "transformer_2"}


@pytest.mark.parametrize("seed", [0, 7, -1, 2**64 - 1])
def test_initial_noise_is_diffusers_own(seed):
    shape = (1, 16, 5, 4, 6)
    theirs = randn_tensor(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)
    assert torch.equal(initial_noise(shape, seed), theirs)
