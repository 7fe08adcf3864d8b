"""Hydra's own flags: --help, --cfg, --info and --multirun, on `wan-dist` and under torchrun."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file

from e2e.processes import together
from support.commands import run, torchrun, wan_dist
from support.tiers import ALL

FLAGS = {
    "help": ["wan-dist", "--help"],
    "job": ["wan-dist", "--cfg", "job", "prompt=a cat, surfing"],
    "info": ["wan-dist", "--info", "defaults"],
    "module": ["python", "-m", "wan_dist", "--cfg", "job", "model=tiny"],
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Each flag's run; Python lists what it imports on stderr."""
    cwd = tmp_path_factory.mktemp("flags")
    done = together(*(lambda a=a: run(a, cwd, fresh=True, PYTHONPROFILEIMPORTTIME="1") for a in FLAGS.values()))
    assert list(cwd.iterdir()) == []
    return dict(zip(FLAGS, done, strict=True))


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_answer_without_torch(flags, flag):
    assert flags[flag].returncode == 0
    imported = {line.rsplit("|", 1)[-1].strip() for line in flags[flag].stderr.splitlines()}
    assert "wan_dist" in imported and not imported & {"torch", "diffusers", "transformers"}


def test_flags_say_what_they_should(flags):
    assert "wan-dist prompt=" in flags["help"].stdout and "cfg2_ulysses4" in flags["help"].stdout
    config = yaml.safe_load(flags["job"].stdout)
    assert config["task"] == "generate" and config["prompt"] == "a cat, surfing"
    assert yaml.safe_load(flags["module"].stdout)["model"]["name"] == "tiny"
    assert "model/wan_shapes" in flags["info"].stdout


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory, tiny):
    """A sweep of three jobs, one of them refused, and one over prompts: the finished run and its jobs' folders."""
    common = ["--multirun", "model=tiny", f"model.path={tiny}", "parallelism=single", "output.formats=[latents]"]
    frames, prompts = tmp_path_factory.mktemp("frames"), tmp_path_factory.mktemp("prompts")
    quoted = ", ".join(["'a cat, (surfing)'", '"it\'s = 100%"'])
    done = together(
        lambda: wan_dist(*common, "prompt=a cat", "video.num_frames=5,6,9", cwd=frames, fresh=ALL),
        lambda: wan_dist(*common, f"prompt={quoted}", cwd=prompts),
    )
    return {"frames": (done[0], job_folders(frames)), "prompts": (done[1], job_folders(prompts))}


def job_folders(cwd):
    """`{job number: folder}` of the only sweep in `cwd`."""
    (sweep,) = cwd.glob("multirun/*/*")
    return {path.name: path for path in sweep.iterdir() if path.is_dir()}


def test_a_refused_job_leaves_the_others_alone(sweeps):
    end, jobs = sweeps["frames"]
    assert end.returncode == 1, end.stderr
    assert end.stderr.count("video.num_frames=6:") == 1 and "Traceback" not in end.stderr
    assert not (jobs["1"] / "video.json").exists()
    latents = {}
    for job, num_frames in (("0", 5), ("2", 9)):
        assert json.loads((jobs[job] / "video.json").read_text())["request"]["num_frames"] == num_frames
        latents[job] = load_file(jobs[job] / "video.latents.safetensors")["latents"]
    assert latents["0"].shape[2] == 2 and latents["2"].shape[2] == 3
    assert not torch.equal(latents["0"], latents["2"][:, :, :2])


def test_quoted_prompts_sweep(sweeps):
    end, jobs = sweeps["prompts"]
    assert end.returncode == 0, end.stderr
    prompts = [json.loads((jobs[job] / "video.json").read_text())["request"]["prompt"] for job in ("0", "1")]
    assert prompts == ["a cat, (surfing)", "it's = 100%"]
    first, second = (load_file(jobs[job] / "video.latents.safetensors")["latents"] for job in ("0", "1"))
    assert first.shape == second.shape and not torch.equal(first, second)


def test_multirun_under_torchrun_is_refused(tmp_path):
    end = torchrun(2, "--multirun", "prompt=a cat", "sampler.seed=1,2", cwd=tmp_path)
    assert end.returncode == 1
    assert len(re.findall("wan-dist --multirun prompt=", end.stderr)) == 1
    assert list(tmp_path.iterdir()) == []


# As the command, which also says at its end whether garbage is collected.
TELLS = """
import gc, sys
from wan_dist.cli import main as cli
leave = cli.leave
def tells(code):
    print("collects:", gc.isenabled(), file=sys.stderr)
    leave(code)
cli.leave = tells
cli.main()
"""


@pytest.mark.parametrize("task", ["plan", "generate"])
def test_an_agent_collects_garbage_once_it_has_a_job(tmp_path, tiny, task):
    """It does not while it composes, nor while it imports torch."""
    typed = [f"task={task}", "model=tiny", f"model.path={tiny}", "prompt=x", "parallelism=single"]
    done = run(["python", "-c", TELLS, *typed, "output.formats=[latents]"], tmp_path)
    assert done.returncode == 0 and "collects: True\n" in done.stderr, done.stderr


def test_under_torchrun_garbage_is_collected_while_a_checkpoint_is_fetched(tmp_path, tiny):
    script = tmp_path / "tells.py"
    script.write_text(
        "import gc, sys\n"
        "from wan_dist.cli import main as cli\n"
        "def tells(*_):\n"
        "    print('collects:', gc.isenabled(), file=sys.stderr)\n"
        "    raise SystemExit(3)\n"
        "cli.check = tells\n"
        "cli.main()\n"
    )
    typed = ["model=tiny", f"model.path={tiny}", "prompt=x"]
    done = run(["torchrun", "--nproc-per-node", "1", str(script), *typed], tmp_path)
    assert done.returncode == 1 and "collects: True\n" in done.stderr, done.stderr
