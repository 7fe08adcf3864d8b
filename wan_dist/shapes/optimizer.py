"""How weights are changed: Muon for matrices and convolution kernels, AdamW for the rest, rates, and a running mean.

Muon: K. Jordan, https://kellerjordan.github.io/posts/muon; its step is scaled as in "Muon is Scalable for LLM
Training", https://arxiv.org/pdf/2502.16982. `torch.optim.Muon` is the same for matrices alone, one by one.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from wan_dist.shapes.precision import fast_numbers

_LARGEST_GRADIENT = 1.0  # norm over all parameters
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal. Parameters of two or more dimensions, each read as `[first, all others]`; those of one
    shape are worked on together. weight_decay is decoupled; a step's root mean square is about `0.2 lr`."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step from the gradients that are there."""
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[weight.shape[0], weight[0].numel()].append(weight)
            for shape, weights in alike.items():
                pushed = torch.stack([self._push(weight, group["momentum"]).reshape(shape) for weight in weights])
                changes = orthogonal(pushed) * (0.2 * math.sqrt(max(shape)))
                for weight, change in zip(weights, changes, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.sub_(change.view(weight.shape), alpha=group["lr"])

    def _push(self, weight: nn.Parameter, momentum: float) -> torch.Tensor:
        """The gradient with Nesterov momentum."""
        assert weight.grad is not None
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight.grad)
        state["momentum"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(state["momentum"], momentum)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """`[n, rows, columns]` -> the same with all singular values near 1 (0.7 to 1.2), by Newton-Schulz iteration."""
    a, b, c = _QUINTIC
    upright = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if upright else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if upright else x


@dataclass(frozen=True)
class Rates:
    """The rates at their highest, the decay of weights under Muon and AdamW, and the decay of the running mean."""

    muon: float
    adamw: float
    muon_decay: float
    adamw_decay: float
    mean_decay: float
    mean_delay: int  # in the first steps the mean forgets faster: a 1 - 1/delay part of it is kept


class Trained:
    """A module in training: its weights, their running mean `mean` (a module of its own), its optimizers, and the
    number of steps that have been taken."""

    def __init__(self, module: nn.Module, rates: Rates, is_matrix: Callable[[str, nn.Parameter], bool]) -> None:
        """is_matrix: from a parameter's name and itself, whether Muon is to change it."""
        self.module, self.rates, self.steps_done = module, rates, 0
        self.mean = copy.deepcopy(module).eval().requires_grad_(False)
        matrices = [weight for name, weight in module.named_parameters() if is_matrix(name, weight)]
        others = [weight for name, weight in module.named_parameters() if not is_matrix(name, weight)]
        self._muon = Muon(matrices, lr=rates.muon, weight_decay=rates.muon_decay)
        self._adamw = torch.optim.AdamW(
            others, lr=rates.adamw, betas=(0.9, 0.98), weight_decay=rates.adamw_decay, fused=True
        )

    def step(self, loss: torch.Tensor, share: float) -> float:
        """Change the weights, and their mean. share: of the highest rates. Returns the loss."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), _LARGEST_GRADIENT)
        for optimizer, rate in ((self._muon, self.rates.muon), (self._adamw, self.rates.adamw)):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            with fast_numbers(loss.device):
                optimizer.step()
            optimizer.zero_grad()
        self.steps_done += 1
        kept = min(self.rates.mean_decay, self.steps_done / (self.steps_done + self.rates.mean_delay))
        get_ema_multi_avg_fn(kept)(list(self.mean.parameters()), list(self.module.parameters()), self.steps_done)
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but for its data."""
        parts = {"module": self.module, "mean": self.mean, "muon": self._muon, "adamw": self._adamw}
        return {"steps_done": self.steps_done, **{name: part.state_dict() for name, part in parts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The opposite of `state_dict`."""
        self.steps_done = state["steps_done"]
        self.module.load_state_dict(state["module"])
        self.mean.load_state_dict(state["mean"])
        self._muon.load_state_dict(state["muon"])
        self._adamw.load_state_dict(state["adamw"])


def warm_up(step: int, steps: int) -> float:
    """Up to 1 over the first 100 steps, or the first quarter where there are fewer than 400."""
    return min(1.0, (step + 1) / max(1, min(100, steps // 4)))


def cosine(progress: float, last: float, hold: float = 0.0) -> float:
    """1 until `hold`, then down to `last`, for a progress of 0 to 1."""
    along = max(0.0, progress - hold) / (1 - hold)
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * along))
