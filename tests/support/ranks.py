"""Several ranks in one test: fork workers over gloo, after torch and diffusers are imported once in the parent."""

import multiprocessing as mp
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from wan_dist.agent.prepare import Invocation, check, freeze_run
from wan_dist.config import freeze
from wan_dist.config.schema import Config
from wan_dist.topology import RankEnv

TIMEOUT_S = 120


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(env, *args)` on every rank of a fresh torchrun-like world; returns the results in rank order.

    Raises AssertionError with every rank's traceback if any rank failed or did not end.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("fork")
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(sender, rank, world_size, port, function, args))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    answers = []
    for receiver in pipes:
        try:
            answers.append(pickle.loads(receiver.recv_bytes()) if receiver.poll(TIMEOUT_S) else (False, "no answer"))
        except EOFError:
            answers.append((False, "died without an answer"))
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
    failures = [f"rank {rank}: {answer}" for rank, (good, answer) in enumerate(answers) if not good]
    assert not failures, "\n".join(failures)
    return [answer for _, answer in answers]


def _rank(sender: Any, rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    env = RankEnv(rank, rank, world_size, world_size, 0, "test", "localhost")
    try:
        answer = (True, function(env, *args))
    except BaseException:
        answer = (False, traceback.format_exc())
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


def _generate(env: RankEnv, config: Config) -> dict[str, str]:
    from wan_dist.output.record import RankReport
    from wan_dist.pipeline import generate

    device = torch.device("cpu")
    return generate(config, env, device, RankReport(env, device))


def generate(folder: Path, checkpoint: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Run a generation on the mesh that `settings` ask for; returns `latents` and, if asked for, `frames`."""
    from safetensors.torch import load_file

    config = frozen(folder, checkpoint, **{"parallelism.cfg": 1, **settings})
    outputs = run_ranks(int(config.runtime.ranks or 1), _generate, config)[0]
    return {kind: load_file(outputs[kind])[kind] for kind in ("latents", "frames") if kind in outputs}
