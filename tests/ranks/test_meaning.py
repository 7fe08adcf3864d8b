"""Videos of every mesh show what their prompts say, read from the frames alone. Faults after which shapes, norms and
values are as plausible as before are seen there as well.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from support.checkpoints import WAN_SHAPES
from support.ranks import frozen, generate_all, run_generation, run_ranks
from support.tiers import ALL, all_only, named_in_all
from wan_dist.distributed.collectives import gather_dim
from wan_dist.layers.halo import Halo, RowSplit, halo_rows
from wan_dist.layers.sequence import split_range
from wan_dist.sampling.denoise import guided_prediction
from wan_dist.shapes.meaning import describe
from wan_dist.shapes.vocabulary import Scene

SETTINGS = {
    "sampler.steps": 12 if ALL else 8,
    "sampler.guidance_scale": 4.0,
    "sampler.flow_shift": 3.0,
    "video.height": 64,
    "video.width": 64,
    "video.num_frames": 9,
    "output.formats": ["frames"],
}
RED, BLUE, YELLOW = (
    Scene("red", "circle", "right", "black"),
    Scene("blue", "square", "left", "white"),
    Scene("yellow", "triangle", "up", "navy"),
)
PLAIN = 0.03
# name -> (what is asked for, how it is run)
MESHES: dict[str, tuple[Scene, dict[str, Any]]] = {
    "cfg 2": (RED, {"parallelism.cfg": 2}),
    "ulysses 2": (BLUE, {"parallelism.ulysses": 2}),
    "ulysses 3": (YELLOW, {"parallelism.ulysses": 3}),
    "ring 2": (YELLOW, {"parallelism.ring": 2}),
    "tp 2": (BLUE, {"parallelism.tp": 2}),
    "FSDP": (YELLOW, {"parallelism.ulysses": 2, "parallelism.fsdp.enabled": "on"}),
    "three ranks decode": (RED, {"parallelism.ring": 3, "parallelism.vae": "on"}),
    "streamed": (RED, {"offload.transformer": "layerwise", "offload.prefetch": 1}),
    **named_in_all(
        {
            "ring 3": (RED, {"parallelism.ring": 3}),
            "one rank decodes": (RED, {"parallelism.ulysses": 2, "parallelism.vae": "off"}),
            "four ranks decode": (BLUE, {"parallelism.ring": 4, "parallelism.vae": "on"}),
        }
    ),
}


def request(scene: Scene, **settings: Any) -> tuple[Any, dict[str, Any]]:
    return WAN_SHAPES, {"prompt": scene.prompt, **SETTINGS, **settings}


def shows(scene: Scene, frames: np.ndarray) -> bool:
    """Whether a clip is what was asked for, on a background that is as plain as the model paints it."""
    seen = describe(frames)
    return all(seen.answers(scene).values()) and seen.stray < PLAIN


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Frames by name: of every mesh, and of every scene on one rank."""
    requests = {name: request(scene, **settings) for name, (scene, settings) in MESHES.items()}
    requests |= {scene.prompt: request(scene) for scene in (RED, BLUE, YELLOW)}
    made = generate_all(tmp_path_factory.mktemp("meaning"), list(requests.values()))
    return {name: result["frames"].numpy() for name, result in zip(requests, made, strict=True)}


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_shows_what_was_asked_for(clips, name):
    scene, _ = MESHES[name]
    assert shows(scene, clips[name]), describe(clips[name])
    assert np.abs(clips[name].astype(int) - clips[scene.prompt].astype(int)).max() <= 1


# What is put in place of a function, and where; none of them changes a shape or makes a value that is not finite.


def gathered_backwards(axis: Any, tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
    parts = gather_dim(axis, tensor, dim, sizes).split(list(sizes), dim)
    return torch.cat(parts[::-1], dim)


def from_the_first_row(length: int, ranks: int, rank: int) -> tuple[int, int]:
    begin, end = split_range(length, ranks, rank)
    return 0, end - begin


def away_from_the_prompt(predict: Any, latents: torch.Tensor, timestep: torch.Tensor, step: Any, axis: Any) -> Any:
    return guided_prediction(predict, latents, timestep, replace(step, guidance=-step.guidance), axis)


def from_the_far_side(parts: Sequence[torch.Tensor], split: RowSplit, above: int, below: int) -> Halo:
    return halo_rows([part.flip(-2) for part in parts], split, above, below)


def as_they_are(_vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return latents


FAULTS: dict[str, tuple[str, Any, Scene, dict[str, Any]]] = {
    "gathered in the wrong order of ranks": (
        *("wan_dist.models.wan_transformer.gather_dim", gathered_backwards),
        *(RED, {"parallelism.ulysses": 2}),
    ),
    "every rank's positions begin at the first": (
        *("wan_dist.models.wan_transformer.split_range", from_the_first_row),
        *(BLUE, {"parallelism.ulysses": 2}),
    ),
    "guidance leads away from the prompt": (
        *("wan_dist.sampling.denoise.guided_prediction", away_from_the_prompt),
        *(RED, {"parallelism.cfg": 2}),
    ),
    "halo rows from the wrong side": (
        *("wan_dist.models.wan_vae.halo_rows", from_the_far_side),
        *(BLUE, {"parallelism.ring": 4, "parallelism.vae": "on"}),
    ),
    "latents as the loop left them": ("wan_dist.models.wan_latents.denormalised", as_they_are, YELLOW, {}),
}


def with_fault(env: Any, config: Any, where: str, what: Any) -> dict[str, str]:
    with mock.patch(where, what):
        return run_generation(env, config)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_shows(name, tmp_path):
    where, what, scene, settings = FAULTS[name]
    checkpoint, asked = request(scene, **settings)
    config = frozen(tmp_path, checkpoint, **{"parallelism.cfg": 1, **asked})
    files = run_ranks(config.runtime.ranks, with_fault, config, where, what)[0]
    assert not shows(scene, load_file(files["frames"])["frames"])


def test_the_negative_prompt_leads_away(tmp_path):
    """Asked for no colour, the model chooses one; asked not to paint that one, it chooses another."""
    open_prompt = "a circle moving right on a black background"
    (free,) = generate_all(tmp_path, [(WAN_SHAPES, {"prompt": open_prompt, **SETTINGS})])
    colour = describe(free["frames"].numpy()).colour
    negative = {"negative_prompt": f"a {colour} circle moving right on a black background"}
    steered, cfg = generate_all(
        tmp_path,
        [(WAN_SHAPES, {"prompt": open_prompt, **SETTINGS, **negative, "parallelism.cfg": degree}) for degree in (1, 2)],
    )
    assert describe(steered["frames"].numpy()).colour != colour
    assert (steered["frames"].int() - cfg["frames"].int()).abs().max() <= 1


@all_only
def test_guidance_brings_outlines_nearer_to_what_was_asked(clips, tmp_path):
    """A negative prompt that is the prompt leaves nothing of guidance."""
    scenes = (RED, BLUE, YELLOW)
    made = generate_all(tmp_path, [request(scene, negative_prompt=scene.prompt) for scene in scenes])
    unguided = [result["frames"].numpy() for result in made]
    guided = [clips[scene.prompt] for scene in scenes]
    likeness = [
        np.mean([describe(frames).likeness[scene.shape] for scene, frames in zip(scenes, shown, strict=True)])
        for shown in (guided, unguided)
    ]
    assert likeness[0] > likeness[1] + 0.02
