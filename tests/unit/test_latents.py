"""Files of latents: what they say of themselves, what `task=decode` takes over from them, and what it refuses."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wan_dist.agent.prepare import Invocation, check
from wan_dist.config.schema import Config
from wan_dist.loading.latents import FPS, MODEL, describe_latents
from wan_dist.loading.tensor_files import CheckpointError
from wan_dist.output.files import write_tensor
from wan_dist.planning.refusal import RefusedError

LATENTS = torch.zeros(1, 16, 3, 4, 6)


def saved(folder: Path, name: str = "latents", tensor: torch.Tensor = LATENTS, **metadata: str) -> Path:
    file = folder / "a clip.safetensors"
    save_file({name: tensor}, file, metadata or None)
    return file


def decode(folder: Path, latents: Path, model: Path | None, **video) -> Config:
    config = Config(task="decode", latents=str(latents))
    config.model.path = None if model is None else str(model)
    for name, value in video.items():
        setattr(config.video, name, value)
    return check(config, Invocation(recipe_named=False, default_dir=folder / "out")).config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_a_file_says(tmp_path, dtype):
    file = saved(tmp_path, tensor=LATENTS.to(dtype), **{MODEL: "/a model", FPS: "23.976"})
    described = describe_latents(file)
    assert (described.shape, described.model_path, described.fps) == ((1, 16, 3, 4, 6), "/a model", 23.976)


@pytest.mark.parametrize("rate", ["", "nan", "-1", "0", "inf", "fast", "0.0001"])
def test_a_rate_that_is_none_is_not_taken(tmp_path, rate):
    assert describe_latents(saved(tmp_path, **{FPS: rate})).fps is None
    assert describe_latents(saved(tmp_path)).model_path is None


@pytest.mark.parametrize(
    ("name", "tensor", "why"),
    [
        ("frames", LATENTS, "no tensor 'latents' (but frames)"),
        ("latents", LATENTS[0], "F32 of shape (16, 3, 4, 6)"),
        ("latents", LATENTS.expand(2, -1, -1, -1, -1).contiguous(), "shape (2, 16"),
        ("latents", LATENTS.to(torch.uint8), "U8"),
        ("latents", LATENTS[..., :0].contiguous(), "shape (1, 16, 3, 4, 0)"),
    ],
)
def test_tensors_that_are_no_latents(tmp_path, name, tensor, why):
    with pytest.raises(CheckpointError, match=r"a clip\.safetensors") as caught:
        describe_latents(saved(tmp_path, name, tensor))
    assert why in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a safetensors file, by far", None])
def test_files_that_are_no_latents(tmp_path, content):
    file = tmp_path / "x"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"truncated|no such file"):
        describe_latents(file)


def test_the_video_is_that_of_the_latents(tmp_path, tiny, monkeypatch):
    write_tensor(tmp_path / "x", "latents", LATENTS, {MODEL: str(tiny), FPS: "5.0"})
    monkeypatch.chdir(tmp_path)
    config = decode(tmp_path, Path("x"), None)
    assert (config.video.num_frames, config.video.height, config.video.width, config.video.fps) == (9, 32, 48, 5.0)
    assert (config.latents, config.model.path) == (str(tmp_path / "x"), str(tiny))


def test_what_is_given_comes_before_what_the_file_says(tmp_path, tiny):
    file = saved(tmp_path, **{MODEL: "/elsewhere", FPS: "5.0"})
    config = decode(tmp_path, file, tiny, fps=24.0, height=32)
    assert (config.model.path, config.video.fps) == (str(tiny), 24.0)


@pytest.mark.parametrize(
    ("channels", "video", "key"),
    [(16, {"height": 64}, "video.height"), (16, {"num_frames": 5}, "video.num_frames"), (48, {}, "latents")],
)
def test_what_does_not_fit_is_refused(tmp_path, tiny, channels, video, key):
    file = saved(tmp_path, tensor=torch.zeros(1, channels, 3, 4, 6))
    with pytest.raises(RefusedError) as caught:
        decode(tmp_path, file, tiny, **video)
    assert [refusal.key for refusal in caught.value.refusals] == [key]


def test_latents_are_for_decoding_alone(tmp_path, tiny):
    config = Config(prompt="x", latents=str(saved(tmp_path)))
    config.model.path = str(tiny)
    with pytest.raises(RefusedError, match="only task=decode"):
        check(config, Invocation(recipe_named=False, default_dir=tmp_path))
    with pytest.raises(RefusedError, match="needs latents"):
        check(Config(task="decode"), Invocation(recipe_named=False, default_dir=tmp_path))
