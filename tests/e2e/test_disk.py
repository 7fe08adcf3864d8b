"""A disk that is full, and folders that go away under a run: one sentence, what was computed is kept, no half file."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from e2e.processes import Running, processes_about, together
from support.commands import run

LATENTS, FRAMES = "video.latents.safetensors", "video.frames.safetensors"
FULL_STEPS = 4
LONG_STEPS = 200  # seconds, in which a folder can be removed


@dataclass
class Ended:
    """How a run ended; `files` are all that it left in its output folder, those in `.run` included."""

    code: int
    out: str
    err: str
    files: set[str]


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of that size in `folder`."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")
    if done.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def request(model: Path, folder: Path, steps: int) -> list[str]:
    typed = ["model=tiny", f"model.path={model}", "prompt=x", "parallelism=single", f"sampler.steps={steps}"]
    return [*typed, f"output.dir={folder}"]


def every_file(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def outputs(end: Ended) -> set[str]:
    return {name for name in end.files if not name.startswith(".run/")}


def on_a_disk(typed: list[str], folder: Path) -> Ended:
    """Temporary files are to go beside the disk."""
    spare = folder.with_name(folder.name + "-tmp")
    spare.mkdir()
    with Running(["wan-dist", *typed], folder.parent, TMPDIR=str(spare)) as running:
        code = running.finish()
        out = running.process.stdout.read()
    return Ended(code, out, running.err, every_file(folder))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("disks")


@pytest.fixture(scope="module")
def full(home, tiny):
    """Runs on disks of a few blocks of 4 kB, by what does not fit there. The latents of one are decoded elsewhere."""
    large = ["video.height=64", "video.width=96", "output.checkpoint_every=1"]  # a state beside which latents are small
    latents = "output.formats=[latents]"
    with ExitStack() as stack:
        sizes = {"pixels": 48, "state": 64, "latents": 16}
        on = {name: stack.enter_context(small_disk(home / name, size)) for name, size in sizes.items()}
        typed = {name: request(tiny, folder, FULL_STEPS) for name, folder in on.items()}
        ends = together(
            lambda: on_a_disk([*typed["pixels"], "output.formats=[mp4,frames]"], on["pixels"]),
            lambda: on_a_disk([*typed["state"], *large, latents], on["state"]),
            lambda: on_a_disk([*typed["latents"], latents], on["latents"]),
        )
        yield dict(zip(on, ends, strict=True))


def command_in(end: Ended, folder: Path) -> list[str]:
    """What a message says to type, with another output folder."""
    (command,) = re.findall("^the latents are kept; to decode them alone: (.*)$", end.err, re.MULTILINE)
    return [f"output.dir={folder}" if word.startswith("output.dir=") else word for word in shlex.split(command)]


def test_a_full_disk_is_told_in_one_message(full):
    end = full["pixels"]
    assert end.code == 1 and end.err.count("wan-dist: ") == 1 and "Traceback" not in end.err
    assert end.err.count("No space left on device") == 1
    assert re.search(r"No space left on device: '\S+/pixels/video\.(frames\.safetensors|mp4)'", end.err), end.err
    assert "rank 0 on " in end.err and "rank0.log" in end.err


def test_a_full_disk_keeps_the_latents_and_no_half_file(full):
    end = full["pixels"]
    assert outputs(end) == {LATENTS}
    assert [name for name in end.files if name.endswith(".tmp")] == []


def test_what_a_full_disk_kept_is_decoded_elsewhere(full, tmp_path):
    done = run(command_in(full["pixels"], tmp_path), tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"video.mp4", FRAMES, "video.json"} <= {path.name for path in tmp_path.iterdir()}
    assert load_file(tmp_path / FRAMES)["frames"].shape == (9, 32, 48, 3)


def test_a_state_without_room_does_not_end_the_run(full, home):
    end = full["state"]
    assert end.code == 0, end.err
    assert end.err.count("wan-dist: the state cannot be saved (") == 1 and "No space left on device" in end.err
    assert "state.safetensors" in end.err and "the run goes on without" in end.err
    assert outputs(end) == {LATENTS, "video.json"}
    assert not any("state.safetensors" in name or name.endswith(".tmp") for name in end.files)
    assert torch.isfinite(load_file(home / "state" / LATENTS)["latents"]).all()


def test_latents_without_room_are_kept_in_a_folder_of_their_own(full, home):
    end = full["latents"]
    assert end.code == 1 and "No space left on device" in end.err and "Traceback" not in end.err
    (kept,) = re.findall("^the latents: (.*)$", end.err, re.MULTILINE)
    assert outputs(end) == set() and kept.startswith(str(home / "latents-tmp" / "wan_dist-"))
    assert load_file(kept)["latents"].any()


@pytest.fixture(scope="module")
def removed(tmp_path_factory, tiny):
    """Runs of which a folder is removed in their steps: name -> end, and the output folder."""

    def remove(what: str, *settings: str) -> tuple[Ended, Path]:
        cwd = tmp_path_factory.mktemp("removed")
        folder = cwd / "out"
        typed = [*request(tiny, folder, LONG_STEPS), *settings]
        with Running(["wan-dist", *typed], cwd) as running:
            running.wait_for(rf"^step \d+/{LONG_STEPS}")
            away = (folder / what).rename(cwd / "away")  # at once: the run writes there meanwhile
            shutil.rmtree(away)
            code = running.finish()
            out = running.process.stdout.read()
        assert processes_about(str(folder)) == []
        return Ended(code, out, running.err, every_file(folder)), folder

    ends = together(
        lambda: remove(""),
        lambda: remove(".run/video", "output.checkpoint_every=1"),
    )
    return dict(zip(("output folder", "run folder"), ends, strict=True))


def test_a_removed_output_folder_is_told(removed):
    end, folder = removed["output folder"]
    assert end.code == 1 and "Traceback" not in end.err
    assert end.err.count(f"{folder} was removed while the run was under way") == 1
    assert "No such file or directory" in end.err


def test_a_removed_output_folder_does_not_cost_the_latents(removed):
    end, folder = removed["output folder"]
    (latents,) = set(re.findall(r"latents=(\S+)", end.err))
    assert load_file(latents)["latents"].shape == (1, 16, 3, 4, 6)
    assert end.files - {str(Path(latents).relative_to(folder))} == set()


def test_a_removed_run_folder_is_no_reason_to_fail(removed):
    end, folder = removed["run folder"]
    assert end.code == 0, end.err
    assert end.err.count("wan-dist: the state cannot be saved (") == 1 and "Traceback" not in end.err
    assert outputs(end) == {"video.mp4", "video.json"}
    assert end.out.splitlines()[-1] == str(folder / "video.mp4")
