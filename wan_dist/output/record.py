"""The run record: what ran, on what, how long each part took and what it cost. One JSON file beside the outputs."""

import json
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from wan_dist import __version__
from wan_dist.config.schema import Config
from wan_dist.log import logger
from wan_dist.output.files import atomic
from wan_dist.output.memory import PeakHostMemory
from wan_dist.output.pulse import Pulse
from wan_dist.topology import RankEnv

_LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "hydra-core", "omegaconf", "av")


class _MarkedCounter(Counter[str]):
    """A counter of which each count is a sign of progress."""

    def __init__(self, mark: Callable[[], None]) -> None:
        super().__init__()
        self._mark = mark

    def __setitem__(self, key: str, value: int) -> None:
        super().__setitem__(key, value)
        self._mark()


class RankReport:
    """What one rank measures of itself while it runs. pulse: tells others that it goes on."""

    def __init__(self, env: RankEnv, device: torch.device, pulse: Pulse | None = None) -> None:
        self.pulse = pulse if pulse is not None else Pulse(None, env.rank)
        self._env = env
        self.device = device
        self._memory = PeakHostMemory()
        self.phase = "start"
        self.started = time.time()
        self.plan: Any = None  # where components live, once it is made
        self.phases: dict[str, float] = {}
        self.steps: list[float] = []
        self.bytes_read: Counter[str] = _MarkedCounter(self.mark)
        self._step = self._of = 0

    def mark(self) -> None:
        """A sign of progress."""
        self.pulse.mark(self.phase, self._step, self._of)

    def mark_step(self, done: int, of: int) -> None:
        """The same, within a phase that counts."""
        self._step, self._of = done, of
        self.mark()

    @property
    def place(self) -> str:
        """`step 8 of 20` while the eighth is taken; empty outside the loop."""
        return f"step {self._step + 1} of {self._of}" if self._of and self._step < self._of else ""

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of a block to `phases[phase]`; the device's work is included."""
        self.phase = phase
        self.mark()
        if phase not in self.phases:  # decoding and writing take turns
            logger.info("phase %s", phase)
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - start
        self.mark()

    def peak_bytes(self) -> int:
        """The most that was allocated so far: on the GPU, or of host memory over what imports took."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return self._memory.sample() - self._memory.base

    def as_dict(self, traffic: Counter[str]) -> dict[str, Any]:
        """This rank's entry of the record's `ranks`."""
        on_gpu = self.device.type == "cuda"
        return {
            "rank": self._env.rank,
            "host": self._env.host,
            "device": torch.cuda.get_device_name(self.device) if on_gpu else "cpu",
            "peak_device_bytes": torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
            "peak_host_bytes": self._memory.sample(),
            "base_host_bytes": self._memory.base,
            "bytes_read": dict(self.bytes_read),
            "bytes_sent": dict(traffic),
        }


def source_commit() -> str | None:
    """The git commit of the checkout this package runs from (`-dirty` behind it where files differ from it), or None
    where it is installed from a wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=10).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit + "-dirty" * bool(changes) if commit else None


def library_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _LIBRARIES}}


def write_record(
    target: Path,
    config: Config,
    *,
    fingerprint: str,
    plan: list[dict[str, str]],
    report: RankReport,
    outputs: dict[str, str],
    ranks: list[dict[str, Any]],
) -> None:
    """Write `NAME.json`; its keys are part of the contract with users."""
    sampler, video = config.sampler, config.video
    record = {
        "version": __version__,
        "commit": source_commit(),
        "config": asdict(config),
        "request": {
            "prompt": config.prompt,
            "negative_prompt": config.negative_prompt or "",
            "image": config.image,
            "last_image": config.last_image,
            "latents": config.latents,
            "name": config.output.name,
            **asdict(sampler),
            **asdict(video),
        },
        "mesh": {axis: getattr(config.parallelism, axis) for axis in ("dp", "cfg", "ring", "ulysses", "tp")},
        "checkpoint": {"path": config.model.path, "fingerprint": fingerprint},
        "libraries": library_versions(),
        "attention": config.runtime.attention,
        "plan": plan,
        "phases": report.phases,
        "steps": report.steps,
        "outputs": outputs,
        "ranks": ranks,
    }
    with atomic(target) as scratch:
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        scratch.write_bytes(
            text.encode("utf-8", "backslashreplace")
        )  # a path need not be UTF-8; JSON has \udcXX for it
