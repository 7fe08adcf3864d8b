"""`bench=vae`: decoding and encoding over the ranks of the mesh, against one rank and against diffusers' own VAE.

Three cases take turns in the same processes: `diffusers` (its VAE, on rank 0), `one_rank` (ours, on rank 0) and `mesh`
(ours, rows split over all ranks). Each turn makes its VAE anew, so that a rank's peak holds the one at work: ours
without the encoder where it decodes, as in a run that is given no image.
"""

import collections
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from wan_dist.config.schema import Config
from wan_dist.distributed.collectives import barrier, gather_objects
from wan_dist.distributed.mesh import AXES, Axis, Mesh, build_mesh
from wan_dist.distributed.process_group import process_group
from wan_dist.layers.memory_format import wants_channels_last
from wan_dist.loading.checkpoint import open_checkpoint
from wan_dist.loading.components import match_vae
from wan_dist.loading.weights import fill, on_every_rank, serve_in
from wan_dist.models.random_weights import randomise
from wan_dist.models.wan_latents import decode_frames
from wan_dist.models.wan_vae import meta_vae, parallelize_vae
from wan_dist.output.memory import PeakHostMemory, anonymous_bytes, return_free_memory
from wan_dist.output.record import source_commit
from wan_dist.topology import RankEnv

_WORK, _SERIAL = ("decode", "encode"), ("diffusers", "one_rank")


@dataclass(frozen=True)
class Measured:
    """One decode or encode on one rank. Peaks are over what there was before the VAE was made; peak_device_bytes is
    None on a CPU."""

    seconds: float
    peak_host_bytes: int
    peak_device_bytes: int | None
    bytes_sent: int


Work = Callable[[], Any]
# case -> work -> turns -> ranks (None for those that took no part)
Turns = dict[str, dict[str, list[list[Measured | None]]]]


@torch.no_grad()
def bench_vae(config: Config, env: RankEnv, device: torch.device) -> None:
    """Print one JSON line a case and work on rank 0's stdout, and one table on its stderr.

    `seconds` are the slowest rank's, a median over turns; `over_diffusers` and `over_one_rank` are ratios of them.
    """
    degrees = {axis: getattr(config.parallelism, axis) for axis in AXES}
    with process_group(env, degrees, device, config.runtime.timeout_s) as mesh:
        bench = _Bench(config, mesh, device)
        cases = {"diffusers": bench.theirs, "one_rank": bench.alone}
        cases |= {"mesh": bench.split} if config.parallelism.vae == "on" and env.world_size > 1 else {}
        turns: Turns = {case: {work: [] for work in _WORK} for case in cases}
        for turn in range(config.bench.repeats + (device.type == "cuda")):  # a GPU chooses kernels in the first one
            for case, take_turn in cases.items():
                barrier(mesh.world)
                measured = take_turn() if case == "mesh" or mesh.world.rank == 0 else None
                for work in _WORK:
                    of_ranks = gather_objects(mesh.world, measured and measured[work])
                    if turn > 0 or device.type != "cuda":
                        turns[case][work].append(of_ranks)
        facts = bench.facts()
        del bench, mesh, cases
    if env.rank == 0:
        _report(facts, turns)


