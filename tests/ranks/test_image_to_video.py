"""Videos of images: diffusers' own on one rank and on many, for every kind of Wan model that takes an image."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_timestep_embedding
from diffusers.utils import load_image
from PIL import Image

from support.checkpoints import KINDS, diffusers_answer
from support.ranks import frozen, generate_all, run_cases, run_generation
from support.sharded import load, match, mesh_of, save_transformer
from support.tiers import in_all
from wan_dist.layers.sequence import split_sizes
from wan_dist.pipeline import generate as generating

SMALL = {"video.height": 32, "video.width": 48, "video.num_frames": 9}
LARGE = {"video.height": 64, "video.width": 96, "video.num_frames": 9}  # 6 tokens in each of 3 latent frames
ONE_FRAME = {"video.num_frames": 1}
GUIDED, UNGUIDED = {"sampler.guidance_scale": 4.0}, {"sampler.guidance_scale": 1.0}
FRAMES = {"output.formats": ["latents", "frames"]}
FIRST, LAST = {"image": "first"}, {"last_image": "last"}
TWO_SCALES = {"sampler.guidance_scale": 4.0, "sampler.guidance_scale_2": 3.0}

# With sequence, the first of three latent frames of 6 tokens ends inside the second rank's: they have 5, 5, 4 and 4.
MESHES = {
    "one": {"cfg": 1},
    "tp": {"tp": 2},
    "ring": {"ring": 2},
    "halves": {"cfg": 2, "ulysses": 2},
    "sequence": {"ring": 2, "ulysses": 2},
    "sharded": {"ring": 2, "fsdp.enabled": "on"},
}
ALL = ("one", "tp", "ring", "halves")
MORE = in_all("tp", "halves")
LIMITS = {"tp": 5e-5, "ring": 2e-5, "sharded": 2e-5, "halves": 1e-5, "sequence": 1e-5}  # from one rank

# name -> kind of model, request, meshes
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "wan2.1": ("wan2.1", {**FIRST, **SMALL, **GUIDED}, ALL),
    "wan2.1 unguided": ("wan2.1", {**FIRST, **SMALL, **UNGUIDED}, ("one", *in_all("sequence"))),
    "wan2.1 of one frame": ("wan2.1", {**FIRST, **SMALL, **ONE_FRAME, **GUIDED}, ("one", "ring")),
    "wan2.1 first and last": (
        "wan2.1 first and last",
        {**FIRST, **LAST, **SMALL, **GUIDED},
        ("one", "ring", "sharded", *MORE),
    ),
    "a14b": ("wan2.2 a14b", {**FIRST, **SMALL, **TWO_SCALES}, ("one", "tp")),
    "a14b first and last": ("wan2.2 a14b", {**FIRST, **LAST, **SMALL, **GUIDED}, ("one", *in_all("ring"), *MORE)),
    "ti2v of text": ("wan2.2 ti2v", {**LARGE, **GUIDED}, ("one", "ring")),
    "ti2v": ("wan2.2 ti2v", {**FIRST, **LARGE, **GUIDED, **FRAMES}, (*ALL, *in_all("sharded"))),
    "ti2v unguided": ("wan2.2 ti2v", {**FIRST, **LARGE, **UNGUIDED}, ("one", "sequence")),
    "ti2v of one frame": ("wan2.2 ti2v", {**FIRST, **LARGE, **ONE_FRAME, **GUIDED}, ("one", "sequence")),
}
RUNS = [(name, mesh) for name, (_, _, meshes) in CASES.items() for mesh in meshes]
OTHERS = [(name, mesh) for name, mesh in RUNS if mesh != "one"]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, str]:
    """Of other sizes and shapes than the video, the second one lying on its side."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    first, last = (Image.fromarray(picture(generator, *size)) for size in ((52, 70), (41, 90)))
    turned = Image.Exif()
    turned[0x0112] = 6
    first.save(folder / "first.png")
    last.save(folder / "last.jpg", exif=turned)
    return {"first": str(folder / "first.png"), "last": str(folder / "last.jpg")}


