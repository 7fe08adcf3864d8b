"""`bench=offload`: a step of a random transformer whose blocks are streamed from host memory, against the same model
with resident blocks and under diffusers' group offloading.

One rank. The cases do not take turns: one follows the other, each with a model of its own that is gone before the next
is made, so that a peak is one case's and a device need not hold two. The resident case comes first and again last,
which shows how far the machine's speed drifted between. Every output must be the first one's, bit for bit.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from wan_dist.bench.placed_model import PlacedModel, RandomWeights
from wan_dist.bench.random_transformer import TransformerShape
from wan_dist.config.schema import Config
from wan_dist.distributed.mesh import Axis
from wan_dist.models.text_encoder import MAX_TEXT_TOKENS
from wan_dist.offload.lockstep import in_lockstep
from wan_dist.output.memory import host_to_device_rate, return_device_memory
from wan_dist.output.record import source_commit
from wan_dist.planning.streaming import choose_streaming
from wan_dist.sampling.denoise import guided_prediction, initial_noise
from wan_dist.sampling.schedule import Step

_GROUP_OFFLOAD, _RESIDENT = "group_offload", ("resident", "resident_again")
_GUIDANCE = 5.0


@dataclass(frozen=True)
class Case:
    """prefetch, resident_blocks: None where nothing is streamed. lockstep: both branches of guidance use each visit of
    a block."""

    name: str
    prefetch: int | None = None
    resident_blocks: int | None = None
    lockstep: bool = False

    def passes(self, forwards: int) -> int:
        """How often the blocks come by in a step of so many forwards."""
        return 1 if self.lockstep else forwards

    def copies(self, blocks: int, forwards: int) -> int:
        """Of a step in steady state; none where every streamed block finds a slot of its own."""
        if self.prefetch is None or self.resident_blocks is None:
            return 0
        streamed = blocks - self.resident_blocks
        return streamed * self.passes(forwards) if streamed > self.prefetch + 1 else 0


def cases(blocks: int, *, guidance: bool) -> list[Case]:
    """In the order in which they run. Group offloading comes before any streamed case: the first of those pins the host
    copy, which diffusers would then take as it is instead of pinning its own."""
    found = [Case(_RESIDENT[0]), Case(_GROUP_OFFLOAD)]
    found += [Case(f"prefetch_{depth}", depth, 0, lockstep=True) for depth in (1, 2, 4)]
    shares = {"quarter": blocks // 4, "half": blocks // 2}
    found += [Case(f"prefetch_1_{share}_resident", 1, n, lockstep=True) for share, n in shares.items() if n]
    found += [Case("prefetch_1_serial_guidance", 1, 0)] if guidance else []
    return [*found, Case(_RESIDENT[1])]


@dataclass(frozen=True)
class Measured:
    """One case; what is unknown, or was not reached (`note` says why), is None. all_s: seconds of each counted turn.
    copies, copied_bytes, late: of a step in steady state. peak_device_bytes: with activations; None on a CPU.
    device_weight_bytes, host_bytes: of weights, as held."""

    all_s: tuple[float, ...] = ()
    copies: int | None = None
    copied_bytes: int | None = None
    late: float | None = None
    peak_device_bytes: int | None = None
    device_weight_bytes: int | None = None
    host_bytes: int | None = None
    pinned: bool | None = None
    note: str = ""

    @property
    def median_s(self) -> float | None:
        return statistics.median(self.all_s) if self.all_s else None


@torch.no_grad()
def bench_offload(config: Config, device: torch.device) -> None:
    """Print one JSON line a case on stdout, and one table on stderr.

    Raises RuntimeError if a case's output is not the first one's, or a streamed one's copies are not as many as they
    must be.
    """
    bench = _Bench(config, device)
    measured = {case: bench.measure(case) for case in cases(bench.shape.blocks, guidance=config.bench.guidance)}
    _report(bench, measured)


class _Bench:
    """The weights, the input, and one case after the other over them."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.dtype = getattr(torch, str(config.runtime.dtype))
        self.guidance, self.repeats = config.bench.guidance, config.bench.repeats
        self.forwards = 2 if self.guidance else 1
        names = TransformerShape.__dataclass_fields__
        self.shape = TransformerShape(**{name: getattr(config.bench, name) for name in names})
        self.weights = RandomWeights(self.shape, dtype=self.dtype, device=device, attention=config.runtime.attention)
        self.host_rate = host_to_device_rate(device) if self.on_gpu else None
        frames, rows, columns = (getattr(config.bench, name) for name in ("frames", "rows", "columns"))
        self.tokens = frames * (rows // 2) * (columns // 2)
        self.latents = initial_noise((1, 16, frames, rows, columns), 0).to(device)
        text_shape = 1, MAX_TEXT_TOKENS, self.shape.text_dim
        self.text = [initial_noise(text_shape, 1 + branch).to(device, self.dtype) for branch in range(2)]
        self.expected: torch.Tensor | None = None

    def measure(self, case: Case) -> Measured:
        """A case that the device has no room for is but a note."""
        if case.name == _GROUP_OFFLOAD and find_spec("accelerate") is None:
            return Measured(note="diffusers' group offloading wants accelerate installed")
        try:
            return self._measure(case)
        except torch.OutOfMemoryError as error:
            return Measured(note=f"out of memory: {str(error).splitlines()[0]}")
        finally:
            return_device_memory(self.device)
            if self.on_gpu:
                torch.accelerator.empty_host_cache()  # what diffusers had pinned

    def _measure(self, case: Case) -> Measured:
        placed = self._placed(case)
        step = self._step(placed, case)
        self._turn(step, case)  # fills the ring, and what later turns remember
        before = placed.counts()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        all_s = tuple(self._turn(step, case) for _ in range(self.repeats))
        copies, copied_bytes, late = (after - was for after, was in zip(placed.counts(), before, strict=True))
        wanted = case.copies(self.shape.blocks, self.forwards)
        if copies != wanted * self.repeats:
            raise RuntimeError(
                f"bench=offload: {case.name}: {copies} copies in {self.repeats} steps, not {wanted} each"
            )
        counted = case.name != _GROUP_OFFLOAD  # diffusers counts nothing
        return Measured(
            all_s=all_s,
            copies=wanted if counted else None,
            copied_bytes=copied_bytes // self.repeats if counted else None,
            late=late / self.repeats if counted else None,
            peak_device_bytes=torch.cuda.max_memory_allocated(self.device) if self.on_gpu else None,
            device_weight_bytes=placed.device_bytes,
            host_bytes=placed.host_bytes,
            pinned=placed.pinned,
            note=placed.note,
        )

    def _placed(self, case: Case) -> PlacedModel:
        if case.name == _GROUP_OFFLOAD:
            return self.weights.group_offloaded()
        if case.prefetch is None or case.resident_blocks is None:
            return self.weights.resident()
        return self.weights.streamed(case.prefetch, case.resident_blocks)

    def _step(self, placed: PlacedModel, case: Case) -> Callable[[], torch.Tensor]:
        """One guided (or plain) prediction, as a run makes it."""
        timestep = torch.tensor([500], device=self.device)
        step = Step(0, 500.0, "transformer", _GUIDANCE, self.guidance)

        def predict(
            latents: torch.Tensor, timestep: torch.Tensor, _step: Step, branches: Sequence[int]
        ) -> list[torch.Tensor]:
            forward = partial(placed.model, latents.to(self.dtype), timestep, return_dict=False)
            forwards = [lambda branch=branch: forward(self.text[branch])[0] for branch in branches]
            if placed.stream is None or not case.lockstep:
                return [one() for one in forwards]
            return in_lockstep(placed.stream, forwards)

        return lambda: guided_prediction(predict, self.latents, timestep, step, Axis("cfg"))

    def _turn(self, step: Callable[[], torch.Tensor], case: Case) -> float:
        """Its seconds. Raises RuntimeError if it does not give what the first turn of all gave."""
        start = time.perf_counter()
        output = step()
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        output = output.cpu()
        if self.expected is None:
            self.expected = output
        elif not torch.equal(output.view(torch.int32), self.expected.view(torch.int32)):
            off = (output - self.expected).abs().max()
            raise RuntimeError(f"bench=offload: {case.name}: its output is off by up to {off:.3g}")
        return seconds


def _report(bench: _Bench, measured: dict[Case, Measured]) -> None:
    """One JSON line a case on stdout, and one table on stderr."""
    resident = Measured(tuple(s for case, found in measured.items() if case.name in _RESIDENT for s in found.all_s))
    groups = next(found for case, found in measured.items() if case.name == _GROUP_OFFLOAD)
    lines = []
    for case, found in measured.items():
        line = {
            "case": case.name,
            **_facts(bench),
            "prefetch": case.prefetch,
            "resident_blocks": case.resident_blocks,
            "forwards_per_visit": bench.forwards // case.passes(bench.forwards),
            "median_s": found.median_s,
            "over_resident": _over(found, resident),
            "over_group_offload": _over(found, groups),
            "hidden": _hidden(bench.host_rate, found, resident),
            **_predicted(bench, case, resident.median_s),
            **asdict(found),
        }
        lines.append(line)
        print(json.dumps(line))
    print(table(lines), file=sys.stderr, flush=True)
    sys.stdout.flush()


def _over(above: Measured, below: Measured) -> float | None:
    return above.median_s / below.median_s if above.median_s is not None and below.median_s is not None else None


def _hidden(rate: float | None, found: Measured, resident: Measured) -> float | None:
    """The share of the copying that did not lengthen the step; None where copies do not run beside computing."""
    if rate is None or not found.copied_bytes or found.median_s is None or resident.median_s is None:
        return None
    return min(1.0, max(0.0, 1 - (found.median_s - resident.median_s) / (found.copied_bytes / rate)))


def _predicted(bench: _Bench, case: Case, resident_s: float | None) -> dict[str, Any]:
    """By the planner's arithmetic from the measured rate and the resident step; None where it has none to go by.
    planned_prefetch: what a run would choose."""
    names = ("predicted_s", "predicted_hidden", "planned_prefetch")
    if case.prefetch is None or bench.host_rate is None or resident_s is None:
        return dict.fromkeys(names)
    passes = case.passes(bench.forwards)
    choose = partial(
        choose_streaming,
        bench.weights.block_bytes,
        compute_s=resident_s / bench.shape.blocks / passes,
        bytes_per_s=bench.host_rate,
        resident_blocks=case.resident_blocks,
    )
    ordered = choose(prefetch=case.prefetch)
    values = resident_s + passes * ordered.exposed_s(), ordered.hidden, choose().prefetch
    return dict(zip(names, values, strict=True))


def _facts(bench: _Bench) -> dict[str, Any]:
    return {
        "bench": "offload",
        "device": torch.cuda.get_device_name(bench.device) if bench.on_gpu else "cpu",
        "dtype": str(bench.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        **asdict(bench.shape),
        "tokens": bench.tokens,
        "forwards_per_step": bench.forwards,
        "host_bytes_per_s": bench.host_rate,
        "torch": torch.__version__,
        "commit": source_commit(),
    }


# heading: key, unit, format
_COLUMNS = {
    "case": ("case", 0, ""),
    "s a step": ("median_s", 1, ".3f"),
    "over resident": ("over_resident", 1, ".3f"),
    "over group offloading": ("over_group_offload", 1, ".3f"),
    "predicted s": ("predicted_s", 1, ".3f"),
    "hidden %": ("hidden", 1e-2, ".0f"),
    "predicted %": ("predicted_hidden", 1e-2, ".0f"),
    "copies": ("copies", 1, ".0f"),
    "copied GB": ("copied_bytes", 1e9, ".3f"),
    "late": ("late", 1, ".1f"),
    "peak device GB": ("peak_device_bytes", 1e9, ".2f"),
    "weights there GB": ("device_weight_bytes", 1e9, ".3f"),
    "on the host GB": ("host_bytes", 1e9, ".3f"),
    "pinned": ("pinned", 0, ""),
    "note": ("note", 0, ""),
}


def table(lines: list[dict[str, Any]]) -> str:
    """The lines as one Markdown table; what is null is a dash."""

    def shown(value: Any, unit: float, form: str) -> str:
        if value is None:
            return "-"
        return f"{value / unit:{form}}" if unit else str(value)

    rows = [list(_COLUMNS), ["---"] * len(_COLUMNS)]
    rows += [[shown(line[key], unit, form) for key, unit, form in _COLUMNS.values()] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
