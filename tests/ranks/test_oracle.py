"""Against diffusers: the same checkpoint, prompt and seed give diffusers' latents and frames."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from support.checkpoints import diffusers_answer, diffusers_pipeline
from support.ranks import generate

CALL = {"prompt": "a cat, surfing", "height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3}


def distance(a, b) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.mark.parametrize("scale", [5.0, 1.0, 0.5])
def test_single_expert_with_and_without_guidance(tmp_path, tiny, scale):
    ours = generate(tmp_path, tiny, **{"sampler.guidance_scale": scale, "negative_prompt": "blurry"})
    theirs = diffusers_answer(tiny, **CALL, guidance_scale=scale, negative_prompt="blurry")
    assert distance(ours["latents"], theirs) <= 1e-4


@pytest.mark.parametrize("scales", [(4.0, None), (4.0, 3.0), (4.0, 1.0), (4.0, 0.5), (1.0, 1.0)])
def test_two_experts(tmp_path, checkpoints, scales):
    path = checkpoints(experts=2, boundary_ratio=0.8755, seed=1)
    ours = generate(tmp_path, path, **{"sampler.guidance_scale": scales[0], "sampler.guidance_scale_2": scales[1]})
    theirs = diffusers_answer(path, **CALL, guidance_scale=scales[0], guidance_scale_2=scales[1])
    assert distance(ours["latents"], theirs) <= 1e-4


def test_second_expert_guided_alone_as_a_plain_serial_loop(tmp_path, checkpoints):
    """(1, 4): diffusers drops the second expert's guidance, so the reference is the loop written out."""
    path = checkpoints(experts=2, boundary_ratio=0.8755, seed=1)
    scales = {"sampler.guidance_scale": 1.0, "sampler.guidance_scale_2": 4.0}
    ours = generate(tmp_path, path, **scales)["latents"]
    theirs = serial_loop(path, guidance_scale=1.0, guidance_scale_2=4.0)
    assert distance(ours, theirs) <= 1e-4
    assert distance(diffusers_answer(path, **CALL, guidance_scale=1.0, guidance_scale_2=4.0), theirs) > 1e-2
    halves = generate(tmp_path, path, **scales, **{"parallelism.cfg": 2})["latents"]
    assert torch.equal(halves, ours)


@torch.no_grad()
def serial_loop(path, *, guidance_scale: float, guidance_scale_2: float) -> torch.Tensor:
    pipe = diffusers_pipeline(path)
    positive, negative = pipe.encode_prompt(CALL["prompt"], "", max_sequence_length=512, device="cpu")
    pipe.scheduler.set_timesteps(CALL["num_inference_steps"])
    latents = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator("cpu").manual_seed(0))
    for t in pipe.scheduler.timesteps:
        high = t >= 875.5
        model, scale = (pipe.transformer, guidance_scale) if high else (pipe.transformer_2, guidance_scale_2)
        velocity = model(latents, t.expand(1), positive, return_dict=False)[0]
        if scale > 1:
            other = model(latents, t.expand(1), negative, return_dict=False)[0]
            velocity = other + scale * (velocity - other)
        latents = pipe.scheduler.step(velocity, t, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize(
    ("solver", "scheduler"),
    [
        ("euler", lambda config: FlowMatchEulerDiscreteScheduler.from_config(config, shift=5.0)),
        ("dpm++", lambda config: DPMSolverMultistepScheduler.from_config(config, flow_shift=5.0)),
    ],
)
def test_other_solvers_and_flow_shift(tmp_path, tiny, solver, scheduler):
    ours = generate(tmp_path, tiny, **{"sampler.solver": solver, "sampler.flow_shift": 5.0, "sampler.steps": 5})
    theirs = diffusers_answer(tiny, **{**CALL, "num_inference_steps": 5}, scheduler=scheduler)
    assert distance(ours["latents"], theirs) <= 1e-4


def test_frames(tmp_path, tiny):
    ours = generate(tmp_path, tiny, **{"output.formats": ["frames", "latents"], "sampler.seed": 7})["frames"]
    theirs = torch.from_numpy(diffusers_answer(tiny, **CALL, seed=7, output_type="np")[0])
    assert ours.dtype == torch.uint8 and ours.shape == (9, 32, 48, 3)
    assert distance(ours / 255, theirs) <= 1 / 255 + 1e-3


def test_a_prompt_is_cleaned_as_diffusers_cleans_it(tmp_path, tiny):
    messy = "  a  cat &amp;amp; dog\n “surfing”  "
    ours = generate(tmp_path, tiny, prompt=messy)["latents"]
    assert distance(ours, diffusers_answer(tiny, **{**CALL, "prompt": messy})) <= 1e-4