def picture(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A slope of colour under noise."""
    slope = np.linspace(0, 160, width)[None, :, None] * [1.0, 0.6, 0.2] + np.linspace(0, 60, height)[:, None, None]
    return (slope + generator.uniform(0, 30, (height, width, 3))).clip(0, 255).astype(np.uint8)


def with_files(request: dict[str, Any], pictures: dict[str, str]) -> dict[str, Any]:
    return {key: pictures[value] if key in ("image", "last_image") else value for key, value in request.items()}


def saving_condition(run, *args):
    """`encode_condition`, which also leaves on disk what it returned on the first rank."""
    condition = encode_condition(run, *args)
    if run.is_first:
        torch.save(condition.__dict__, Path(run.config.output.dir) / f"{run.config.output.name}.condition")
    return condition


encode_condition = generating.encode_condition


@pytest.fixture(scope="module")
def runs(tmp_path_factory, checkpoints, pictures) -> dict[tuple[str, str], dict[str, Any]]:
    """By case and mesh: `latents`, `frames` and `condition` (the fields of the Condition), each run once."""
    folder, asked = tmp_path_factory.mktemp("runs"), []
    for name, mesh in RUNS:
        kind, request, _ = CASES[name]
        path = checkpoints.of_images(kind, published_names=name == "wan2.1 unguided")
        degrees = {f"parallelism.{axis}": degree for axis, degree in {"ulysses": 1, **MESHES[mesh]}.items()}
        asked.append((path, {**with_files(request, pictures), **degrees, "parallelism.vae": "on"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generating, "encode_condition", saving_condition)
        done = generate_all(folder, asked)
    conditions = [torch.load(folder / f"video{number}.condition") for number in range(len(RUNS))]
    return {key: {**run, "condition": condition} for key, run, condition in zip(RUNS, done, conditions, strict=True)}


def request_of_diffusers(request: dict[str, Any], pictures: dict[str, str]) -> dict[str, Any]:
    names = {"sampler.guidance_scale": "guidance_scale", "sampler.guidance_scale_2": "guidance_scale_2"}
    call = {"prompt": "a cat, surfing", "num_inference_steps": 3}
    for key, value in request.items():
        if key in ("image", "last_image"):
            call[key] = load_image(pictures[value])
        elif key != "output.formats":
            call[names.get(key, key.removeprefix("video."))] = value
    return call


@pytest.fixture(scope="module")
def theirs(checkpoints, pictures):
    """`theirs(name)`: diffusers' latents for a case."""

    @functools.cache
    def answer(name: str) -> torch.Tensor:
        kind, request, _ = CASES[name]
        return diffusers_answer(checkpoints.of_images(kind), **request_of_diffusers(request, pictures))

    return answer


@pytest.mark.parametrize(("name", "mesh"), RUNS)
def test_latents_are_those_of_diffusers(runs, theirs, name, mesh):
    assert distance(runs[name, mesh]["latents"], theirs(name)) <= 1e-4


@pytest.mark.parametrize(("name", "mesh"), OTHERS)
def test_every_mesh_gives_the_video_of_one_rank(runs, name, mesh):
    assert distance(runs[name, mesh]["latents"], runs[name, "one"]["latents"]) <= LIMITS[mesh]


@pytest.mark.parametrize("name", [name for name, mesh in OTHERS if mesh == "sharded"])
def test_sharded_weights_give_the_same_bits(runs, name):
    assert torch.equal(runs[name, "sharded"]["latents"], runs[name, "ring"]["latents"])


@pytest.mark.parametrize(("name", "mesh"), OTHERS)
def test_every_mesh_is_shown_the_same_images(runs, name, mesh):
    one, there = (runs[name, where]["condition"] for where in ("one", mesh))
    assert there.keys() == one.keys()
    for key, value in one.items():
        assert value is None if there[key] is None else distance(there[key], value) <= 2e-5, key


@pytest.mark.parametrize("name", CASES)
def test_a_condition_is_fp32_and_its_fields_are_those_of_the_kind(runs, name):
    kind, request, _ = CASES[name]
    fields = {key: value for key, value in runs[name, "one"]["condition"].items() if value is not None}
    wanted = set()
    if "image" in request:
        wanted = {"frame"} if kind == "wan2.2 ti2v" else {"channels"}
    assert fields.keys() == wanted | ({"image_tokens"} if kind.startswith("wan2.1") else set())
    assert all(value.dtype == torch.float32 for value in fields.values())


def test_the_last_image_counts_where_a_model_may_take_one(runs):
    both, first = (runs[name, "one"]["condition"]["channels"] for name in ("a14b first and last", "a14b"))
    assert distance(both[:, :, -1], first[:, :, -1]) > 0.1
    assert torch.equal(both[:, :, 0], first[:, :, 0])  # the VAE is causal


def test_the_first_latent_frame_is_the_image(runs):
    """Of Wan2.2 TI2V: it is not denoised, and the others are."""
    for key in (("ti2v", "one"), ("ti2v", "halves"), ("ti2v unguided", "sequence"), ("ti2v of one frame", "sequence")):
        run = runs[key]
        assert torch.equal(run["latents"][:, :, :1], run["condition"]["frame"])
    assert distance(runs["ti2v", "one"]["latents"][:, :, 1:], runs["ti2v of text", "one"]["latents"][:, :, 1:]) > 0.1


def test_frames(runs, checkpoints, pictures):
    kind, request, _ = CASES["ti2v"]
    call = request_of_diffusers(request, pictures)
    theirs = torch.from_numpy(diffusers_answer(checkpoints.of_images(kind), **call, output_type="np")[0])
    for mesh in ALL:
        frames = runs["ti2v", mesh]["frames"]
        assert frames.dtype == torch.uint8 and frames.shape == (9, 64, 96, 3)
        assert distance(frames / 255, theirs) <= 1 / 255 + 1e-3


@pytest.mark.parametrize(
    ("ranks", "size"),
    [
        ({"ring": 2, "vae": "off"}, LARGE),
        ({"ring": 3, "vae": "on"}, {**LARGE, "video.height": 32, "video.num_frames": 5}),  # two rows of latents
    ],
)
def test_frames_where_some_ranks_have_no_rows_of_the_video(tmp_path, checkpoints, pictures, ranks, size):
    request = {**with_files(FIRST, pictures), **size, **UNGUIDED, **FRAMES}
    path = checkpoints.of_images("wan2.2 ti2v")
    degrees = {f"parallelism.{axis}": degree for axis, degree in ranks.items()}
    one, many = generate_all(tmp_path, [(path, request), (path, {**request, **degrees, "runtime.timeout_s": 20.0})])
    assert distance(many["frames"].int(), one["frames"].int()) <= 1


def test_the_record_names_what_was_loaded(runs):
    components = {
        name: [row["component"] for row in runs[name, "one"]["record"]["plan"]]
        for name in ("wan2.1", "a14b", "ti2v", "ti2v unguided", "ti2v of text")
    }
    assert components == {
        "wan2.1": ["text_encoder", "image_encoder", "transformer", "vae"],
        "a14b": ["text_encoder", "transformer", "transformer_2", "vae"],
        "ti2v": ["text_encoder", "transformer", "vae"],
        "ti2v unguided": ["text_encoder", "transformer", "vae"],
        "ti2v of text": ["text_encoder", "transformer"],
    }


def rename_image(checkpoint: Path, pictures: Path) -> None:
    (pictures / "it.png").rename(pictures / "elsewhere.png")


def cut_image(checkpoint: Path, pictures: Path) -> None:
    (pictures / "it.png").write_bytes((pictures / "it.png").read_bytes()[:300])


def forget_processor(checkpoint: Path, pictures: Path) -> None:
    index = json.loads((checkpoint / "model_index.json").read_text())
    del index["image_processor"]
    (checkpoint / "model_index.json").write_text(json.dumps(index))


def break_processor(checkpoint: Path, pictures: Path) -> None:
    (checkpoint / "image_processor" / "preprocessor_config.json").write_text('{"size": "big"}')


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (rename_image, "it.png: is not there"),
        (cut_image, "it.png: cannot be read"),
        (forget_processor, "names no image_processor"),
        (break_processor, "image_processor: cannot be used"),
    ],
)
def test_what_is_harmed_after_the_check_ends_all_ranks_with_the_file_named(
    tmp_path, checkpoints, pictures, harm, named
):
    checkpoint = shutil.copytree(checkpoints.of_images("wan2.1"), tmp_path / "checkpoint")
    shutil.copy(pictures["first"], tmp_path / "it.png")
    request = {"image": str(tmp_path / "it.png"), **SMALL, **UNGUIDED}
    config = frozen(tmp_path, checkpoint, **request, **{"parallelism.ring": 2, "runtime.timeout_s": 20.0})
    harm(checkpoint, tmp_path)
    with pytest.raises(AssertionError) as caught:
        run_cases(2, run_generation, [(config,)])
    errors = [line for line in str(caught.value).splitlines() if "CheckpointError: " in line]
    assert len(errors) == 2 and "RemoteCheckpointError" in errors[1]
    assert all(named in line for line in errors)


