"""`bench=state`: what saving the denoising state after every step costs the loop that goes on meanwhile.

One rank; the loop, the solver and the writer of a run, over a random transformer. Turns with saving and turns without
follow each other in pairs, whose order alternates, so that a machine that changes its speed changes both. A turn ends
with its last step: what the writer still holds then is waited for outside.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wan_dist.bench.random_transformer import TransformerShape, random_transformer
from wan_dist.config.schema import Config, SamplerConfig
from wan_dist.distributed.mesh import AXES, Axis, build_mesh
from wan_dist.models.text_encoder import MAX_TEXT_TOKENS
from wan_dist.output.record import source_commit
from wan_dist.output.state import DenoisingState, StateWriter
from wan_dist.sampling.denoise import denoise, initial_noise
from wan_dist.sampling.schedule import Step
from wan_dist.sampling.solver_state import solver_state
from wan_dist.sampling.solvers import scheduled

_GUIDANCE, _CHANNELS = 5.0, 16
_SCHEDULER = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
_CASES = ("without", "with")
_STEPS = {"cpu": 100, "cuda": 5}  # of a turn, where sampler.steps is null


@dataclass(frozen=True)
class Turn:
    """One case of one pair. step_s: the median of its steps; total_s: all of them. written: the states that came to the
    disk; state_bytes: of one."""

    step_s: float
    total_s: float
    written: int = 0
    state_bytes: int = 0


@torch.no_grad()
def bench_state(config: Config, device: torch.device) -> None:
    """Print one JSON line a case on stdout, and one table on stderr.

    `ratio` is the median over pairs of a step's seconds with saving over those without, `total_ratio` that of all
    turns' sums. States are written to the folder for temporary files (`TMPDIR`).
    """
    loop = _Loop(config, device)
    turns: dict[str, list[Turn]] = {case: [] for case in _CASES}
    with tempfile.TemporaryDirectory(prefix="wan_dist-state-") as folder:
        loop.turn(None)  # the first turn also computes what later ones remember
        for pair in range(config.bench.repeats):
            for case in _CASES if pair % 2 == 0 else reversed(_CASES):
                turns[case].append(loop.turn(Path(folder) / "state.safetensors" if case == "with" else None))
    _report(loop, turns)


class _Loop:
    """The loop of one request, again and again."""

    def __init__(self, config: Config, device: torch.device) -> None:
        bench, self.device = config.bench, device
        assert bench.frames and bench.rows and bench.columns, "resolved before"
        self.steps, self.guidance = config.sampler.steps or _STEPS[device.type], bench.guidance
        self.dtype = getattr(torch, str(config.runtime.dtype))
        self.shape = TransformerShape(**{name: getattr(bench, name) for name in TransformerShape.__dataclass_fields__})
        mesh = build_mesh(dict.fromkeys(AXES, 1), device.type)
        attention = config.runtime.attention
        self.model = random_transformer(self.shape, dtype=self.dtype, device=device, mesh=mesh, attention=attention)
        self.latents = initial_noise((1, _CHANNELS, bench.frames, bench.rows, bench.columns), 0).to(device)
        text = (1, MAX_TEXT_TOKENS, self.shape.text_dim)
        self.text = [initial_noise(text, 1 + branch).to(device, self.dtype) for branch in range(2)]
        self.sampler = SamplerConfig(
            steps=self.steps,
            solver="unipc",
            flow_shift=3.0,
            guidance_scale=_GUIDANCE if self.guidance else 1.0,
            guidance_scale_2=1.0,
        )

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "bench": "state",
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            **asdict(self.shape),
            "latents": list(self.latents.shape),
            "forwards_per_step": 2 if self.guidance else 1,
            "steps": self.steps,
            "torch": torch.__version__,
            "commit": source_commit(),
        }

    def turn(self, file: Path | None) -> Turn:
        """All steps, their states saved to `file`, if there is one."""
        scheduler, schedule = scheduled(self.sampler, _SCHEDULER, self.device)
        writer = None if file is None else StateWriter(file, {})
        step_seconds: list[float] = []
        last = start = time.perf_counter()

        def on_step(step: Step, latents: torch.Tensor) -> None:
            nonlocal last
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            step_seconds.append(time.perf_counter() - last)
            last = time.perf_counter()
            if writer is not None:
                solver = solver_state(scheduler)
                numbers = {"solver": solver.numbers, "step_seconds": list(step_seconds)}
                done, tensors = step.index + 1, solver.tensors
                writer.submit(
                    DenoisingState(steps_done=done, steps=self.steps, latents=latents, tensors=tensors, numbers=numbers)
                )

        denoise(self.latents, schedule, scheduler, self._predict, Axis("cfg"), on_step)
        measured = Turn(statistics.median(step_seconds), time.perf_counter() - start)
        if writer is not None and file is not None:
            writer.close(raise_errors=True)
            measured = replace(measured, written=writer.written, state_bytes=file.stat().st_size)
        return measured

    def _predict(
        self, latents: torch.Tensor, timestep: torch.Tensor, _step: Step, branches: Sequence[int]
    ) -> list[torch.Tensor]:
        latents = latents.to(self.dtype)
        return [self.model(latents, timestep, self.text[branch], return_dict=False)[0] for branch in branches]


def _report(loop: _Loop, turns: dict[str, list[Turn]]) -> None:
    """One JSON line a case on stdout, and one table on stderr."""
    without, saving = (turns[case] for case in _CASES)
    ratio = statistics.median(b.step_s / a.step_s for a, b in zip(without, saving, strict=True))
    total_ratio = sum(turn.total_s for turn in saving) / sum(turn.total_s for turn in without)
    rows = ["| states saved | ms a step | over without | of all turns | written of 100 |", "|---|---|---|---|---|"]
    for case, of_case in turns.items():
        step_s = statistics.median(turn.step_s for turn in of_case)
        ratios = {"ratio": ratio, "total_ratio": total_ratio} if case == "with" else {"ratio": 1.0, "total_ratio": 1.0}
        written = sum(turn.written for turn in of_case) / (loop.steps * len(of_case))
        line = {"case": case, **loop.facts, "median_s": step_s, **ratios, "written": written}
        print(json.dumps({**line, "turns": [asdict(turn) for turn in of_case]}))
        figures = f"{1e3 * step_s:.2f} | {ratios['ratio']:.3f} | {ratios['total_ratio']:.3f} | {100 * written:.0f}"
        rows.append(f"| {case} | {figures} |")
    print("\n".join(rows), file=sys.stderr, flush=True)
    sys.stdout.flush()
