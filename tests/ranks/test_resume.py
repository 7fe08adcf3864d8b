"""A run that is stopped goes on with the same bits: on its own mesh, whatever the solver, the model and the placement
of weights, and within rounding on another mesh.

One rank is asked alone, at a step or phase of its own; each generation is one case of the workers, so that what one
leaves on disk the next one finds.
"""

import json
import os
import signal
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file

from support import ranks
from support.ranks import frozen, run_cases, run_generation, run_ranks
from support.resumes import (
    FRAMES,
    MESHES,
    NAMES,
    SCENARIOS,
    START_OVER,
    STEPS,
    TWO_EXPERTS,
    Attempt,
    Event,
    Refusal,
    Scenario,
)
from support.sharded import mesh_of
from support.streaming import noise
from wan_dist.config.schema import Config
from wan_dist.loading.checkpoint import fingerprint, open_checkpoint
from wan_dist.loading.tensor_files import CheckpointError
from wan_dist.output.identity import describe_state, run_identity
from wan_dist.output.names import STATE_FILE, output_path, run_folder
from wan_dist.output.pulse import Pulse
from wan_dist.output.state import DenoisingState, write_state
from wan_dist.pipeline.generate import generate as generate_video
from wan_dist.pipeline.resume import read_start
from wan_dist.sampling.solver_state import solver_state
from wan_dist.sampling.solvers import scheduled
from wan_dist.stop import StoppedError, StopRequest


class Failed(Exception):  # noqa: N818
    """What no rank expects."""


def state_file(config: Config) -> Path:
    return run_folder(Path(str(config.output.dir)), config.output.name) / STATE_FILE


class Request(StopRequest):
    """One that is asked without a signal, which would come at any time."""

    is_held = False

    def hold(self) -> None:
        super().hold()
        self.is_held = True

    def release(self) -> None:
        self.is_held = False
        super().release()

    def ask(self, number: signal.Signals) -> None:
        self.signal = number
        if not self.is_held:
            raise StoppedError(number.name)


def marking(event: Event, stop: Request) -> Callable[..., None]:
    """`Pulse.mark`, by which a rank tells how far it is, and where the event happens."""
    mark, pending = Pulse.mark, [event]

    def marks(pulse: Pulse, phase: str, step: int = 0, of: int = 0) -> None:
        mark(pulse, phase, step, of)
        if pending and (phase, step) == (event.phase, event.done):
            pending.clear()
            if event.number is None:
                raise Failed("in the middle")
            stop.ask(event.number)

    return marks


def attempt(env, config: Config, disturbance: Event | Refusal | None) -> dict[str, Any]:
    """A generation as a rank of the real command runs it; how it ended here, and what state it left."""
    told: dict[str, Any] = {"ended": "done"}
    stop, file, cut = Request(), state_file(config), b""
    if isinstance(disturbance, Refusal) and disturbance.cut and env.rank == 0 and file.exists():
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        cut = whole[-1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "generate_video", partial(generate_video, stop=stop))
        if isinstance(disturbance, Event) and disturbance.rank in (env.rank, None):
            patch.setattr(Pulse, "mark", marking(disturbance, stop))
        try:
            run_generation(env, config)
        except StoppedError as error:
            told = {"ended": "stopped", "signal": error.signal, "saved": error.saved, "steps": error.steps}
        except Exception as error:
            told = {"ended": "failed", "type": type(error), "text": str(error)}
    if told["ended"] != "done" and dist.is_initialized():
        dist.destroy_process_group()
    if env.rank == 0:
        with file.open("ab") if cut else open(os.devnull, "wb") as stream:
            stream.write(cut)
        told["left"] = describe_state(file).steps_done if file.exists() else None
        told["files"] = sorted(path.name for path in file.parent.glob("state*"))
    return told


class Told(NamedTuple):
    """Of one scenario: its attempts' configs and, by attempt and rank, how they ended; and the outputs, those of the
    last attempt and those of a run that nobody disturbed."""

    configs: list[Config]
    ends: list[list[dict[str, Any]]]
    outputs: dict[str, Any]
    undisturbed: dict[str, Any]


def outputs_of(config: Config) -> dict[str, Any]:
    """What a run has written, by kind; nothing where it has not come to that."""
    paths = {
        kind: output_path(Path(str(config.output.dir)), config.output.name, kind)
        for kind in ("latents", "frames", "record")
    }
    found = {kind: load_file(path)[kind] for kind, path in paths.items() if path.exists() and kind != "record"}
    return {**found, "record": json.loads(paths["record"].read_text())} if paths["record"].exists() else found


def put(config: Config, settings: dict[str, Any]) -> Config:
    config = deepcopy(config)
    for key, value in settings.items():
        *path, leaf = key.split(".")
        node: Any = config
        for part in path:
            node = getattr(node, part)
        setattr(node, leaf, value)
    return config


