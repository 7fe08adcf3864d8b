"""Files of latents: what they say of themselves, what `task=decode` takes over from them, and what it refuses."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wan_dist.agent.prepare import Invocation, check
from wan_dist.config.schema import Config
from wan_dist.loading.latents import describe_latents, origin_metadata
from wan_dist.loading.tensor_files import CheckpointError
from wan_dist.output.files import write_tensor
from wan_dist.planning.refusal import RefusedError

LATENTS = torch.zeros(1, 16, 3, 4, 6)


def made_by(model: Path | str, fps: float = 5.0) -> Config:
    """A resolved config of the run that wrote the latents."""
    config = Config(prompt="a cat: '猫' ${x}", negative_prompt="rain", image="/pictures/first \udcff.png")
    config.model.path, config.video.fps = str(model), fps
    config.sampler.steps, config.sampler.seed, config.sampler.solver = 7, 2**63, "euler"
    config.sampler.guidance_scale = 4
    return config


def saved(folder: Path, name: str = "latents", tensor: torch.Tensor = LATENTS, run: Config | None = None) -> Path:
    file = folder / "a clip.safetensors"
    save_file({name: tensor}, file, origin_metadata(run) if run else None)
    return file


def decode(folder: Path, latents: Path, model: Path | None, **video) -> Config:
    config = Config(task="decode", latents=str(latents))
    config.model.path = None if model is None else str(model)
    for name, value in video.items():
        setattr(config.video, name, value)
    return check(config, Invocation(recipe_named=False, default_dir=folder / "out")).config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_a_file_says(tmp_path, dtype):
    run = made_by("/a model", 23.976)
    described = describe_latents(saved(tmp_path, tensor=LATENTS.to(dtype), run=run))
    assert (described.shape, described.model_path, described.fps) == ((1, 16, 3, 4, 6), "/a model", 23.976)
    assert described.request == {"prompt": run.prompt, "negative_prompt": "rain", "image": run.image}
    assert described.sampler == {"steps": 7, "seed": 2**63, "solver": "euler", "guidance_scale": 4}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"fps": 0.0001, "model": ""}',
        '{"fps": true, "model": 3, "request": [], "sampler": 1}',
        '{"sampler": {"steps": "many", "seed": 1.5, "other": 1, "solver": 2}, "request": {"prompt": 4, "path": "x"}}',
    ],
)
def test_what_another_program_wrote_is_not_taken(tmp_path, text):
    save_file({"latents": LATENTS}, tmp_path / "x", {"wan_dist": text})
    found = describe_latents(tmp_path / "x")
    assert (found.model_path, found.fps, found.request, found.sampler) == (None, None, {}, {})


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


def test_the_video_and_the_request_are_those_of_the_latents(tmp_path, tiny, monkeypatch):
    run = made_by(tiny)
    write_tensor(tmp_path / "x", "latents", LATENTS, origin_metadata(run))
    monkeypatch.chdir(tmp_path)
    config = decode(tmp_path, Path("x"), None)
    assert (config.video.num_frames, config.video.height, config.video.width, config.video.fps) == (9, 32, 48, 5.0)
    assert (config.latents, config.model.path) == (str(tmp_path / "x"), str(tiny))
    assert (config.prompt, config.negative_prompt, config.image) == (run.prompt, "rain", run.image)
    assert config.sampler == run.sampler


def test_what_is_given_comes_before_what_the_file_says(tmp_path, tiny):
    config = decode(tmp_path, saved(tmp_path, run=made_by("/elsewhere")), tiny, fps=24.0, height=32)
    assert (config.model.path, config.video.fps) == (str(tiny), 24.0)


def test_what_nobody_says_stays_unknown(tmp_path, tiny):
    config = decode(tmp_path, saved(tmp_path), tiny)
    assert (config.prompt, config.sampler, config.video.fps) == (None, Config().sampler, 16)


@pytest.mark.parametrize(("run", "why"), [(None, "does not say which model"), (made_by("/gone"), "made with /gone")])
def test_a_model_that_nobody_names_is_asked_for(tmp_path, run, why):
    with pytest.raises(RefusedError) as caught:
        decode(tmp_path, saved(tmp_path, run=run), None)
    (refusal,) = caught.value.refusals
    assert refusal.key == "latents" and why in refusal.why and "model=NAME" in refusal.remedy


@pytest.mark.parametrize(
    ("channels", "video", "key"),
    [(16, {"height": 64}, "video.height"), (16, {"num_frames": 5}, "video.num_frames"), (48, {}, "latents")],
)
def test_what_does_not_fit_is_refused(tmp_path, tiny, channels, video, key):
    file = saved(tmp_path, tensor=torch.zeros(1, channels, 3, 4, 6))
    with pytest.raises(RefusedError) as caught:
        decode(tmp_path, file, tiny, **video)
    assert [refusal.key for refusal in caught.value.refusals] == [key]


def refusals(folder: Path, tiny: Path, **settings) -> list[tuple[str, str]]:
    config = Config(prompt="x")
    config.model.path, config.output.dir = str(tiny), str(folder)
    for key, value in settings.items():
        setattr(config.output if key in ("name", "formats") else config, key, value)
    try:
        check(config, Invocation(recipe_named=False, default_dir=folder))
    except RefusedError as error:
        return [(refusal.key, refusal.why) for refusal in error.refusals]
    return []


def test_latents_are_for_decoding_alone(tmp_path, tiny):
    assert refusals(tmp_path, tiny, latents=str(saved(tmp_path))) == [("latents", "only task=decode reads it")]
    assert refusals(tmp_path, tiny, task="decode") == [("latents", "task=decode needs latents")]
    for key in ("image", "last_image"):
        for task in ("decode", "bench"):
            given = {"task": task, "latents": str(saved(tmp_path)) if task == "decode" else None, key: "a.png"}
            assert refusals(tmp_path, tiny, **given) == [(key, "only task=generate reads it")]


def test_what_a_run_reads_it_neither_writes_nor_removes(tmp_path, tiny):
    file = saved(tmp_path)
    for name in ("clip.latents.safetensors", "clip.mp4", "clip.mp4.tmp"):
        shutil.copy(file, tmp_path / name)
    decode = {"task": "decode", "name": "clip"}
    assert refusals(tmp_path, tiny, latents=str(tmp_path / "clip.latents.safetensors"), **decode) == []
    for latents, formats in (("clip.latents.safetensors", ["mp4", "latents"]), ("clip.mp4.tmp", ["frames"])):
        ((key, why),) = refusals(tmp_path, tiny, latents=str(tmp_path / latents), formats=formats, **decode)
        assert key == "latents" and f"writes (or removes) {latents} itself" in why
    assert [key for key, _ in refusals(tmp_path, tiny, formats=["gif"])] == ["output.formats"]
    (tmp_path / "link").symlink_to(tmp_path)
    found = refusals(tmp_path, tiny, image=str(tmp_path / "link" / "clip.mp4"), name="clip")
    assert ("image", "this run writes (or removes) clip.mp4 itself") in found