def recorded_timesteps(env, config) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of a generation, for each forward: the timesteps that reach the embedder, and what it makes of them before its
    first linear."""
    values, features = [], []

    def proj(self, timesteps, forward=Timesteps.forward):
        values.append(timesteps.clone())
        return forward(self, timesteps)

    def embed(self, sample, *args, forward=TimestepEmbedding.forward):
        features.append(sample.clone())
        return forward(self, sample, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Timesteps, "forward", proj)
        patch.setattr(TimestepEmbedding, "forward", embed)
        run_generation(env, config)
    return list(zip(values, features, strict=True))


@pytest.mark.parametrize(("solver", "first"), [("unipc", 999.0), ("euler", 1000.0)])
def test_two_timesteps_are_embedded_in_fp32_whatever_the_number_of_tokens(
    tmp_path, checkpoints, pictures, solver, first
):
    kind, request, _ = CASES["ti2v unguided"]
    settings = {**with_files(request, pictures), "sampler.solver": solver, "runtime.dtype": "bfloat16"}
    config = frozen(tmp_path, checkpoints.of_images(kind), **settings, **{"parallelism.cfg": 1})
    ((forwards,),) = run_cases(1, recorded_timesteps, [(config,)])
    assert len(forwards) == 3
    times = torch.tensor([values.flatten().tolist() for values, _ in forwards])
    assert times[:, 0].tolist() == [0.0] * 3
    assert times[0, 1] == first and (times[1:, 1] < times[:-1, 1]).all()
    for values, features in forwards:
        assert values.numel() == 2 and not (values.is_floating_point() and values.dtype != torch.float32)
        exact = get_timestep_embedding(values.flatten(), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
        assert features.dtype == torch.float32 and torch.equal(features.flatten(0, -2), exact)


def test_one_timestep_is_embedded_where_there_is_no_image(tmp_path, checkpoints):
    config = frozen(tmp_path, checkpoints.of_images("wan2.2 ti2v"), **LARGE, **UNGUIDED, **{"parallelism.cfg": 1})
    ((forwards,),) = run_cases(1, recorded_timesteps, [(config,)])
    assert [values.numel() for values, _ in forwards] == [1, 1, 1]


# degrees, latent frames, rows and columns -> tokens of the ranks of the sequence axis; a latent frame has
# rows / 2 * columns / 2 of them
SEAMS = [
    ({"ring": 2}, (3, 10, 14), [53, 52]),  # 35 a frame: it ends inside the first rank
    ({"ring": 2}, (1, 2, 10), [3, 2]),  # both are all inside it
    ({"ring": 2}, (1, 2, 2), [1, 0]),
    ({"tp": 2}, (3, 10, 14), [105]),
    ({"ring": 3}, (3, 2, 10), [5, 5, 5]),  # it is the first rank
    ({"ring": 3}, (2, 2, 10), [4, 3, 3]),  # it ends inside the second
    ({"ulysses": 2, "ring": 2}, (2, 6, 10), [8, 8, 7, 7]),  # one rank, and most of another
    ({"ulysses": 4}, (2, 2, 10), [3, 3, 2, 2]),
    ({"tp": 2, "ring": 2}, (2, 2, 10), [5, 5]),
    ({"tp": 2, "ring": 2}, (3, 2, 6), [5, 4]),
]
HIDDEN_FIRST, HIDDEN_OTHERS = [0.0, 0.0], [999.0, 500.5]  # of a batch of two


def inputs_of(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 16, *shape, generator=generator),
        "encoder_hidden_states": torch.randn(2, 512, 32, generator=generator),
    }


@torch.no_grad()
def forward_with_two_timesteps(env, folder, degrees, shape, fsdp) -> torch.Tensor:
    with mesh_of(env, **degrees) as mesh:
        transformer = load(mesh, match(mesh, folder), fsdp=fsdp)
        timesteps = torch.tensor([HIDDEN_FIRST, HIDDEN_OTHERS]).T
        return transformer(**inputs_of(shape), timestep=timesteps, return_dict=False)[0]


@torch.no_grad()
def forward_with_a_timestep_per_token(folder, shape: tuple[int, ...]) -> torch.Tensor:
    """As diffusers does it."""
    frames, rows, columns = shape
    per_frame = rows // 2 * columns // 2
    first, others = (torch.tensor(values)[:, None] for values in (HIDDEN_FIRST, HIDDEN_OTHERS))
    timesteps = torch.cat([first.expand(2, per_frame), others.expand(2, (frames - 1) * per_frame)], dim=1)
    return WanTransformer3DModel.from_pretrained(folder)(**inputs_of(shape), timestep=timesteps, return_dict=False)[0]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_wherever_the_first_frame_ends_its_tokens_alone_have_its_timestep(tmp_path, ranks):
    folder = save_transformer(tmp_path)
    seams = [seam for seam in SEAMS if torch.Size(seam[0].values()).numel() == ranks]
    cases = [(folder, degrees, shape, fsdp) for degrees, shape, _ in seams for fsdp in {False, "tp" in degrees}]
    results = run_cases(ranks, forward_with_two_timesteps, cases)
    for (_, degrees, shape, fsdp), by_rank in zip(cases, results, strict=True):
        expected = forward_with_a_timestep_per_token(folder, shape)
        for out in by_rank:
            assert distance(out, expected) <= 5e-5, (degrees, shape, fsdp)
    for degrees, (frames, rows, columns), lengths in seams:
        assert split_sizes(frames * rows // 2 * columns // 2, ranks // degrees.get("tp", 1)) == lengths


def test_all_kinds_are_tested():
    assert {kind for kind, _, _ in CASES.values()} == set(KINDS)
