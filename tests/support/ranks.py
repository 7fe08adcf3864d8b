"""Several ranks in one test: fork workers over gloo, after torch and diffusers are imported once in the parent."""

import functools
import gc
import json
import multiprocessing as mp
import os
import pickle
import tempfile
import time
import traceback
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from wan_dist.agent.prepare import Invocation, check, freeze_run
from wan_dist.config import freeze
from wan_dist.config.schema import Config
from wan_dist.distributed import process_group
from wan_dist.output import record
from wan_dist.output.memory import PeakHostMemory
from wan_dist.pipeline import plan
from wan_dist.pipeline.decode import decode
from wan_dist.pipeline.generate import generate as generate_video
from wan_dist.topology import RankEnv

TIMEOUT_S = 240  # for all cases of a start; what hangs ends by the process group's own, which is shorter


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(env, *args)` on every rank of a fresh torchrun-like world; returns the results in rank order.

    Raises AssertionError with every rank's traceback if any rank failed or did not end.
    """
    return run_cases(world_size, function, [args])[0]


def run_cases(world_size: int, function: Callable[..., Any], cases: Sequence[tuple]) -> list[list[Any]]:
    """`function(env, *case)` for one case after the other in the same workers, since starting them costs more than most
    cases do; each has a store of its own to meet in. Returns the results in rank order, by case.

    Raises AssertionError with every rank's traceback if any rank failed or did not end; cases after it are not run.
    """
    context = mp.get_context("fork")
    pipes, processes, answers = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(sender, rank, world_size, Path(folder), function, cases))
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        deadline = time.monotonic() + TIMEOUT_S
        for receiver in pipes:
            try:
                there = receiver.poll(max(0, deadline - time.monotonic()))
                answers.append(pickle.loads(receiver.recv_bytes()) if there else (False, "no answer"))
            except EOFError:
                answers.append((False, "died without an answer"))
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
    failures = [f"rank {rank}: {answer}" for rank, (good, answer) in enumerate(answers) if not good]
    assert not failures, "\n".join(failures)
    return [list(results) for results in zip(*(answer for _, answer in answers), strict=True)]


def _rank(
    sender: Any, rank: int, world_size: int, folder: Path, function: Callable[..., Any], cases: Sequence[tuple]
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    gc.freeze()  # else every collection of a run goes through what the parent imported: 0.2 s
    # A file, not the agent's TCPStore: that looks up the name of every peer, and where no DNS answers, for 5 s.
    process_group.agent_store = lambda _timeout_s: dist.FileStore(str(folder / str(len(results))), world_size)
    env = RankEnv(rank, rank, world_size, world_size, 0, "test", "localhost")
    results: list[Any] = []
    try:
        for case in cases:
            results.append(function(env, *case))
        answer = (True, results)
    except BaseException:
        answer = (False, f"in case {len(results)}: {traceback.format_exc()}")
    sender.send_bytes(pickle.dumps(answer))
    os._exit(0)


def frozen(folder: Path, checkpoint: Path, **settings: Any) -> Config:
    """A frozen config for `checkpoint`: settings by dotted key, `{"sampler.steps": 3}`, on top of a small default."""
    config = Config()
    defaults = {
        "prompt": "a cat, surfing",
        "model.path": str(checkpoint),
        "sampler.steps": 3,
        "video.height": 32,
        "video.width": 48,
        "video.num_frames": 9,
        "output.dir": str(folder),
        "output.formats": ["latents"],
        "runtime.device": "cpu",
        "runtime.timeout_s": 60.0,
    }
    for key, value in {**defaults, **settings}.items():
        node: Any = config
        *path, leaf = key.split(".")
        for part in path:
            node = getattr(node, part)
        assert hasattr(node, leaf), key
        setattr(node, leaf, value)
    path = freeze_run(check(config, Invocation(recipe_named=False, default_dir=folder)))
    return freeze.load(path)


def run_generation(env: RankEnv, config: Config) -> dict[str, str]:
    """A generation as a worker of the real command runs it; the files written, on rank 0."""
    device = torch.device("cpu")
    with unittest.mock.patch.object(record, "PeakHostMemory", _one_sampler):  # a real rank has one for its one run
        report = record.RankReport(env, device)
    return (decode if config.task == "decode" else generate_video)(config, env, device, report)


@contextmanager
def text_encoder_divided() -> Iterator[None]:
    """Where FSDP is on, a plan that divides the text encoder too, as if it did not fit."""
    place = plan.place_or_refuse

    def divided(*args: Any) -> Any:
        found = place(*args)
        rows = [replace(p, how="fsdp") if p.component == "text_encoder" else p for p in found.placements]
        return replace(found, placements=tuple(rows))

    with unittest.mock.patch.object(plan, "place_or_refuse", divided):
        yield


@functools.cache
def _one_sampler() -> PeakHostMemory:
    return PeakHostMemory()


def generate(folder: Path, checkpoint: Path, **settings: Any) -> dict[str, Any]:
    """Run a generation on the mesh that `settings` ask for; returns `latents` and, if asked for, `frames`, and the run
    `record`."""
    return generate_all(folder, [(checkpoint, settings)])[0]


def generate_all(folder: Path, cases: Sequence[tuple[Path, dict[str, Any]]]) -> list[dict[str, Any]]:
    """`generate` for many pairs of checkpoint and settings, with one start of the workers per number of ranks."""
    configs = [
        frozen(folder, checkpoint, **{"parallelism.cfg": 1, "output.name": f"video{number}", **settings})
        for number, (checkpoint, settings) in enumerate(cases)
    ]
    outputs: dict[int, dict[str, str]] = {}
    for ranks in sorted({config.runtime.ranks or 1 for config in configs}):
        numbers = [number for number, config in enumerate(configs) if (config.runtime.ranks or 1) == ranks]
        results = run_cases(ranks, run_generation, [(configs[number],) for number in numbers])
        outputs |= {number: result[0] for number, result in zip(numbers, results, strict=True)}
    return [_read(outputs[number]) for number in range(len(cases))]


def _read(files: dict[str, str]) -> dict[str, Any]:
    tensors = {kind: load_file(files[kind])[kind] for kind in ("latents", "frames") if kind in files}
    return {**tensors, "record": json.loads(Path(files["record"]).read_text())}
