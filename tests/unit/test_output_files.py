"""Output files appear whole or not at all, and only the leftovers of the same name are cleared away."""

import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from wan_dist.output.files import atomic, remove_leftovers, write_tensor
from wan_dist.output.names import output_path

KINDS = {
    "mp4": "clip.mp4", "frames": "clip.frames.safetensors", "latents": "clip.latents.safetensors",
    "record": "clip.json",
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), KINDS.items())
def test_names(tmp_path, kind, name):
    assert output_path(tmp_path, "clip", kind) == tmp_path / name


def test_the_new_file_replaces_the_old_one_only_when_it_is_complete(tmp_path):
    target = tmp_path / "it's $a.mp4"
    target.write_text("old")
    with atomic(target) as scratch:
        assert scratch.parent == tmp_path
        assert scratch.name.endswith(".tmp")
        scratch.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == [target.name]


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("begun", [True, False])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, fault, begun):
    target = tmp_path / "clip.mp4"
    target.write_text("old")
    with pytest.raises(fault), atomic(target) as scratch:
        if begun:
            scratch.write_text("half")
        raise fault
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_a_writer_that_wrote_nothing_is_a_failure(tmp_path):
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "clip.mp4"):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_tensor(tmp_path / "x.safetensors", "x", torch.ones(2))
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == mode


def test_leftovers_of_this_name_go_and_everything_else_stays(tmp_path):
    mine = [f"{name}.tmp" for name in KINDS.values()]
    others = [*KINDS.values(), "clip2.mp4.tmp", "clip.gif.tmp", "other.json.tmp", "aclip.mp4.tmp", "clip.tmp"]
    for name in (*mine, *others):
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path, "clip")
    assert sorted(os.listdir(tmp_path)) == sorted(others)
    remove_leftovers(tmp_path, "clip")


def test_the_name_is_no_pattern(tmp_path):
    (tmp_path / "clip.mp4.tmp").write_text("x")
    remove_leftovers(tmp_path, "*")
    assert os.listdir(tmp_path) == ["clip.mp4.tmp"]


def test_a_tensor_is_written_under_its_name_also_from_a_view(tmp_path):
    tensor = torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)
    write_tensor(tmp_path / "x.safetensors", "latents", tensor)
    loaded = load_file(tmp_path / "x.safetensors")
    assert list(loaded) == ["latents"]
    assert torch.equal(loaded["latents"], tensor)