@pytest.fixture(scope="module")
def told(tmp_path_factory, checkpoints) -> dict[str, Told]:
    folder = tmp_path_factory.mktemp("runs")
    picture = folder / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(picture)

    def resolved(scenario: Scenario, name: str, of: Attempt) -> Config:
        model = scenario.model
        path = checkpoints.of_images(model) if isinstance(model, str) else checkpoints(**model)
        degrees = {
            f"parallelism.{axis}": degree for axis, degree in {"cfg": 1, "ulysses": 1, **MESHES[of.mesh]}.items()
        }
        settings = {"sampler.steps": STEPS, **scenario.request, **degrees, "output.name": name}
        if "image" in settings:
            settings["image"] = str(picture)
        # What a command would refuse is put into the config it has resolved: the ranks are to refuse it too.
        refused = of.settings if isinstance(of.disturbance, Refusal) else {}
        settings |= {"output.resume": "auto", **({} if refused else of.settings), "runtime.timeout_s": 30.0}
        if "model.path" in refused:
            refused = {"model.path": str(checkpoints(**{**TWO_EXPERTS, "ffn": 100}))}
        return put(frozen(folder, path, **settings), refused)

    runs: list[tuple[Config, Event | Refusal | None]] = []
    undisturbed: dict[str, Config] = {}
    configs: dict[str, list[Config]] = {}
    for name in NAMES:
        scenario = SCENARIOS[name]
        configs[name] = [resolved(scenario, name, one) for one in scenario.attempts]
        runs += zip(configs[name], [one.disturbance for one in scenario.attempts], strict=True)
        request = {key: value for key, value in scenario.request.items() if key != "output.formats"}
        key = repr((scenario.model, request, scenario.attempts[-1].mesh))
        if key not in undisturbed:  # of those that share it, the first one also says whether frames are wanted
            frames = FRAMES if "output.formats" in scenario.request else {}
            whole = Scenario(scenario.model, {**request, **frames}, [])
            settings = Attempt(scenario.attempts[-1].mesh, None, START_OVER)
            undisturbed[key] = resolved(whole, f"undisturbed {len(undisturbed)}", settings)
            runs.append((undisturbed[key], None))
        undisturbed[name] = undisturbed[key]
    ends: dict[int, list[dict[str, Any]]] = {}
    for size in (4, 2, 1):
        numbers = [number for number, (config, _) in enumerate(runs) if config.runtime.ranks == size]
        ends |= dict(zip(numbers, run_cases(size, attempt, [runs[number] for number in numbers]), strict=True))
    assert len(ends) == len(runs)
    found = {id(config): ends[number] for number, (config, _) in enumerate(runs)}
    return {
        name: Told(
            configs[name],
            [found[id(config)] for config in configs[name]],
            outputs_of(configs[name][-1]),
            outputs_of(undisturbed[name]),
        )
        for name in NAMES
    }


