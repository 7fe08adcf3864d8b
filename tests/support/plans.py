"""Plans of published checkpoints, without their files: what is to be done, and on which machine."""

import json
from functools import cache
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hydra import compose, initialize_config_dir

from wan_dist.agent.plan import show_plan
from wan_dist.agent.prepare import Invocation, check
from wan_dist.cli.compose import _typed
from wan_dist.config.schema import Config
from wan_dist.config.store import conf_dir, register_schemas
from wan_dist.loading.checkpoint import Checkpoint
from wan_dist.loading.published import published
from wan_dist.planning.defaults import resolve
from wan_dist.planning.degrees import AXES
from wan_dist.planning.footprint import Machine, Work
from wan_dist.planning.placement import Orders, Plan, place
from wan_dist.planning.refusal import RefusedError
from wan_dist.planning.workload import Task, work_of

HUB_IDS = {
    "1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "i2v 14b": "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
    "a14b": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "i2v a14b": "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    "5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
}
VIDEOS = {"480p": (480, 832, 81), "720p": (720, 1280, 81), "short": (480, 832, 5), "5b": (704, 1280, 121)}
GB = 10**9


def checkpoint_of(model: str) -> Checkpoint:
    found = published(HUB_IDS[model])
    assert found is not None
    return found


def set_keys(config: Config, **settings: Any) -> Config:
    """`config`, with dotted keys set."""
    for key, value in settings.items():
        *path, leaf = key.split(".")
        node: Any = config
        for part in path:
            node = getattr(node, part)
        setattr(node, leaf, value)
    return config


def config_of(model: str, video: str = "720p", **settings: Any) -> Config:
    """Resolved, in bf16 on a GPU unless `settings` (dotted keys) say otherwise."""
    height, width, frames = VIDEOS[video]
    usual = {"video.height": height, "video.width": width, "video.num_frames": frames}
    usual |= {"runtime.device": "cuda", "runtime.dtype": "bfloat16"}
    made = set_keys(Config(prompt="a cat"), **{**usual, **settings})
    return resolve(made, checkpoint_of(model), recipe_applies=False)


def degrees_of(**degrees: int) -> dict[str, int]:
    return {axis: degrees.get(axis, 1) for axis in AXES}


@cache
def work(
    model: str = "14b",
    video: str = "720p",
    *,
    vae: str = "float32",
    dtype: str = "bfloat16",
    fsdp: str = "auto",
    steps: int = 50,
    guided: bool = True,
    device: str = "cuda",
    local_ranks: int | None = None,
    attention_tflops: float | None = None,
    **degrees: int,
) -> Work:
    """Of one generation on ranks of one node."""
    config, mesh = config_of(model, video), degrees_of(**degrees)
    ranks = prod(mesh.values())
    config.plan.attention_tflops = attention_tflops
    config.runtime.vae_dtype, config.runtime.dtype, config.sampler.steps = vae, dtype, steps
    config.parallelism.fsdp.enabled, config.parallelism.vae = fsdp, "on" if ranks > 1 else "off"
    checkpoint = checkpoint_of(model)
    task = Task.of_request(config, checkpoint, guided=guided)
    return work_of(config, checkpoint, task, degrees=mesh, device=device, local_ranks=local_ranks or ranks, threads=1)


def gpu(gigabytes: float, *, host: float | None = None, local_ranks: int = 1, host_gb_s: float = 55.0) -> Machine:
    host_bytes = None if host is None else int(host * GB)
    return Machine("cuda", int(gigabytes * GB), host_bytes, local_ranks, host_gb_s * 1e9)


def cpu(gigabytes: float, *, local_ranks: int = 1) -> Machine:
    return Machine("cpu", None, int(gigabytes * GB), local_ranks)


def placed(todo: Work, machine: Machine, **orders: Any) -> Plan:
    return place(todo, machine, Orders(**orders))


def hows(plan: Plan) -> dict[str, str]:
    return {placement.component: placement.how for placement in plan.placements}


def planned(capsys, *overrides: str) -> SimpleNamespace:
    """`task=plan` in this process: `document`, `err`, `refusals` (None where something can run)."""
    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = _typed(compose("config", ["task=plan", *overrides]))
    refusals = None
    try:
        checked = check(config, Invocation(any(o.startswith("model=") for o in overrides), Path("unused")))
        show_plan(checked.config, checked.checkpoint, checked.source.name, guided=checked.guided)
    except RefusedError as error:
        refusals = error.refusals
    out, err = capsys.readouterr()
    return SimpleNamespace(document=json.loads(out), err=err, refusals=refusals)


def best_of(document: dict) -> dict:
    (best,) = [mesh for mesh in document["meshes"] if mesh["best"]]
    return best
