"""Configurations that cannot run: exit code 2, all reasons with key, value and remedy, nothing written."""

import shutil
import time

import pytest
from PIL import Image

from e2e.processes import together
from support.commands import torchrun, wan_dist

P = "prompt=a cat"
# name -> (overrides, what stderr must say). PLACES stands for the folder that `places` fills.
CASES = {
    "unknown key": ([P, "sampler.stepz=3"], ["sampler.stepz=3", "sampler.steps"]),
    "added key": ([P, "+parallelism.ulyses=2"], ["parallelism.ulyses=2", "parallelism.ulysses"]),
    "wrong type": ([P, "sampler.steps=abc"], ["sampler.steps=abc", "whole number"]),
    "wrong value": ([P, "sampler.solver=magic"], ["sampler.solver=magic", "unipc, euler, dpm++"]),
    "no such model": ([P, "model=huge"], ["model=huge", "tiny", "wan_shapes", "wan2_2_t2v_a14b"]),
    "no such preset": ([P, "parallelism=all"], ["parallelism=all", "auto", "cfg2_ulysses4", "single"]),
    "height": ([P, "video.height=65"], ["video.height=65", "64 or 80"]),
    "height 0": ([P, "video.height=0"], ["video.height=0", "at least 1"]),
    "width": ([P, "video.width=70"], ["video.width=70", "64 or 80"]),
    "frames": ([P, "video.num_frames=18"], ["video.num_frames=18", "17 or 21"]),
    "more ranks than heads": ([P, "parallelism.ulysses=9"], ["parallelism.ulysses=9", "8", "use 1 to 8"]),
    "heads over tp": ([P, "parallelism.tp=3"], ["parallelism.tp=3", "8 attention heads", "use one of 1, 2, 4, 8"]),
    "heads that tp leaves": (
        [P, "parallelism.tp=4", "parallelism.ulysses=3"], ["parallelism.ulysses=3", "use 1 to 2", "ring for the rest"],
    ),
    "replicas": (
        [P, "parallelism=cfg2_ulysses2", "parallelism.fsdp.enabled=on", "parallelism.fsdp.replicate=3"],
        ["parallelism.fsdp.replicate=3", "cfg 2 x ring 1 x ulysses 2 = 4", "use one of 1, 2, 4"],
    ),
    "shard condition": (
        [P, "parallelism.fsdp.shard_conditions=[is_blok]"], ["shard_conditions=is_blok", "is_block", "is_layer"],
    ),
    "no unit": (
        [P, "parallelism=ulysses2", "parallelism.fsdp.enabled=on", "parallelism.fsdp.shard_conditions=[is_layer]"],
        ["shard_conditions=is_layer", "WanTransformer3DModel", "is_block"],
    ),
    "a world that degrees do not fill": (
        ["task=bench", "bench=scale", "bench.worlds=[8,12]", "parallelism.ulysses=8", "bench.videos=[480x832]"],
        ["(2 reasons)", "is 12", "bench.videos=480x832", "480x832x81"],
    ),
    "missing path": ([P, "model.path=PLACES/absent"], ["model.path=PLACES/absent", "no such folder"]),
    "not a checkpoint": ([P, "model.path=PLACES/empty"], ["model.path=PLACES/empty", "model_index.json"]),
    "pickles only": ([P, "model.path=PLACES/pickled"], ["model.path=PLACES/pickled", "model.bin", "safetensors"]),
    "output below a file": ([P, "output.dir=PLACES/blank.txt/sub"], ["output.dir=PLACES/blank.txt/sub", "output.dir="]),
    "empty prompts": (["prompts_file=PLACES/blank.txt"], ["prompts_file=PLACES/blank.txt", "empty", "a prompt a line"]),
    "no image": ([P, "model.path=PLACES/image"], ["image=null", "makes a video of an image", "give one: image=FILE"]),
    "an image for text": ([P, "image=PLACES/good.png"], ["image=PLACES/good.png", "text alone", "leave it out"]),
    "damaged images": (
        [P, "model.path=PLACES/image", "image=PLACES/cut.png", "last_image=PLACES/blank.txt"],
        ["(2 reasons)", "image=PLACES/cut.png", "damaged", "last_image=PLACES/blank.txt", "not a picture", "PNG"],
    ),
    "a last image too many": (
        [P, "model.path=PLACES/encoded", "image=PLACES/good.png", "last_image=PLACES/good.png"],
        ["(1 reason)", "last_image=PLACES/good.png", "takes no last image", "leave it out"],
    ),
    "no last image": (
        [P, "model.path=PLACES/between", "image=PLACES/good.png"],
        ["(1 reason)", "last_image=null", "between two images", "last_image=FILE"],
    ),
    "latents to generate from": ([P, "latents=PLACES/blank.txt"], ["latents=PLACES/blank.txt", "only task=decode"]),
    "no steps": ([P, "sampler.steps=0"], ["sampler.steps=0", "at least 1"]),
    "no prompt": ([], ["prompt=null", 'prompt="']),
    "cfg unguided": (
        [P, "parallelism.cfg=2", "sampler.guidance_scale=1"],
        ["parallelism.cfg=2", "guidance_scale", "parallelism.cfg=1"],
    ),
    "sweep without --multirun": ([P, "sampler.steps=1,2"], ["sampler.steps=1,2", "--multirun"]),
    "unreadable": ([P, "sampler.steps=("], ["sampler.steps=("]),
    "bad group and bad values": (
        ["sampler=nope", "video.height=65", "output.formats=[gif]"],
        ["(4 reasons)", "sampler=nope", "video.height=65", "output.formats=gif", "prompt=null"],
    ),
    "bad model and bad values": ([P, "model=nope", "sampler.steps=0"], ["(2 reasons)", "sampler.steps=0"]),
    "a table of keys": ([P, "sampler={steps: 3, foo: 3}"], ["sampler.foo=3", "no such key"]),
    "a user's experiment": (
        ["--config-dir", "PLACES/mine", "experiment=mine", "video.height=65"],
        ["(1 reason)", "video.height=65"],
    ),
    "several": (
        ["sampler.stepz=3", "sampler.steps=0", "video.height=65", "video.num_frames=18", "parallelism.ulysses=9"],
        ["(6 reasons)", "prompt=null", "sampler.stepz=3", "sampler.steps=0", "video.height=65", "video.num_frames=18",
         "parallelism.ulysses=9"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny, checkpoints):
    """Paths that cannot be used: an empty folder, a blank file, a damaged picture, a checkpoint whose weights are
    pickles. And a good picture, with three image-to-video models that are not asked as they want to be."""
    places = tmp_path_factory.mktemp("places")
    (places / "empty").mkdir()
    (places / "blank.txt").write_text("\n  \n")
    (places / "mine" / "experiment").mkdir(parents=True)
    (places / "mine" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nprompt: a cat\nparallelism: {vae: off}\nsampler: {steps: 3}\n"
    )
    Image.linear_gradient("L").save(places / "good.png")
    (places / "cut.png").write_bytes((places / "good.png").read_bytes()[:300])
    models = {"image": "wan2.2 a14b", "encoded": "wan2.1", "between": "wan2.1 first and last"}
    for name, kind in models.items():
        (places / name).symlink_to(checkpoints.of_images(kind))
    shutil.copytree(tiny, places / "pickled")
    for weights in (places / "pickled").glob("*/*.safetensors*"):
        weights.unlink()
    for component in ("transformer", "text_encoder", "vae"):
        (places / "pickled" / component / "model.bin").write_bytes(b"\x80")
    return places


@pytest.fixture(scope="module")
def answers(places, tmp_path_factory):
    """`{case: (finished command, seconds, its working folder)}`."""

    def answer(case):
        cwd = tmp_path_factory.mktemp("cwd")
        begin = time.monotonic()
        end = wan_dist(*(text.replace("PLACES", str(places)) for text in CASES[case][0]), cwd=cwd, fresh=True)
        return end, time.monotonic() - begin, cwd

    return dict(zip(CASES, together(*(lambda case=case: answer(case) for case in CASES)), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_refused_before_anything_starts(answers, places, case):
    end, seconds, cwd = answers[case]
    assert end.returncode == 2, end.stderr
    for text in CASES[case][1]:
        assert text.replace("PLACES", str(places)) in end.stderr
    assert "Traceback" not in end.stderr and end.stdout == ""
    assert seconds < 5
    assert list(cwd.iterdir()) == []


def test_degrees_that_are_not_torchruns_world(tmp_path):
    end = torchrun(
        2, P, "parallelism.ulysses=3", "parallelism.cfg=1", cwd=tmp_path, fresh=True, PYTHONPROFILEIMPORTTIME="1"
    )
    assert end.returncode == 1
    message = "ulysses 3 is a mesh of 3, but torchrun's world is 2"
    assert end.stderr.count(message) == 1
    imported = {line.rsplit("|", 1)[-1].strip() for line in end.stderr.splitlines()}
    assert "torch" in imported and not imported & {"diffusers", "transformers"}  # so no weight was read
    assert list(tmp_path.iterdir()) == []
