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

from e2e.processes import Running, files_in, together
from support.commands import run, wan_dist

REQUEST = ["prompt=x", "sampler.steps=1", "video.height=128", "video.width=96", "video.num_frames=25", "video.fps=5"]
FORMATS = "output.formats=[mp4,frames]"


def mp4_frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 5
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny) -> Path:
    """Denoised on the mesh of the others, decoded on one rank: another number of rows changes the last bits."""
    folder = tmp_path_factory.mktemp("undisturbed")
    mesh = ["parallelism.ulysses=2", "parallelism.vae=off"]
    done = wan_dist(*REQUEST, f"model.path={tiny}", FORMATS, *mesh, f"output.dir={folder}", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert files_in(folder) == {"video.mp4", "video.frames.safetensors", "video.json"}
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory, tiny) -> dict[str, tuple[Path, str]]:
    """By what was killed in mid-decode: the folder, and what the command said last."""

    def kill(what: str) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp("killed") / "it's here"
        typed = [*REQUEST, f"model.path={tiny}", FORMATS, "parallelism.ulysses=2", f"output.dir={folder}"]
        with Running(["wan-dist", *typed], folder.parent) as running:
            running.wait_for("^latent frame 1/7")
            if what == "parent":
                running.process.send_signal(signal.SIGKILL)
            else:
                running.rank(1).send_signal(signal.SIGKILL)
            assert running.finish() != 0
        return folder, running.err

    return dict(zip(("rank", "parent"), together(lambda: kill("rank"), lambda: kill("parent")), strict=True))


@pytest.mark.parametrize("what", ["rank", "parent"])
def test_the_latents_are_left_and_no_video(killed, what):
    folder, _ = killed[what]
    assert {name for name in files_in(folder) if not name.endswith(".tmp")} == {"video.latents.safetensors"}
    assert load_file(folder / "video.latents.safetensors")["latents"].shape == (1, 16, 7, 16, 12)


def test_what_the_error_says_to_type_makes_the_undisturbed_video(killed, undisturbed):
    folder, said = killed["rank"]
    (command,) = re.findall("^the latents are kept; to decode them alone: (.*)$", said, re.MULTILINE)
    done = run([*shlex.split(command), "parallelism=single"], folder.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder / "video.mp4")
    assert files_in(folder) == {
        f"video.{suffix}" for suffix in ("mp4", "frames.safetensors", "json", "latents.safetensors")
    }
    ours, theirs = (load_file(where / "video.frames.safetensors")["frames"] for where in (folder, undisturbed))
    assert torch.equal(ours, theirs)
    again, first = (mp4_frames(where / "video.mp4").astype(int) for where in (folder, undisturbed))
    assert np.abs(again - first).mean() < 0.5  # of 256 levels: the encoder's threads need not agree to the last bit


def test_latents_can_be_decoded_on_another_number_of_ranks(killed, undisturbed, tiny, tmp_path):
    latents = killed["parent"][0] / "video.latents.safetensors"
    typed = [f"latents={latents}", f"model.path={tiny}", "output.formats=[frames]", "output.name=again"]
    done = wan_dist("task=decode", *typed, "parallelism.ulysses=3", f"output.dir={tmp_path}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path) == {"again.frames.safetensors", "again.json"}
    ours, theirs = (
        load_file(file)["frames"].int()
        for file in (tmp_path / "again.frames.safetensors", undisturbed / "video.frames.safetensors")
    )
    assert (ours - theirs).abs().max() <= 1


def test_what_cannot_be_decoded_is_refused(killed, tiny, tmp_path):
    latents = killed["parent"][0] / "video.latents.safetensors"
    wrong = together(
        lambda: wan_dist("task=decode", f"model.path={tiny}", cwd=tmp_path),
        lambda: wan_dist("task=decode", f"model.path={tiny}", f"latents={tmp_path}/none", cwd=tmp_path),
        lambda: wan_dist("task=decode", f"model.path={tiny}", f"latents={latents}", "video.height=64", cwd=tmp_path),
        lambda: wan_dist(f"model.path={tiny}", "prompt=x", f"latents={latents}", cwd=tmp_path),
    )
    for done, why in zip(wrong, ("needs latents", "no such file", "those of 128", "only task=decode"), strict=True):
        assert done.returncode == 2 and why in done.stderr, done.stderr
    assert files_in(tmp_path) == set()