def first_steps(scenario: Scenario) -> list[int]:
    """The step at which each attempt begins."""
    left = [0, *(one.disturbance.left or 0 for one in scenario.attempts if one.disturbance is not None)]
    return [0 if one.settings is START_OVER else first for one, first in zip(scenario.attempts, left, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_the_video_is_that_of_an_undisturbed_run(told, name):
    outputs, undisturbed = told[name].outputs, told[name].undisturbed
    meshes = {one.mesh for one in SCENARIOS[name].attempts}
    kinds = told[name].configs[-1].output.formats
    assert kinds and outputs.keys() == {*kinds, "record"}  # latents that nobody asked for are gone
    for kind in kinds:
        one, other = outputs[kind], undisturbed[kind]
        assert one.shape == other.shape
        if len(meshes) == 1:
            assert torch.equal(one, other), (kind, (one.float() - other.float()).abs().max())
        else:
            assert (one - other).abs().max() <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_all_ranks_end_at_the_same_step_and_leave_its_state(told, name):
    for one, by_rank in zip(SCENARIOS[name].attempts, told[name].ends, strict=True):
        assert len(by_rank) == prod(MESHES[one.mesh].values())
        event = one.disturbance
        for rank, end in enumerate(by_rank):
            if event is None:
                assert end["ended"] == "done", end
            elif isinstance(event, Refusal):
                assert end["ended"] == "failed" and issubclass(end["type"], CheckpointError), end
                assert str(state_file(told[name].configs[-1])) in end["text"] and event.text in end["text"], end
            elif event.number is None:
                assert (end["ended"], end.get("type")) == ("failed", Failed), end
            else:
                # where there is no loop, a rank just leaves: what an earlier run has saved is no doing of its own
                saved = (event.left, STEPS) if event.phase in ("denoise", "decode") else (None, 0)
                by = event.number.name if rank == event.rank else "a signal"
                assert end["ended"] == "stopped", end
                assert (end["signal"], end["saved"], end["steps"]) == (by, *saved)
        left = None if event is None else event.left
        assert by_rank[0]["left"] == left
        assert by_rank[0]["files"] == ([] if left is None else [STATE_FILE])


@pytest.mark.parametrize("name", NAMES)
def test_only_what_the_remaining_steps_need_is_loaded(told, name):
    config, first = told[name].configs[-1], first_steps(SCENARIOS[name])[-1]
    _, schedule = scheduled(config.sampler, open_checkpoint(Path(config.model.path)).scheduler)
    needed = {step.expert for step in schedule[first:]}
    record = told[name].outputs["record"]
    for rank in record["ranks"]:
        assert {component for component in rank["bytes_read"] if component.startswith("transformer")} == needed
    assert ("text_encoder" in record["ranks"][0]["bytes_read"]) == bool(needed)


@pytest.mark.parametrize("name", NAMES)
def test_the_record_counts_every_step(told, name):
    steps = told[name].outputs["record"]["steps"]
    assert len(steps) == STEPS and all(seconds > 0 for seconds in steps)


def solver_in_the_middle(config: Config, *, first: torch.Tensor | None) -> tuple[Any, torch.Tensor | None]:
    """A fresh scheduler of the config; with `first`, after two steps from there, and the latents they made."""
    scheduler, schedule = scheduled(config.sampler, open_checkpoint(Path(str(config.model.path))).scheduler)
    latents = first
    for step in schedule[:2] if first is not None else []:
        latents = scheduler.step(noise(*first.shape, seed=step.index), scheduler.timesteps[step.index], latents)[0]
    return scheduler, latents


def start_of_a_state_in_another_layout(env, config: Config) -> dict[str, bool]:
    """Whether this rank starts with what the first one alone has written, and lays it out as it was."""
    first = noise(1, 16, 3, 4, 6, seed=7).to(memory_format=torch.channels_last_3d)
    scheduler, latents = solver_in_the_middle(config, first=first)
    fresh, _ = solver_in_the_middle(config, first=None)
    kept = solver_state(scheduler)
    checkpoint = open_checkpoint(Path(str(config.model.path)))
    numbers = {"solver": kept.numbers, "step_seconds": [0.5, 0.25]}
    state = DenoisingState(steps_done=2, steps=STEPS, latents=latents, tensors=kept.tensors, numbers=numbers)
    with mesh_of(env, ulysses=2) as mesh:
        if env.rank == 0:
            write_state(state_file(config), state, run_identity(config, fingerprint(checkpoint)))
        report = SimpleNamespace(steps=[])
        run: Any = SimpleNamespace(
            mesh=mesh,
            config=config,
            is_first=env.rank == 0,
            device=torch.device("cpu"),
            report=report,
            schedule=[None] * STEPS,
            checkpoint=checkpoint,
        )
        start = read_start(run, fresh)
        del run, mesh
    now = solver_state(fresh)
    found = DenoisingState(steps_done=2, steps=STEPS, latents=start.latents, tensors=now.tensors, numbers={}).named()
    return {
        "step": start.first_step == 2 and report.steps == [0.5, 0.25],
        "names": found.keys() == state.named().keys(),
        "bits": all(torch.equal(found[name], tensor) for name, tensor in state.named().items()),
        "strides": all(found[name].stride() == tensor.stride() for name, tensor in state.named().items()),
        "another layout": not any(tensor.is_contiguous() for tensor in found.values()),
        "numbers": now.numbers == kept.numbers,
    }


def test_every_rank_starts_with_the_layout_that_was_saved(tmp_path, tiny):
    """On a CPU no run of a tiny model has any but contiguous ones, so that its bits would not tell."""
    settings = {"parallelism.cfg": 1, "parallelism.ulysses": 2, "sampler.steps": STEPS, "output.resume": "auto"}
    config = frozen(tmp_path, tiny, **settings)
    for rank in run_ranks(2, start_of_a_state_in_another_layout, config):
        assert all(rank.values()), rank


def test_the_cases_are_what_they_say(told):
    def experts(name: str) -> list[str]:
        config = told[name].configs[-1]
        return [
            step.expert for step in scheduled(config.sampler, open_checkpoint(Path(config.model.path)).scheduler)[1]
        ]

    assert experts("at the switch") == ["transformer"] * 2 + ["transformer_2"] * 2
    assert [config.runtime.ranks for config in told["from mesh to mesh, two experts"].configs] == [2, 2, 1]
    rows = {row["component"]: row["placement"] for row in told["ulysses, FSDP"].outputs["record"]["plan"]}
    assert rows["transformer"] == rows["transformer_2"] == "fsdp"
    rows = {row["component"]: row["placement"] for row in told["placements"].outputs["record"]["plan"]}
    assert rows["transformer"] == rows["transformer_2"] == "component"
