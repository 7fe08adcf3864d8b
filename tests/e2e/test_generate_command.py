"""`wan-dist` and `torchrun launch/generate.py`: the same result, and every file, line and key that was promised."""

import json
import re

import av
import pytest
import torch
from safetensors.torch import load_file

from e2e.processes import files_in, together
from support.commands import torchrun, wan_dist
from support.tiers import ALL

NASTY = """'a "cat", surfing (slow): it's = 100% {x} ${y} ${oc.env:HOME} [a|b] \\ ~\n海上的猫, null \\'"""

HALF_KNOWN = "a red circle moving right, slowly, on a black background"

RECORD_KEYS = {
    *("version", "commit", "config", "request", "mesh", "checkpoint", "libraries"),
    *("attention", "plan", "phases", "steps", "outputs", "ranks"),
}
RANK_KEYS = {
    *("rank", "host", "device", "peak_device_bytes", "peak_host_bytes", "base_host_bytes"),
    *("bytes_read", "bytes_sent"),
}


@pytest.fixture(scope="module")
def cwds(tmp_path_factory):
    return {name: tmp_path_factory.mktemp(name) for name in ("ours", "torchrun", "default")}


@pytest.fixture(scope="module")
def runs(cwds, tiny):
    """Three launches of two ranks each, every one in an empty folder of its own."""
    common = ["model=tiny", f"model.path={tiny}", f"prompt={NASTY}", "parallelism.ulysses=2"]
    own = ["output.dir=it's, here", "output.name=my video", "output.formats=[mp4,latents,frames]"]
    done = together(
        lambda: wan_dist(*common, *own, cwd=cwds["ours"], fresh=True),
        lambda: torchrun(2, *common, "output.formats=[latents]", cwd=cwds["torchrun"], fresh=ALL),
        lambda: wan_dist(f"prompt={HALF_KNOWN}", "output.preview=true", cwd=cwds["default"], fresh=ALL, NO_COLOR=""),
    )
    runs = dict(zip(cwds, done, strict=True))
    for run in runs.values():
        assert run.returncode == 0, run.stderr
    return runs


@pytest.fixture(scope="module")
def folders(cwds, runs):
    """Where each run wrote: a folder it was given, or the only one it made under `outputs`."""
    (by_torchrun,) = (cwds["torchrun"] / "outputs").iterdir()
    (by_default,) = (cwds["default"] / "outputs").iterdir()
    return {"ours": cwds["ours"] / "it's, here", "torchrun": by_torchrun, "default": by_default}


@pytest.fixture(scope="module")
def records(folders):
    names = {"ours": "my video.json", "torchrun": "video.json", "default": "video.json"}
    return {name: json.loads((folders[name] / file).read_text("utf-8")) for name, file in names.items()}


def test_both_launchers_give_the_same_bits(folders):
    ours = load_file(folders["ours"] / "my video.latents.safetensors")["latents"]
    theirs = load_file(folders["torchrun"] / "video.latents.safetensors")["latents"]
    assert ours.dtype == torch.float32 and ours.shape == (1, 16, 3, 4, 6)
    assert torch.equal(ours, theirs)


def test_exactly_the_formats_asked_for_are_written(folders):
    kinds = ("mp4", "latents.safetensors", "frames.safetensors", "json")
    assert files_in(folders["ours"]) == {f"my video.{kind}" for kind in kinds}
    assert files_in(folders["torchrun"]) == {"video.latents.safetensors", "video.json"}
    assert files_in(folders["default"]) == {"video.mp4", "video.json"}
    frames = load_file(folders["ours"] / "my video.frames.safetensors")["frames"]
    assert frames.dtype == torch.uint8 and frames.shape == (9, 32, 48, 3)


def test_nothing_else_is_written(cwds):
    assert [path.name for path in cwds["ours"].iterdir()] == ["it's, here"]
    assert [path.name for path in cwds["torchrun"].iterdir()] == ["outputs"]
    assert [path.name for path in cwds["default"].iterdir()] == ["outputs"]


