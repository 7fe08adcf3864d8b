"""The real training command, in small: stopped in mid-stage, gone on from, and ended with a checkpoint that draws."""

import json
import re
import signal

import pytest
import torch
from diffusers import WanPipeline

from e2e.processes import Running
from support.commands import REPO, run
from support.tiers import ALL

COMMAND = ["python", str(REPO / "launch" / "train_wan_shapes.py"), "--fraction", "0.0006", "--batch", "0.05"]
COMMAND += ["--evaluate", "1", "--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The end of a run that was stopped in its first stage, and of the one that went on from there; their folder."""
    folder = tmp_path_factory.mktemp("training")
    typed = [*COMMAND, "--output", str(folder / "out put")]
    with Running(typed, folder, fresh=ALL) as first:
        line = json.loads(first.process.stdout.readline())
        first.process.send_signal(signal.SIGTERM)
        code = first.finish()
    return line, code, first.err, run(typed, folder), folder / "out put"


def test_a_run_is_stopped_and_gone_on_from(ran):
    line, code, err, done, folder = ran
    assert (line["stage"], line["step"], line["steps"]) == ("autoencoder", 0, 3) and line["psnr"] > 0
    stopped = re.search(r"stopped by SIGTERM after step (\d) of 3 of the autoencoder; its state is saved", err)
    assert code == 75 and stopped and "Traceback" not in err
    assert done.returncode == 0, done.stderr
    assert f"going on from step {stopped[1]} of 3 of the autoencoder" in done.stderr
    *lines, path = done.stdout.splitlines()
    reports = [json.loads(line) for line in lines]
    ends = [(report["stage"], report["step"]) for report in reports if report["step"]]
    assert ends == [("autoencoder", 3), ("denoiser", 3)] and path == str(folder / "checkpoint")
    assert {"colour", "shape", "direction", "background", "all", "loss", "step_s"} <= set(reports[-1])


def test_its_checkpoint_can_be_loaded(ran):
    *_, folder = ran
    pipe = WanPipeline.from_pretrained(folder / "checkpoint")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    settings = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 1, "output_type": "latent"}
    latents = pipe("a red circle moving right on a black background", generator=generator, **settings).frames
    assert latents.shape == (1, 16, 2, 8, 8) and latents.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--seed", "1"], "is the state of a run with --fraction 0.0006 --batch 0.05 --seed 0"),
        (["--fraction", "0"], "argument --fraction: 0 is not above 0"),
        (["--output", "another", "--finetune", "nowhere"], "nowhere: not a checkpoint of wan_shapes: "),
    ],
)
def test_what_cannot_run_is_refused(ran, changes, message):
    *_, folder = ran
    done = run([*COMMAND, "--output", str(folder), *changes], folder)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "another").exists()
