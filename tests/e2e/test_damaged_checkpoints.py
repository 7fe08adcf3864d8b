"""Checkpoints that are damaged: one error that names file and tensor, soon, and nothing left behind."""

import json
import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from e2e.processes import files_in, processes_about, together
from support.commands import wan_dist


def shards(component: Path) -> list[Path]:
    found = sorted(component.glob("*.safetensors"))
    assert len(found) > 1, "several shards, so that the index matters"
    return found


def truncate(component: Path) -> tuple[str, str]:
    shard = shards(component)[1]
    last = max(header(shard).items(), key=lambda item: item[1]["data_offsets"][1])[0]
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size - 40)
    return shard.name, last


def remove_shard(component: Path) -> tuple[str, str]:
    shard = shards(component)[1]
    name = min(header(shard))
    shard.unlink()
    return shard.name, name


def drop_tensor(component: Path) -> tuple[str, str]:
    return edit(shards(component)[0], lambda tensors, name: tensors.pop(name))


def reshape_tensor(component: Path) -> tuple[str, str]:
    return edit(shards(component)[0], lambda tensors, name: tensors.update({name: tensors[name].flatten()[:-1]}))


def double_tensor(component: Path) -> tuple[str, str]:
    first, second = shards(component)[:2]
    name, tensor = next(iter(load_file(first).items()))
    edit(second, lambda tensors, _: tensors.update({name: tensor}))
    return second.name, name


def edit(shard: Path, change) -> tuple[str, str]:
    """Rewrite a shard after `change(tensors, name)` of its first tensor: the shard's name and the tensor's."""
    tensors = load_file(shard)
    name = next(iter(tensors))
    change(tensors, name)
    save_file(tensors, shard, {"format": "pt"})
    return shard.name, name


def header(shard: Path) -> dict:
    with shard.open("rb") as stream:
        entries = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {name: entry for name, entry in entries.items() if name != "__metadata__"}


# name -> (the damage, the component, parallelism). Of two ranks, only the first reads the VAE: both must end.
CASES = {
    "truncated shard": (truncate, "transformer", "single"),
    "absent tensor": (drop_tensor, "vae", "cfg2"),
    "missing shard": (remove_shard, "transformer", "single"),
    "wrong shape": (reshape_tensor, "text_encoder", "single"),
    "duplicated tensor": (double_tensor, "transformer", "single"),
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory, checkpoints):
    """`{case: (finished command, seconds since a rank told of its failure, folder, damaged file and tensor)}`."""
    healthy = checkpoints(max_shard_size="60KB")

    def attempt(case):
        damage, component, parallelism = CASES[case]
        folder = tmp_path_factory.mktemp("damaged")
        shutil.copytree(healthy, folder / "checkpoint")
        named = damage(folder / "checkpoint" / component)
        typed = ["model=tiny", f"model.path={folder}/checkpoint", "prompt=x", f"parallelism={parallelism}"]
        end = wan_dist(*typed, f"output.dir={folder}/out", cwd=folder)
        told = [json.loads(file.read_text())["time"] for file in (folder / "out").glob(".run/video/failure.rank*.json")]
        return end, time.time() - min(told, default=time.time()), folder, named

    return dict(zip(CASES, together(*(lambda case=case: attempt(case) for case in CASES)), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_one_error_names_file_and_tensor(ends, case):
    end, seconds, _, (file, tensor) = ends[case]
    assert end.returncode in (1, 2) and seconds < 10, end.stderr
    assert end.stderr.count("wan-dist: ") == 1 and "Traceback" not in end.stderr
    assert end.stderr.count(tensor) == 1 and f"{CASES[case][1]}/{file}" in end.stderr


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left(ends, case):
    end, _, folder, _ = ends[case]
    assert end.stdout == "" and files_in(folder / "out") == set()
    assert processes_about(str(folder)) == []
