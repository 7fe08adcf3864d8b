"""The wheel, installed into a fresh environment, works from an empty folder: package, configs and model are in it."""

import json
import site
import subprocess
import sys

import pytest
import yaml

from e2e.processes import files_in, together
from support.commands import REPO, run


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The folder of a virtual environment with the wheel in it; its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPO)]
    venv = ["-m", "venv", "--without-pip", str(folder / "venv")]
    built, _ = together(*(lambda a=a: subprocess.run([sys.executable, *a], check=True) for a in (build, venv)))
    assert built.returncode == 0
    (wheel,) = folder.glob("*.whl")
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "venv/bin/python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--ignore-installed", str(wheel)], check=True)
    return folder / "venv"


def test_the_wheels_package_is_the_one_imported(environment, tmp_path):
    show = "import wan_dist; print(wan_dist.__file__)"
    done = run([str(environment / "bin/python"), "-c", show], tmp_path)
    assert done.stdout.startswith(str(environment)), done.stdout + done.stderr


def test_the_configs_are_in_it(environment, tmp_path):
    done = run([str(environment / "bin/wan-dist"), "--cfg", "job", "model=wan2_1_t2v_14b"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["model"]["recipe"]["height"] == 720


def test_the_default_model_generates(environment, tmp_path):
    typed = ["prompt=a red circle moving right on a black background", "sampler.steps=2", "output.dir=out"]
    done = run([str(environment / "bin/wan-dist"), *typed], tmp_path)
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path / "out") == {"video.mp4", "video.json"}
    record = json.loads((tmp_path / "out/video.json").read_text())
    assert record["checkpoint"]["path"].startswith(str(environment)) and record["commit"] is None
    assert len(record["ranks"]) == 2
