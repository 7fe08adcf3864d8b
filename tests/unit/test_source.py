"""Sources of a checkpoint: folders, the package, the tiny one built here, hub ids with and without a cache."""

import shutil
from pathlib import Path

import pytest

from support.checkpoints import TINY, WAN_SHAPES
from support.commands import run
from wan_dist.loading.checkpoint import open_checkpoint, weight_problems
from wan_dist.loading.source import Source, cache_dir
from wan_dist.loading.tensor_files import CheckpointError


def refusal(name: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        Source(name).configs()
    return str(caught.value)


def test_a_folder_is_itself_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it's ${mine}").mkdir()
    for source in (Source("it's ${mine}"), Source(str(tmp_path / "it's ${mine}"))):
        assert source.configs() == source.complete() == tmp_path / "it's ${mine}"


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "nothing", "a/b/c", "../x", "owner/na me", "asset:none", "built:none"]
)
def test_what_is_neither_a_folder_nor_a_hub_id(name):
    assert refusal(name).startswith(f"{name}: no such folder, and not of the form of a hub id")


def test_a_tilde_is_the_shells():
    assert "~ is the shell's" in refusal("~/models/wan")


def test_a_name_too_long_for_a_file_is_refused_too():
    assert "File name too long" in refusal("n" * 300)


def test_a_hub_id_offline_says_what_was_tried():
    message = refusal("nobody/nothing-here")
    assert message.startswith("nobody/nothing-here: no such folder here, and as a hub id")
    assert "\n" not in message


def test_a_model_of_the_package():
    source = Source("asset:wan_shapes")
    assert source.configs() == source.complete() == WAN_SHAPES
    assert weight_problems(open_checkpoint(source.complete())) == []


def test_the_tiny_model_is_built_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = Source("built:tiny")
    assert source.configs() == TINY
    assert not any(tmp_path.iterdir())
    first = source.complete()
    assert first.parent == cache_dir() == tmp_path / "wan_dist"
    assert weight_problems(open_checkpoint(first)) == []
    assert [path.name for path in cache_dir().iterdir()] == [first.name]
    stamps = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert source.complete() == first
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == stamps


@pytest.mark.parametrize("xdg", [None, ""])
def test_the_cache_is_in_the_users_home_by_default(xdg, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert cache_dir() == Path.home() / ".cache" / "wan_dist"


def test_a_hub_id_is_found_in_the_hubs_cache_offline(tmp_path):
    repo = tmp_path / "models--owner--wan"
    snapshot = repo / "snapshots" / "0123abcd"
    shutil.copytree(WAN_SHAPES, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abcd")
    script = "from wan_dist.loading.source import Source as S; s = S('owner/wan'); print(s.configs(), s.complete())"
    done = run(["python", "-c", script], tmp_path, fresh=True, HF_HUB_CACHE=str(tmp_path))
    assert done.stdout.split() == [str(snapshot)] * 2, done.stderr
