"""`bench=meaning`: whether the videos of `wan_shapes` show what their prompts say, on one rank and on the mesh.

Random scenes, each with a seed of its own, generated as a run generates them and read from their frames alone. Where
there is a mesh, each scene is made on it and on the first rank alone: how often each is right, how far apart they are.
"""

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wan_dist.config.schema import Config
from wan_dist.distributed.mesh import AXES
from wan_dist.output.names import output_path, run_folder
from wan_dist.output.record import RankReport, source_commit
from wan_dist.pipeline.generate import generate
from wan_dist.shapes.meaning import QUESTIONS, describe
from wan_dist.shapes.vocabulary import Scene, random_scene
from wan_dist.topology import RankEnv

_NAME = "scene"
_ANSWERS = (*QUESTIONS, "present")


@dataclass(frozen=True)
class Video:
    """One scene's. latents: fp32 `[1, z, T, H, W]`; frames: uint8 `[T, H, W, 3]`."""

    scene: Scene
    seconds: float
    latents: torch.Tensor
    frames: torch.Tensor

    @property
    def answers(self) -> dict[str, bool]:
        return describe(self.frames.numpy()).answers(self.scene)


def bench_meaning(config: Config, env: RankEnv, device: torch.device) -> None:
    """Print one JSON line a case on stdout, and one table on stderr, on rank 0.

    Scenes and their seeds follow from `sampler.seed`. `largest_difference` is over all scenes, of final latents and of
    frames (in levels of 8 bits).
    """
    base = config.sampler.seed or 0
    rng = random.Random(base)
    scenes = [random_scene(rng) for _ in range(config.bench.scenes)]
    alone_env = replace(env, rank=0, local_rank=0, world_size=1, local_world_size=1, nodes=1)
    cases: dict[str, tuple[Config, RankEnv]] = {"one_rank": (_alone(config), alone_env)}
    if env.world_size > 1:
        cases["mesh"] = (config, env)
    videos: dict[str, list[Video]] = {case: [] for case in cases}
    with _quiet(), tempfile.TemporaryDirectory(prefix="wan_dist-meaning-") as folder:
        makers = {
            case: _maker(case_config, case_env, device, Path(folder) / case)
            for case, (case_config, case_env) in cases.items()
            if case == "mesh" or env.rank == 0
        }
        for number, scene in enumerate(scenes):
            for case, make in makers.items():
                video = make(scene, base + number, number)
                if video is not None:
                    videos[case].append(video)
    if env.rank == 0:
        _report(config, env, videos)


def _alone(config: Config) -> Config:
    """The same on one rank."""
    alone = deepcopy(config)
    for axis in AXES:
        setattr(alone.parallelism, axis, 1)
    alone.parallelism.fsdp.enabled, alone.parallelism.fsdp.replicate = "off", 1
    alone.parallelism.vae = "off"
    return alone


Maker = Callable[[Scene, int, int], Video | None]


def _maker(config: Config, env: RankEnv, device: torch.device, folder: Path) -> Maker:
    """A function of a scene, a seed and a number; what it makes is on the first rank alone."""
    report = RankReport(env, device)  # one for all: each samples memory in a thread of its own

    def make(scene: Scene, seed: int, number: int) -> Video | None:
        request = deepcopy(config)
        request.task, request.prompt, request.sampler.seed = "generate", scene.prompt, seed
        request.output.dir, request.output.name = str(folder), _NAME
        request.output.formats = ["latents", "frames"]
        run_folder(folder, _NAME).mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        # Each generation has a process group of its own, which must not meet the keys of the one before.
        generate(request, replace(env, run_id=f"{env.run_id}/{number}"), device, report)
        seconds = time.perf_counter() - start
        if env.rank != 0:
            return None
        return Video(scene, seconds, *(_read(folder, kind) for kind in ("latents", "frames")))

    return make


def _read(folder: Path, kind: str) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(output_path(folder, _NAME, kind))[kind]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress of every generation."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # noqa: PTH123
        yield


def _report(config: Config, env: RankEnv, videos: dict[str, list[Video]]) -> None:
    rows = [f"| case | ranks | {' | '.join(_ANSWERS)} | all of them | s a video |", "|---" * (len(_ANSWERS) + 4) + "|"]
    for case, made in videos.items():
        answers = [video.answers for video in made]
        shares = {question: _share([answer[question] for answer in answers]) for question in _ANSWERS}
        everything = _share([all(answer.values()) for answer in answers])
        seconds = statistics.median(video.seconds for video in made)
        line = {"case": case, **_facts(config, env, case), **shares, "all": everything, "median_s": seconds}
        line["shape_by_shape"] = {
            shape: _share([a["shape"] for a, video in zip(answers, made, strict=True) if video.scene.shape == shape])
            for shape in sorted({video.scene.shape for video in made})
        }
        line["missed"] = [
            {"prompt": video.scene.prompt, "wrong": [question for question, good in answer.items() if not good]}
            for video, answer in zip(made, answers, strict=True)
            if not all(answer.values())
        ]
        if case == "mesh":
            line["largest_difference"] = _differences(videos["one_rank"], made)
        print(json.dumps(line))
        shown = " | ".join(f"{share:.3f}" for share in (*shares.values(), everything))
        rows.append(f"| {case} | {line['ranks']} | {shown} | {seconds:.2f} |")
    if "mesh" in videos:
        apart = _differences(videos["one_rank"], videos["mesh"])
        rows.append(f"\nlargest difference: latents {apart['latents']:.1e}, frames {apart['frames']} of 255")
    print("\n".join(rows), file=sys.stderr, flush=True)
    sys.stdout.flush()


def _facts(config: Config, env: RankEnv, case: str) -> dict[str, Any]:
    alone = case == "one_rank"
    video = config.video
    return {
        "bench": "meaning",
        "model": config.model.path,
        "device": config.runtime.device,
        "dtype": config.runtime.dtype,
        "ranks": 1 if alone else env.world_size,
        "mesh": {axis: 1 if alone else getattr(config.parallelism, axis) for axis in AXES},
        "scenes": config.bench.scenes,
        "seed": config.sampler.seed,
        "steps": config.sampler.steps,
        "guidance_scale": config.sampler.guidance_scale,
        "video": f"{video.height}x{video.width}x{video.num_frames}",
        "torch": torch.__version__,
        "commit": source_commit(),
    }


def _differences(ours: list[Video], theirs: list[Video]) -> dict[str, float]:
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "latents": max(float((a.latents - b.latents).abs().max()) for a, b in pairs),
        "frames": max(int((a.frames.int() - b.frames.int()).abs().max()) for a, b in pairs),
    }


def _share(answers: list[bool]) -> float:
    return round(sum(answers) / len(answers), 4)
