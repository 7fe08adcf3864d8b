"""What a solver remembers between steps, taken out and put into a fresh one, which then goes on with the same bits.

Of a diffusers scheduler, everything that `step()` writes and `solvers.scheduled` does not make anew.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class SolverState:
    """tensors: the scheduler's own, not copies: it never writes into one that it has made or remembers. A list's are
    named `model_outputs.0`, and so on. numbers: ints, texts and None, which JSON can hold."""

    tensors: dict[str, torch.Tensor]
    numbers: dict[str, Any]


@dataclass(frozen=True)
class History:
    """The attributes of a scheduler that change from step to step. timesteps: the list of the last ones it was given,
    which follow from the step's index."""

    numbers: tuple[str, ...]
    tensors: tuple[str, ...] = ()
    timesteps: str | None = None

    @property
    def attributes(self) -> set[str]:
        return {*self.numbers, *self.tensors, *([self.timesteps] if self.timesteps else [])}


HISTORY = {
    "UniPCMultistepScheduler": History(
        ("_step_index", "lower_order_nums", "this_order"), ("model_outputs", "last_sample"), "timestep_list"
    ),
    "DPMSolverMultistepScheduler": History(("_step_index", "lower_order_nums"), ("model_outputs",)),
    "FlowMatchEulerDiscreteScheduler": History(("_step_index",)),
}


def solver_state(scheduler: Any) -> SolverState:
    """The state between two steps, where each was given `scheduler.timesteps[index]` and this scheduler drew no noise.
    Costs no copy and no wait for the device."""
    kind = type(scheduler).__name__
    history = HISTORY[kind]
    now = vars(scheduler)  # asked for an attribute, it might answer from its config, with a warning
    assert now.get("solver_p") is None, "a solver within the solver has a state of its own"
    numbers = {name: now.get(name) for name in history.numbers}  # UniPC has no order before its first step
    tensors = {name: tensor for name, tensor in _slots(scheduler, history) if tensor is not None}
    return SolverState(tensors, {"solver": kind, **numbers})


def restore_solver(scheduler: Any, state: SolverState) -> None:
    """Put a state into a scheduler fresh from `solvers.scheduled`, made of the same settings; tensors are moved to the
    device of its timesteps. Raises ValueError where the state is that of another one."""
    kind = type(scheduler).__name__
    history = HISTORY[kind]
    theirs = state.numbers.get("solver")
    if theirs != kind:
        raise ValueError(f"the state is that of a {theirs}, this solver is a {kind}")
    strange = set(state.tensors) - {name for name, _ in _slots(scheduler, history)}
    strange |= {"solver", *history.numbers} ^ set(state.numbers)
    if strange:
        raise ValueError(f"the state does not fit this {kind}: {', '.join(sorted(strange))}")
    for name in history.numbers:
        setattr(scheduler, name, state.numbers[name])
    for name, tensor in state.tensors.items():
        attribute, _, index = name.partition(".")
        value = tensor.to(scheduler.timesteps.device)
        if index:
            getattr(scheduler, attribute)[int(index)] = value
        else:
            setattr(scheduler, attribute, value)
    done = scheduler.step_index
    if history.timesteps and done is not None:
        last = range(done - len(getattr(scheduler, history.timesteps)), done)
        setattr(scheduler, history.timesteps, [scheduler.timesteps[i] if i >= 0 else None for i in last])


def _slots(scheduler: Any, history: History) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Each place for a tensor, by name, and what is in it."""
    for name in history.tensors:
        value = getattr(scheduler, name)
        if isinstance(value, list):
            yield from ((f"{name}.{index}", item) for index, item in enumerate(value))
        else:
            yield name, value
