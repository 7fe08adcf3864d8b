"""A solver taken out after any step, through a file into a fresh one, goes on with the bits of an undisturbed one."""

import json
from copy import copy
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from wan_dist.config.schema import SamplerConfig
from wan_dist.output.state import DenoisingState, read_state, write_state
from wan_dist.sampling.denoise import initial_noise
from wan_dist.sampling.solver_state import HISTORY, SolverState, restore_solver, solver_state
from wan_dist.sampling.solvers import scheduled

SHAPE = (1, 4, 2, 4, 6)
UNIPC = json.loads(
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0).to_json_string()
)
# name -> solver, steps, what the checkpoint's scheduler says
SOLVERS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "euler": ("euler", 5, {}),
    "unipc": ("unipc", 6, {}),
    "unipc bh1": ("unipc", 6, {"solver_type": "bh1"}),
    "unipc of order 3": ("unipc", 6, {"solver_order": 3}),
    "unipc bh1 of order 3, full order at the end": (
        "unipc", 6, {"solver_order": 3, "solver_type": "bh1", "lower_order_final": False,
                     "final_sigmas_type": "sigma_min"},
    ),
    "unipc of order 1": ("unipc", 5, {"solver_order": 1}),
    "unipc without its first corrections": ("unipc", 6, {"disable_corrector": [0, 1, 2]}),
    "unipc with thresholding": ("unipc", 5, {"thresholding": True}),
    "dpm++": ("dpm++", 6, {}),
    "dpm++ of order 1": ("dpm++", 5, {"solver_order": 1}),
    "dpm++ of order 3": ("dpm++", 6, {"solver_order": 3}),
    "dpm++ of order 3 in many steps": ("dpm++", 16, {"solver_order": 3}),
    "dpm++ heun, euler at the end": ("dpm++", 6, {"solver_type": "heun", "euler_at_final": True}),
    "dpm++ full order at the end": ("dpm++", 6, {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
}  # fmt: skip


def fresh(name: str) -> Any:
    solver, steps, settings = SOLVERS[name]
    sampler = SamplerConfig(steps=steps, guidance_scale=1.0, guidance_scale_2=1.0, flow_shift=3.0, solver=solver)
    scheduler, _ = scheduled(sampler, {**UNIPC, **settings})
    return scheduler


def velocity(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Of both, and in another memory layout, as a model's may be."""
    moved = torch.tanh(1.3 * latents).permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    return moved + t / 1000 * latents.flip(2)


def run(scheduler: Any, latents: torch.Tensor, begin: int, end: int) -> list[torch.Tensor]:
    """The latents before each step, and after the last."""
    path = [latents]
    for t in scheduler.timesteps[begin:end]:
        path.append(scheduler.step(velocity(path[-1], t), t, path[-1], return_dict=False)[0])
    return path


@pytest.mark.parametrize("name", SOLVERS)
def test_going_on_after_any_step_is_an_undisturbed_run(tmp_path, name):
    steps, noise = SOLVERS[name][1], initial_noise(SHAPE, 0)
    whole = run(fresh(name), noise, 0, steps)
    for done in range(steps + 1):
        first = fresh(name)
        latents = run(first, noise, 0, done)[-1]
        solver = solver_state(first)
        state = DenoisingState(
            steps_done=done, steps=steps, latents=latents, tensors=solver.tensors, numbers=solver.numbers
        )
        write_state(tmp_path / "state", state, {})
        back, second = read_state(tmp_path / "state"), fresh(name)
        restore_solver(second, SolverState(back.tensors, back.numbers))
        for attribute in HISTORY[type(first).__name__].attributes:
            assert same(getattr(second, attribute, None), getattr(first, attribute, None)), (done, attribute)
        assert same(run(second, back.latents, done, steps), whole[done:]), done


def same(one: Any, other: Any) -> bool:
    """Equal, tensors bit by bit and with equal strides."""
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        # Some settings end in NaN, also undisturbed.
        bits = (tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor for tensor in (one, other))
        return torch.equal(*bits) and one.stride() == other.stride()
    return one is other or one == other


@pytest.mark.parametrize("name", SOLVERS)
def test_what_changes_from_step_to_step_is_what_is_kept(name):
    """A release of diffusers that adds an attribute fails here."""
    scheduler, changed = fresh(name), set()
    latents = initial_noise(SHAPE, 0)
    for index in range(len(scheduler.timesteps)):
        before = {key: copy(value) if isinstance(value, list) else value for key, value in vars(scheduler).items()}
        latents = run(scheduler, latents, index, index + 1)[-1]
        after = vars(scheduler)
        changed |= {key for key in after if key not in before or not unchanged(before[key], after[key])}
    assert changed == HISTORY[type(scheduler).__name__].attributes


def unchanged(before: Any, after: Any) -> bool:
    """The same object (of lists: the same items), or equal plain values."""
    if isinstance(before, list):
        return len(before) == len(after) and all(map(unchanged, before, after))
    return before is after or (not isinstance(before, torch.Tensor) and before == after)


@pytest.mark.parametrize("name", SOLVERS)
def test_no_tensor_is_written_into_after_it_was_made(name):
    scheduler, latents, seen = fresh(name), initial_noise(SHAPE, 0), []
    for index in range(len(scheduler.timesteps)):
        seen += [(t, t._version, t.clone()) for t in (latents, *solver_state(scheduler).tensors.values())]
        latents = run(scheduler, latents, index, index + 1)[-1]
    assert len(seen) > len(scheduler.timesteps) - 1
    assert all(tensor._version == version and torch.equal(tensor, value) for tensor, version, value in seen)


def test_tensors_are_not_copied():
    scheduler = fresh("unipc")
    run(scheduler, initial_noise(SHAPE, 0), 0, 3)
    tensors = solver_state(scheduler).tensors
    assert set(tensors) == {"model_outputs.0", "model_outputs.1", "last_sample"}
    assert tensors["model_outputs.1"] is scheduler.model_outputs[1] and tensors["last_sample"] is scheduler.last_sample


def test_a_state_of_another_solver_does_not_go_in():
    theirs = fresh("unipc of order 3")
    run(theirs, initial_noise(SHAPE, 0), 0, 4)
    state = solver_state(theirs)
    with pytest.raises(ValueError, match=r"of a UniPCMultistepScheduler, this solver is a DPMSolverMultistep"):
        restore_solver(fresh("dpm++"), state)
    with pytest.raises(ValueError, match=r"does not fit this UniPCMultistepScheduler: model_outputs\.2"):
        restore_solver(fresh("unipc"), state)
    with pytest.raises(ValueError, match=r"does not fit .* this_order, this_sigma"):
        numbers = {"this_sigma" if key == "this_order" else key: value for key, value in state.numbers.items()}
        restore_solver(fresh("unipc of order 3"), SolverState(state.tensors, numbers))
