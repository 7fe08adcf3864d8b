"""A run that is killed while it decodes has lost nothing but the decoding: `task=decode` finishes it on any mesh."""

import re
import shlex
import signal
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from e2e.processes import Running, files_in
from support.commands import run, wan_dist
from support.ranks import frozen, run_cases, run_generation

REQUEST = {
    "prompt": "x",
    "sampler.steps": 1,
    "video.height": 128,
    "video.width": 96,
    "video.num_frames": 25,
    "video.fps": 5.0,
}
TYPED = [f"{key}={value}" for key, value in REQUEST.items()]
FORMATS = "output.formats=[mp4,frames]"


def mp4_frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 5
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny) -> Path:
    """Denoised on the mesh of the others, decoded on one rank: another number of rows changes the last bits."""
    folder = tmp_path_factory.mktemp("undisturbed")
    mesh = {"parallelism.cfg": 1, "parallelism.ulysses": 2, "parallelism.vae": "off"}
    config = frozen(folder, tiny, **REQUEST, **mesh, **{"output.formats": ["mp4", "frames"]})
    run_cases(2, run_generation, [(config,)])
    assert files_in(folder) == {"video.mp4", "video.frames.safetensors", "video.json"}
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory, tiny) -> tuple[Path, str]:
    """The folder of a run of which a rank was killed in mid-decode, and what the command said."""
    folder = tmp_path_factory.mktemp("killed") / "it's here"
    typed = [*TYPED, f"model.path={tiny}", FORMATS, "parallelism.ulysses=2", f"output.dir={folder}"]
    with Running(["wan-dist", *typed], folder.parent) as running:
        running.wait_for("^latent frame 1/7")
        running.rank(1).send_signal(signal.SIGKILL)
        assert running.finish() == 1
    return folder, running.err


def test_the_latents_are_left_and_no_video(killed):
    folder, _ = killed
    assert {name for name in files_in(folder) if not name.endswith(".tmp")} == {"video.latents.safetensors"}
    assert load_file(folder / "video.latents.safetensors")["latents"].shape == (1, 16, 7, 16, 12)


def test_what_the_error_says_to_type_makes_the_undisturbed_video(killed, undisturbed):
    folder, said = killed
    (command,) = re.findall("^the latents are kept; to decode them alone: (.*)$", said, re.MULTILINE)
    done = run([*shlex.split(command), "runtime.ranks=1"], folder.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder / "video.mp4")
    assert files_in(folder) == {
        f"video.{suffix}" for suffix in ("mp4", "frames.safetensors", "json", "latents.safetensors")
    }
    ours, theirs = (load_file(where / "video.frames.safetensors")["frames"] for where in (folder, undisturbed))
    assert torch.equal(ours, theirs)
    again, first = (mp4_frames(where / "video.mp4").astype(int) for where in (folder, undisturbed))
    assert np.abs(again - first).mean() < 0.5  # of 256 levels: the encoder's threads need not agree to the last bit


def test_without_latents_there_is_nothing_to_decode(tiny, tmp_path):
    done = wan_dist("task=decode", f"model.path={tiny}", f"latents={tmp_path}/none", cwd=tmp_path)
    assert done.returncode == 2 and "no such file" in done.stderr
    assert files_in(tmp_path) == set()
