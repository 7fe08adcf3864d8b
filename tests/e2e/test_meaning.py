"""The default model draws what its prompt says, on one rank and on meshes of four, by both launchers."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from e2e.processes import together
from support.checkpoints import WAN_SHAPES
from support.commands import torchrun, wan_dist
from support.ranks import generate_all
from support.tiers import in_all, named_in_all
from wan_dist.shapes.meaning import describe
from wan_dist.shapes.vocabulary import Scene

# name -> (what is asked for, parallelism)
CASES = {
    "one rank": (Scene("red", "circle", "right", "black"), "single"),
    "four ranks": (Scene("red", "circle", "right", "black"), "cfg2_ulysses2"),
    **named_in_all(
        {
            "every axis": (Scene("red", "circle", "right", "black"), "ring2"),
            "blue": (Scene("blue", "square", "left", "white"), "single"),
            "yellow": (Scene("yellow", "triangle", "up", "navy"), "single"),
        }
    ),
}

# Other prompts, not typed as commands. The recipe of the default model.
OTHERS = in_all("blue", "yellow")
SETTINGS = {
    "sampler.seed": 1,
    "sampler.steps": 20,
    "sampler.guidance_scale": 4.0,
    "sampler.flow_shift": 3.0,
    "video.height": 64,
    "video.width": 64,
    "video.num_frames": 17,
    "output.formats": ["frames"],
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """The frames of every case."""
    folder = tmp_path_factory.mktemp("meaning")

    def make(case):
        scene, parallelism = CASES[case]
        typed = [
            f"prompt={scene.prompt}",
            f"parallelism={parallelism}",
            "output.formats=[frames]",
            f"output.name={case}",
        ]
        typed += ["model=wan_shapes", f"output.dir={folder}"]
        if case == "every axis":
            done = torchrun(4, *typed, "parallelism.tp=2", "parallelism.fsdp.enabled=on", cwd=folder)
        else:
            done = wan_dist(*typed, cwd=folder)
        assert done.returncode == 0, done.stderr
        return load_file(folder / f"{case}.frames.safetensors")["frames"]

    typed = [case for case in CASES if case not in OTHERS]
    requests = [(WAN_SHAPES, {"prompt": CASES[case][0].prompt, **SETTINGS}) for case in OTHERS]
    others = [result["frames"].numpy() for result in generate_all(folder, requests)]
    clips = dict(zip(typed, together(*(lambda case=case: make(case) for case in typed)), strict=True))
    return clips | dict(zip(OTHERS, others, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_the_video_shows_what_was_asked_for(clips, case):
    seen = describe(clips[case])
    assert clips[case].shape == (17, 64, 64, 3)
    assert all(seen.answers(CASES[case][0]).values()), seen


@pytest.mark.parametrize("case", ["four ranks", *in_all("every axis")])
def test_meshes_draw_the_same_video_as_one_rank(clips, case):
    difference = np.abs(clips[case].astype(int) - clips["one rank"].astype(int))
    assert difference.max() <= 1  # a rounding of the last of 8 bits
