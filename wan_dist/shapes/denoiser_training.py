"""The second stage of training `wan_shapes`: its transformer and its text encoder together, by flow matching.

`x = (1 - sigma) x0 + sigma noise`; the model is to say `noise - x0`. What step k draws depends on the seed and k alone.
Shapes: B clips, C latent channels, t latent frames, h x w latent pixels.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from wan_dist.shapes.architecture import (
    FLOW_SHIFT,
    build_autoencoder,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
)
from wan_dist.shapes.autoencoder_training import laid_out
from wan_dist.shapes.captions import training_caption
from wan_dist.shapes.checkpoint import Parts
from wan_dist.shapes.clips import Clip
from wan_dist.shapes.evaluation import share_drawn_as_asked
from wan_dist.shapes.latents import LatentRing
from wan_dist.shapes.optimizer import Rates, Trained, cosine, warm_up
from wan_dist.shapes.pad_token import encode_text, install_one_pad_token
from wan_dist.shapes.precision import fast_attention, fast_numbers

_SQUARE, _WIDE, _TALL = (64, 64), (64, 96), (96, 64)  # height, width in pixels
_REFILL_EVERY = 4  # steps, with a quarter of a batch; every eighth time with wide or tall clips
_TEXT_TOKENS = 512  # to which `WanPipeline` pads
_OTHER_PADDING = 0.2  # the share of steps that see another number of pad tokens
_RATES = Rates(muon=3e-3, adamw=2e-3, muon_decay=0.02, adamw_decay=0.0, mean_decay=0.9985, mean_delay=19)
_FINETUNE_RATES = replace(_RATES, muon=1.3e-3, adamw=9e-4)


@dataclass(frozen=True)
class DenoiserRecipe:
    """Steps; short square clips in a batch (3/4 of them where clips are long, 1/2 where they are wide or tall); square
    clips that are kept encoded (and 1/8 of them wide, as many tall)."""

    steps: int = 5200
    clips: int = 64
    kept: int = 2048

    def scaled(self, fraction: float, batch: float) -> "DenoiserRecipe":
        """A part of the steps and the clips that are kept, and of the batch."""
        kept = max(16, round(self.kept * fraction))
        return replace(
            self, steps=max(1, round(self.steps * fraction)), clips=max(1, round(self.clips * batch)), kept=kept
        )


class DenoiserTraining:
    """Transformer and text encoder between two steps."""

    name = "denoiser"

    def __init__(
        self,
        recipe: DenoiserRecipe,
        seed: int,
        device: torch.device,
        autoencoder: dict[str, torch.Tensor],
        finetune: bool = False,
    ) -> None:
        """autoencoder: weights of the first stage. finetune: at lower rates, for `begin_with`."""
        self.recipe, self.seed, self.device, self.steps = recipe, seed, device, recipe.steps
        self.tokenizer = build_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = nn.ModuleDict({"transformer": build_transformer(), "text_encoder": build_text_encoder()}).to(device)
        self.trained = Trained(model, _FINETUNE_RATES if finetune else _RATES, _is_matrix)
        transformer = model["transformer"]
        self._pads = install_one_pad_token(transformer)
        # Under autocast too the sum over blocks is in fp32.
        transformer.patch_embedding.register_forward_hook(lambda _module, _inputs, output: output.float())
        self._statistics: tuple[list[float], list[float]] | None = None
        self._vae = laid_out(build_autoencoder(), device).eval().requires_grad_(False)
        self._vae.load_state_dict(autoencoder)
        kept = {size: recipe.kept if size == _SQUARE else max(1, recipe.kept // 8) for size in (_SQUARE, _WIDE, _TALL)}
        self._rings = {size: LatentRing(self._vae, seed, *size, capacity) for size, capacity in kept.items()}

    def begin_with(self, parts: Parts) -> None:
        """Take a checkpoint's denoiser in place of the new one, before the first step; its VAE is the first stage's."""
        for model in (self.trained.module, self.trained.mean):
            assert isinstance(model, nn.ModuleDict)
            model["transformer"].load_state_dict(parts.transformer.state_dict())
            model["text_encoder"].load_state_dict(parts.text_encoder.state_dict())
        # Its transformer knows latents that are normalised by these.
        self._statistics = (list(parts.vae.config.latents_mean), list(parts.vae.config.latents_std))

    def prepare(self, pause: Callable[[], None]) -> None:
        """Encode the first clips, if that has not been done; pause: called meanwhile, may raise."""
        for ring in self._rings.values():
            ring.fill(pause)
        if self._statistics is None:
            self._statistics = self._rings[_SQUARE].statistics()

    def train_step(self) -> float:
        """Take the next step; returns its loss."""
        step, model = self.trained.steps_done, self.trained.module
        rng = random.Random(f"denoiser {self.seed} {step}")
        generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + step)
        if step and step % _REFILL_EVERY == 0:
            others = step % (8 * _REFILL_EVERY) == 0
            ring = self._rings[rng.choice((_WIDE, _TALL)) if others else _SQUARE]
            ring.add(max(1, self.recipe.clips // _REFILL_EVERY))
        clips, clean = self._batch(step / self.steps, rng, generator)
        sigma, timestep = (part.to(self.device) for part in _noise_levels(len(clips), generator))
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        noisy = clean + sigma.view(-1, 1, 1, 1, 1) * (noise - clean)
        words = self.tokenizer([training_caption(clip, rng) for clip in clips], padding=True, return_tensors="pt")
        self._pads.stands_for = _padding(rng, words.input_ids.shape[1])
        with fast_numbers(self.device), fast_attention(self.device):
            text = encode_text(
                model["text_encoder"], *(words[key].to(self.device) for key in ("input_ids", "attention_mask"))
            )
            said = model["transformer"](noisy, timestep, text, return_dict=False)[0]
        loss = (said.float() - (noise - clean)).square().mean()
        return self.trained.step(loss, warm_up(step, self.steps) * cosine(step / self.steps, last=0.02, hold=0.3))

    def _batch(
        self, progress: float, rng: random.Random, generator: torch.Generator
    ) -> tuple[list[Clip], torch.Tensor]:
        """Clips of one size, and samples of their normalised latents, fp32 `[B, C, t, h, w]`. In the first quarter most
        are short and square."""
        assert self._statistics is not None, "prepare() comes first"
        short = 0.75 if progress < 0.25 else 0.42
        kind, size, count = rng.random(), _SQUARE, self.recipe.clips
        if kind < short:
            frames = 3
        elif kind < 0.84:
            frames, count = 5 if kind < 0.8 else 4, count * 3 // 4
        else:
            size, frames, count = rng.choice((_WIDE, _TALL)), rng.choice((3, 5)), count // 2
        clips, mean, std = self._rings[size].draw(max(1, count), rng)
        sample = mean + std * torch.randn(mean.shape, generator=generator).to(self.device)
        centre, scale = (torch.tensor(part, device=self.device).view(1, -1, 1, 1, 1) for part in self._statistics)
        return clips, ((sample - centre) / scale)[:, :, :frames]

    def parts(self) -> Parts:
        """What a checkpoint consists of, with the mean weights."""
        assert self._statistics is not None, "prepare() comes first"
        mean = self.trained.mean
        assert isinstance(mean, nn.ModuleDict)
        vae = build_autoencoder(*self._statistics)
        vae.load_state_dict(self._vae.state_dict())
        vae = vae.to(self.device).eval().requires_grad_(False)
        return Parts(self.tokenizer, mean["text_encoder"], mean["transformer"], vae)

    def evaluate(self, count: int, pause: Callable[[], None]) -> dict[str, float]:
        """Of `count` scenes, the shares that `share_drawn_as_asked` tells; pause: called meanwhile, may raise."""
        return share_drawn_as_asked(self.parts(), count, pause)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, the autoencoder included."""
        return {
            "trained": self.trained.state_dict(),
            "autoencoder": self._vae.state_dict(),
            "statistics": self._statistics,
            "rings": {"x".join(map(str, size)): ring.state_dict() for size, ring in self._rings.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The opposite of `state_dict`, but for the autoencoder, which the constructor takes."""
        self.trained.load_state_dict(state["trained"])
        self._statistics = state["statistics"]
        for size, ring in self._rings.items():
            ring.load_state_dict(state["rings"]["x".join(map(str, size))])


def _is_matrix(name: str, weight: nn.Parameter) -> bool:
    """What Muon changes: the matrices of the transformer's blocks, and the one that modulates them."""
    return weight.ndim == 2 and name.startswith("transformer.") and ("blocks." in name or "time_proj" in name)


def _noise_levels(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """sigma, fp32 `[B]` in 0..1, and the model's timestep for it, 1..999: half of them uniform, half around the middle,
    shifted as the scheduler's."""
    uniform, middle = torch.rand(count, generator=generator), torch.randn(count, generator=generator).sigmoid()
    drawn = torch.where(torch.rand(count, generator=generator) < 0.5, uniform, middle)
    sigma = FLOW_SHIFT * drawn / (1 + (FLOW_SHIFT - 1) * drawn)
    return sigma, (sigma * 1000).floor().clamp(1, 999)


def _padding(rng: random.Random, tokens: int) -> int:
    """For how many pad tokens one is to stand beside `tokens` others: mostly as many as in the pipeline."""
    if rng.random() >= _OTHER_PADDING:
        return _TEXT_TOKENS - tokens
    return round(math.exp(rng.uniform(math.log(8), math.log(_TEXT_TOKENS - tokens))))