@pytest.mark.parametrize(("run", "name"), [("ours", "my video"), ("torchrun", "video"), ("default", "video")])
def test_run_directory(folders, run, name):
    assert [path.name for path in (folders[run] / ".run").iterdir()] == [name]
    run_dir = folders[run] / ".run" / name
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.yaml", "plan.txt", "rank0.log", "rank1.log"]
    for rank in (0, 1):
        assert f"rank {rank} of 2" in (run_dir / f"rank{rank}.log").read_text()


@pytest.mark.parametrize("run", ["ours", "torchrun"])
def test_the_prompt_arrives_as_it_was_typed(records, run):
    assert records[run]["request"]["prompt"] == NASTY
    assert records[run]["config"]["prompt"] == NASTY


def test_the_paths_are_printed_the_video_last(runs, folders):
    for run, count in (("ours", 4), ("torchrun", 2), ("default", 2)):
        lines = runs[run].stdout.splitlines()
        assert len(lines) == count
        assert {line.removeprefix(f"{folders[run]}/") for line in lines} == files_in(folders[run])
    assert runs["ours"].stdout.splitlines()[-1] == str(folders["ours"] / "my video.mp4")
    assert runs["default"].stdout.splitlines()[-1] == str(folders["default"] / "video.mp4")


def test_progress_is_shown_once(runs):
    for run, total in (("ours", 4), ("torchrun", 4), ("default", 20)):
        shown = [int(step) for step in re.findall(rf"^step (\d+)/{total}\b", runs[run].stderr, re.MULTILINE)]
        assert shown[0] == 1 and shown[-1] == total and shown == sorted(set(shown))
    assert "Traceback" not in runs["ours"].stderr and "Warning" not in runs["ours"].stderr


@pytest.mark.parametrize("run", ["ours", "torchrun", "default"])
def test_the_record_has_every_key(records, folders, run):
    record = records[run]
    assert set(record) >= RECORD_KEYS
    assert [entry["rank"] for entry in record["ranks"]] == [0, 1]
    for entry in record["ranks"]:
        assert set(entry) >= RANK_KEYS
        assert entry["device"] == "cpu" and entry["peak_device_bytes"] is None
        assert entry["peak_host_bytes"] >= entry["base_host_bytes"] > 0
        assert entry["bytes_read"]["transformer"] > 0 and sum(entry["bytes_sent"].values()) > 0
    assert len(record["steps"]) == record["request"]["steps"] == record["config"]["sampler"]["steps"]
    assert {"encode", "load", "denoise"} <= set(record["phases"])
    assert {"component", "placement", "reason"} == set(record["plan"][0])
    for path in record["outputs"].values():
        assert path.startswith(str(folders[run]))


def test_the_mesh_is_in_the_record(records):
    ones = {"dp": 1, "cfg": 1, "ring": 1, "ulysses": 1, "tp": 1}
    assert records["ours"]["mesh"] == records["torchrun"]["mesh"] == {**ones, "ulysses": 2}
    assert records["default"]["mesh"] == {**ones, "cfg": 2}


def test_the_video_plays(folders):
    with av.open(str(folders["default"] / "video.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.width, stream.height, stream.average_rate) == (64, 64, 8)
        assert sum(1 for _ in container.decode(stream)) == 17


def test_the_default_model_says_what_it_does_not_know(runs):
    assert runs["default"].stderr.count("wan-dist: wan_shapes does not know 'slowly'; it draws") == 1
    assert "does not know" not in runs["ours"].stderr


def test_a_preview_is_shown_beside_the_progress(runs):
    shown = [line for line in runs["default"].stderr.splitlines() if "▀" in line]
    assert len(shown) > 4 and all(line.startswith("\x1b[38;") and line.endswith("\x1b[0m") for line in shown)
    assert "▀" not in runs["default"].stdout and "▀" not in runs["ours"].stderr