class _Bench:
    """The three cases over one config; each returns what its decode and its encode took on this rank."""

    def __init__(self, config: Config, mesh: Mesh, device: torch.device) -> None:
        self.config, self.mesh, self.device = config, mesh, device
        self.dtype = getattr(torch, config.runtime.vae_dtype)
        self.channels_last = wants_channels_last(config.runtime.vae_channels_last, device)
        shape = config.bench
        assert shape.frames and shape.rows and shape.columns, "resolved before"
        self.latent_size = shape.frames, shape.rows, shape.columns
        self.checkpoint = None
        if config.model.path is not None:
            self.checkpoint = on_every_rank(mesh.world, lambda: open_checkpoint(Path(str(config.model.path))))
        self.vae_config = self.checkpoint.configs["vae"] if self.checkpoint else {}

    def facts(self) -> dict[str, Any]:
        frames, rows, columns = self.latent_size
        return {
            "bench": "vae",
            "model": self.config.model.path or "random, Wan2.1",
            "latents": [frames, rows, columns],
            "ranks": self.mesh.world.size,
            "device": self.device.type,
            "dtype": self.config.runtime.vae_dtype,
            "channels_last": self.channels_last,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": source_commit(),
        }

    def theirs(self) -> dict[str, Measured]:
        def make(name: str) -> Work:
            vae = self._vae(encoder=True)
            if name == "decode":
                latents = self._latents()
                return lambda: vae.decode(latents)
            video = self._pixels(0, self.video_size[1])
            return lambda: vae.encode(video).latent_dist.mode()

        return self._measure(make, Axis("alone"))

    def alone(self) -> dict[str, Measured]:
        return self._ours(build_mesh(dict.fromkeys(AXES, 1), self.device.type))

    def split(self) -> dict[str, Measured]:
        return self._ours(self.mesh)

    def _ours(self, mesh: Mesh) -> dict[str, Measured]:
        def make(name: str) -> Work:
            vae = parallelize_vae(self._vae(encoder=name == "encode"), mesh, channels_last=self.channels_last)
            if name == "decode":
                latents = self._latents()
                return lambda: collections.deque(decode_frames(vae, latents), maxlen=0)
            frames, rows, _ = self.video_size
            return lambda: vae.encode(frames, rows, self._pixels)

        return self._measure(make, mesh.world)

    def _vae(self, *, encoder: bool) -> AutoencoderKLWan:
        if self.checkpoint is not None:
            vae: Any = fill(match_vae(self.checkpoint, dtype=self.dtype, encoder=encoder), device=self.device)
            return vae
        made = meta_vae({}, encoder=encoder)  # the class's defaults are Wan2.1's
        serve_in(made, self.dtype)
        made.to_empty(device=self.device)
        randomise(made, 0)
        return made

    @property
    def video_size(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels."""
        stride_t = self.vae_config.get("scale_factor_temporal", 4)
        stride_s = self.vae_config.get("scale_factor_spatial", 8)
        frames, rows, columns = self.latent_size
        return (frames - 1) * stride_t + 1, rows * stride_s, columns * stride_s

    def _latents(self) -> torch.Tensor:
        """Random, `[1, z, T, H, W]`, the same on every rank."""
        shape = 1, self.vae_config.get("z_dim", 16), *self.latent_size
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype)

    def _pixels(self, begin: int, end: int) -> torch.Tensor:
        """Random rows of a video, `[1, 3, T', end - begin, W']`; what they show does not matter here."""
        frames, _, columns = self.video_size
        noise = torch.rand(1, 3, frames, end - begin, columns, generator=torch.Generator().manual_seed(begin))
        return noise.mul_(2).sub_(1).to(self.device, self.dtype)

    def _measure(self, make: Callable[[str], Work], together: Axis) -> dict[str, Measured]:
        """make: from a name of `_WORK` to what does it, the VAE made. together: the ranks that work, which begin when
        the last of them has made its VAE."""
        on_gpu = self.device.type == "cuda"
        measured = {}
        for name in _WORK:
            gc.collect()
            return_free_memory()  # of what was before: reused, it would not count
            base, base_on_gpu = anonymous_bytes(), torch.cuda.memory_allocated(self.device) if on_gpu else 0
            work = make(name)
            if on_gpu:
                torch.cuda.synchronize(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
            return_free_memory()
            barrier(together)
            memory, sent = PeakHostMemory(), self.mesh.traffic.total()
            start = time.perf_counter()
            work()
            if on_gpu:
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - start
            peak_on_gpu = torch.cuda.max_memory_allocated(self.device) - base_on_gpu if on_gpu else None
            sent = self.mesh.traffic.total() - sent
            measured[name] = Measured(seconds, memory.stop() - base, peak_on_gpu, sent)
            del work
        return measured


def _report(facts: dict[str, Any], turns: Turns) -> None:
    """One JSON line a case and work on stdout, and one table on stderr."""
    rows = [
        "| work | case | ranks | seconds | over diffusers | over one rank | peak host GB a rank | sent MB a rank |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for work in _WORK:
        all_s = {
            case: [max(m.seconds for m in ranks if m is not None) for ranks in by_work[work]]
            for case, by_work in turns.items()
        }
        medians = {case: statistics.median(seconds) for case, seconds in all_s.items()}
        for case, by_work in turns.items():
            ranks = [m for m in by_work[work][-1] if m is not None]
            ratios = {f"over_{other}": medians[case] / medians[other] for other in _SERIAL}
            line = {"case": case, "work": work, **facts, "median_s": medians[case], **ratios, "all_s": all_s[case]}
            print(json.dumps({**line, "by_rank": [asdict(measured) for measured in ranks]}))
            peak, sent = max(m.peak_host_bytes for m in ranks) / 1e9, max(m.bytes_sent for m in ranks) / 1e6
            figures = [
                f"{medians[case]:.2f}",
                *(f"{ratio:.2f}" for ratio in ratios.values()),
                f"{peak:.2f}",
                f"{sent:.1f}",
            ]
            rows.append(f"| {work} | {case} | {len(ranks)} | {' | '.join(figures)} |")
    print("\n".join(rows), file=sys.stderr, flush=True)
    sys.stdout.flush()
