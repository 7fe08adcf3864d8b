"""Checking a whole configuration: resolved and placed where it can run, every reason at once where it cannot."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from support.checkpoints import WAN_SHAPES
from wan_dist.agent.prepare import Checked, Invocation, check, freeze_run, run_dir
from wan_dist.config import freeze
from wan_dist.config.schema import Config
from wan_dist.distributed.shard_conditions import CONDITIONS, shard_units
from wan_dist.models.wan_transformer import meta_transformer
from wan_dist.planning.refusal import Refusal, RefusedError


@pytest.fixture
def checked(tmp_path):
    def run(*, world: int | None = None, recipe_named: bool = False, **settings) -> Checked:
        config = Config(prompt="a cat")
        for key, value in {"model.path": str(WAN_SHAPES), "runtime.device": "cpu", **settings}.items():
            node = config
            *path, leaf = key.split(".")
            for part in path:
                node = getattr(node, part)
            setattr(node, leaf, value)
        return check(config, Invocation(recipe_named, tmp_path / "out", world, world))

    return run


@pytest.fixture
def reasons(checked):
    def run(**settings) -> list[str]:
        with pytest.raises(RefusedError) as caught:
            checked(**settings)
        return [refusal.key for refusal in caught.value.refusals]

    return run


SMALL = {"video.height": 64, "video.width": 64, "video.num_frames": 17}


def test_everything_is_resolved_and_nothing_is_written(checked, tmp_path):
    result = checked(**SMALL)
    config = result.config
    assert (config.sampler.steps, config.sampler.guidance_scale, config.sampler.seed) == (50, 5.0, 0)
    assert (config.parallelism.cfg, config.parallelism.ulysses, result.ranks, config.runtime.ranks) == (2, 1, 2, 2)
    assert (config.runtime.device, config.runtime.dtype) == ("cpu", "float32")
    assert config.output.dir == str(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_number_of_ranks_is_that_of_the_degrees(checked):
    assert checked(**SMALL, **{"parallelism.cfg": 2, "parallelism.ulysses": 4}).ranks == 8
    assert checked(**SMALL, world=3).config.parallelism.ring == 3  # a third of 8 heads would leave a rank idle
    assert checked(**SMALL, world=4).config.parallelism.ulysses == 2
    assert checked(**SMALL, **{"sampler.guidance_scale": 1.0}).config.parallelism.ulysses == 2


def test_all_reasons_come_at_once(reasons):
    found = reasons(
        **{
            "prompt": None, "output.name": "a/b", "video.height": 65, "video.width": 64, "video.num_frames": 16,
            "sampler.solver": "ddim", "sampler.guidance_scale_2": 3.0, "parallelism.ulysses": 9, "output.formats": [],
        }
    )  # fmt: skip
    assert set(found) == {
        "prompt", "output.name", "video.height", "video.num_frames", "sampler.solver", "sampler.guidance_scale_2",
        "parallelism.ulysses", "output.formats",
    }  # fmt: skip


@pytest.mark.parametrize("key", ["video.height", "video.width", "video.num_frames", "sampler.steps"])
@pytest.mark.parametrize("value", [0, -16])
def test_sizes_of_nothing_are_refused(reasons, key, value):
    assert key in reasons(**{**SMALL, key: value})


def test_a_world_that_the_degrees_do_not_fill(reasons):
    assert reasons(**SMALL, world=3, **{"parallelism.cfg": 2}) == ["parallelism"]
    assert reasons(**SMALL, world=2, **{"runtime.ranks": 4}) == ["runtime.ranks"]


def test_a_step_that_falls_to_an_expert_the_checkpoint_lacks(reasons, checked):
    assert reasons(**SMALL, **{"sampler.boundary_ratio": 0.5}) == ["sampler.boundary_ratio"]
    assert checked(**SMALL, **{"sampler.boundary_ratio": 0.0}).ranks == 2


def test_guidance_halves_without_guidance(reasons):
    assert reasons(**SMALL, **{"parallelism.cfg": 2, "sampler.guidance_scale": 1.0}) == ["parallelism.cfg"]


@pytest.mark.parametrize("path", ["/no/such/place", "n" * 300])
def test_a_checkpoint_that_is_not_there(reasons, path):
    assert reasons(**SMALL, **{"model.path": path}) == ["model.path"]


def test_a_folder_that_cannot_be_made(reasons, tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "in", tmp_path / ("d" * 300)):
        assert reasons(**SMALL, **{"output.dir": str(folder)}) == ["output.dir"]


def test_the_frozen_file_is_what_was_checked(checked):
    result = checked(**SMALL)
    path = freeze_run(result)
    assert path == run_dir(result.config) / "config.yaml"
    assert path.parts[-3:-1] == (".run", "video")
    frozen = freeze.load(path)
    assert Path(str(frozen.model.path)) == WAN_SHAPES
    result.config.model.path = frozen.model.path
    assert frozen == result.config


def test_a_fresh_run_directory_has_no_old_logs(checked):
    directory = freeze_run(checked(**SMALL)).parent
    for name in ("rank0.log", "failure.rank1.json", "mine.txt"):
        (directory / name).write_text("old")
    freeze_run(checked(**SMALL))
    assert sorted(path.name for path in directory.iterdir()) == ["config.yaml", "mine.txt"]


def with_scheduler(tmp_path, **changes) -> str:
    shutil.copytree(WAN_SHAPES, tmp_path / "changed")
    file = tmp_path / "changed" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return str(tmp_path / "changed")


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True},
        {"use_dynamic_shifting": True},
    ],
)
def test_schedulers_that_no_seed_decides_or_no_pipeline_feeds(reasons, tmp_path, changes):
    assert reasons(**SMALL, **{"model.path": with_scheduler(tmp_path, **changes)}) == ["sampler.solver"]


@pytest.mark.parametrize(("scale", "cfg", "ring"), [(5.0, 2, 2), (1.0, 1, 4)])
def test_auto_takes_every_rank_the_ring_those_beyond_the_heads(checked, monkeypatch, scale, cfg, ring):
    monkeypatch.setattr("wan_dist.agent.room.DEFAULT_CPU_RANKS", 32)
    result = checked(**SMALL, **{"sampler.guidance_scale": scale})
    degrees = result.config.parallelism
    assert (degrees.cfg, degrees.ring, degrees.ulysses, degrees.tp, result.ranks) == (cfg, ring, 8, 1, 32)


@pytest.fixture
def refusals(checked):
    def run(**settings) -> list[Refusal]:
        with pytest.raises(RefusedError) as caught:
            checked(**SMALL, **{f"parallelism.{key}": value for key, value in settings.items()})
        return caught.value.refusals

    return run


@pytest.mark.parametrize(
    ("degrees", "key", "words"),
    [
        ({"tp": 3}, "tp", ["8 attention heads", "use one of 1, 2, 4, 8"]),
        ({"tp": 16}, "tp", ["8 attention heads", "use one of 1, 2, 4, 8"]),
        ({"tp": 2, "ulysses": 5}, "ulysses", ["8 over tp 2 leaves 4", "use 1 to 4, and ring"]),
        ({"ulysses": 9}, "ulysses", ["the model has 8", "use 1 to 8, and ring"]),
    ],
)
def test_heads_that_the_degrees_do_not_fit(refusals, degrees, key, words):
    (refusal,) = refusals(cfg=1, **degrees)
    assert (refusal.key, refusal.value) == (f"parallelism.{key}", degrees[key])
    assert all(word in str(refusal) for word in words)


def test_heads_of_the_second_expert_are_judged_too(reasons, tmp_path, checkpoints):
    path = shutil.copytree(checkpoints(heads=4, experts=2, boundary_ratio=0.9, seed=2), tmp_path / "uneven")
    file = path / "transformer_2" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_attention_heads": 3}))
    settings = {**SMALL, "model.path": str(path), "parallelism.cfg": 1, "parallelism.tp": 2}
    assert reasons(**settings) == ["parallelism.tp"]


FSDP_MESH = {"parallelism.cfg": 2, "parallelism.ring": 3, "parallelism.tp": 2}


@pytest.mark.parametrize("enabled", ["on", "True"])
def test_fsdp_replicas_that_do_not_divide_its_axis(reasons, checked, enabled):
    settings = {**SMALL, **FSDP_MESH, "parallelism.fsdp.replicate": 4}
    assert reasons(**settings, **{"parallelism.fsdp.enabled": enabled}) == ["parallelism.fsdp.replicate"]
    for off in ("off", "auto", "False"):
        assert checked(**settings, **{"parallelism.fsdp.enabled": off}).ranks == 12
    for legal in (1, 2, 3, 6):
        with_legal = {**settings, "parallelism.fsdp.enabled": enabled, "parallelism.fsdp.replicate": legal}
        assert checked(**with_legal).config.parallelism.fsdp.replicate == legal


@pytest.mark.parametrize("replicate", [0, -2])
def test_fsdp_replicas_outside_their_limits_are_refused_not_divided_by(refusals, replicate):
    found = refusals(**{"fsdp.enabled": "on", "fsdp.replicate": replicate})
    assert "parallelism.fsdp.replicate" in [refusal.key for refusal in found]


def test_a_shard_condition_that_does_not_exist(refusals):
    (refusal,) = refusals(**{"fsdp.enabled": "on", "fsdp.shard_conditions": ["is_block", "is_blok"]})
    assert (refusal.key, refusal.value) == ("parallelism.fsdp.shard_conditions", "is_blok")
    assert all(name in refusal.remedy for name in CONDITIONS)


def test_shard_conditions_that_match_nothing_name_the_models_class(refusals, checked):
    (refusal,) = refusals(**{"fsdp.enabled": "on", "fsdp.shard_conditions": ["is_layer", "is_refiner_block"]})
    assert (refusal.key, refusal.value) == ("parallelism.fsdp.shard_conditions", "is_layer,is_refiner_block")
    assert "WanTransformer3DModel" in refusal.why
    for conditions in (["is_block"], ["is_layer", "is_block"], ["is_common_numbered_block"], []):
        settings = {"parallelism.fsdp.enabled": "on", "parallelism.fsdp.shard_conditions": conditions}
        assert checked(**SMALL, **settings).config.parallelism.fsdp.shard_conditions == conditions


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_shard_condition_is_refused_exactly_where_wrapping_would_fail(checked, condition):
    model = meta_transformer(json.loads((WAN_SHAPES / "transformer" / "config.json").read_text()))
    settings = {"parallelism.fsdp.enabled": "on", "parallelism.fsdp.shard_conditions": [condition]}
    raised = []
    for attempt in (lambda: shard_units(model, [condition]), lambda: checked(**SMALL, **settings)):
        try:
            attempt()
        except ValueError as error:  # of which RefusedError is one
            raised.append(type(error))
    assert raised in ([], [ValueError, RefusedError])


@pytest.mark.parametrize("conditions", [[], ["is_block"]], ids=str)
def test_a_config_that_no_transformer_can_be_built_from_raises_nothing_but_reasons(checked, tmp_path, conditions):
    """Whether it is refused here or by the ranks that build it, it is the checkpoint's fault, not a crash."""
    path = with_scheduler(tmp_path)
    file = tmp_path / "changed" / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_layers": "6"}))
    fsdp = {"parallelism.fsdp.enabled": "on", "parallelism.fsdp.shard_conditions": conditions}
    with contextlib.suppress(RefusedError):
        checked(**SMALL, **fsdp, **{"model.path": path})


def test_shard_conditions_that_match_nothing_in_a_benchmarks_transformer(checked):
    fsdp = {"parallelism.fsdp.enabled": "on", "parallelism.fsdp.shard_conditions": ["is_layer"]}
    with pytest.raises(RefusedError, match="WanTransformer3DModel"):
        checked(task="bench", **fsdp)


def test_every_reason_of_the_mesh_comes_at_once(refusals):
    found = refusals(**{"cfg": 3, "tp": 3, "fsdp.enabled": "on", "fsdp.replicate": 2, "fsdp.shard_conditions": ["x"]})
    assert [refusal.key.removeprefix("parallelism.") for refusal in found] == [
        "cfg", "tp", "fsdp.shard_conditions", "fsdp.replicate"
    ]  # fmt: skip


def test_a_name_alone_does_not_bring_a_recipe(checked):
    assert checked(**SMALL, **{"model.name": "wan_shapes"}).config.sampler.steps == 50


def test_a_folder_in_the_place_of_an_output(reasons, tmp_path):
    (tmp_path / "out" / "video.mp4").mkdir(parents=True)
    assert reasons(**SMALL) == ["output.name"]


def test_a_config_value_of_the_wrong_type(reasons, tmp_path):
    path = with_scheduler(tmp_path)
    file = tmp_path / "changed" / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_attention_heads": "4"}))
    assert reasons(**SMALL, **{"model.path": path}) == ["model.path"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with `good.png`, and `cut.png`, which was cut short."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.linear_gradient("L").save(folder / "good.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:300])
    return folder


GOOD, CUT = "good.png", "cut.png"
TEXT = "text"


@pytest.mark.parametrize(
    ("kind", "images", "found"),
    [
        (TEXT, {"image": GOOD}, ["image"]),
        (TEXT, {"last_image": GOOD}, ["last_image"]),
        ("wan2.1", {}, ["image"]),
        ("wan2.1", {"image": CUT}, ["image"]),
        ("wan2.1", {"image": "absent.png"}, ["image"]),
        ("wan2.1", {"image": "."}, ["image"]),
        ("wan2.1", {"image": GOOD, "last_image": GOOD}, ["last_image"]),
        ("wan2.1 first and last", {"image": GOOD}, ["last_image"]),
        ("wan2.1 first and last", {"image": CUT, "last_image": CUT}, ["image", "last_image"]),
        ("wan2.2 a14b", {}, ["image"]),
        ("wan2.2 a14b", {"image": GOOD, "last_image": CUT}, ["last_image"]),
        ("wan2.2 a14b", {"image": GOOD, "last_image": GOOD, "video.num_frames": 1}, ["video.num_frames"]),
        ("wan2.2 ti2v", {"image": GOOD, "last_image": GOOD}, ["last_image"]),
        ("wan2.2 ti2v", {"image": "https://host/it.png"}, ["image"]),
    ],
)
def test_images_that_are_missing_damaged_or_too_many(reasons, checkpoints, pictures, monkeypatch, kind, images, found):
    path = checkpoints() if kind == TEXT else checkpoints.of_images(kind)
    monkeypatch.chdir(pictures)
    assert reasons(**{**SMALL, "model.path": str(path), **images}) == found


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("wan2.1", ["image"]),
        ("wan2.1 first and last", ["image", "last_image"]),
        ("wan2.2 a14b", ["image"]),
        ("wan2.2 a14b", ["image", "last_image"]),
        ("wan2.2 ti2v", []),
        ("wan2.2 ti2v", ["image"]),
    ],
)
def test_the_paths_of_images_are_absolute_for_the_ranks(checked, checkpoints, pictures, monkeypatch, kind, keys):
    monkeypatch.chdir(pictures)
    settings = {**SMALL, "model.path": str(checkpoints.of_images(kind)), **dict.fromkeys(keys, GOOD)}
    frozen = freeze.load(freeze_run(checked(**settings)))
    for key in ("image", "last_image"):
        assert getattr(frozen, key) == (str(pictures / GOOD) if key in keys else None)


def test_an_image_whose_name_is_not_utf8_reaches_the_ranks(checked, checkpoints, pictures, tmp_path):
    name = tmp_path / "caf\udce9.png"
    shutil.copy(pictures / GOOD, name)
    settings = {**SMALL, "model.path": str(checkpoints.of_images("wan2.2 a14b")), "image": str(name)}
    assert freeze.load(freeze_run(checked(**settings))).image == str(name)


def test_images_are_not_read_where_nothing_is_generated(reasons):
    assert reasons(task="bench", image="absent.png") == ["image"]


def test_reasons_of_images_come_with_all_others(reasons, checkpoints, pictures):
    settings = {"image": str(pictures / CUT), "last_image": str(pictures / GOOD), "video.height": 65, "latents": "x"}
    found = reasons(**{**SMALL, "model.path": str(checkpoints.of_images("wan2.1")), **settings})
    assert sorted(found) == ["image", "last_image", "latents", "video.height"]


@pytest.mark.parametrize(
    ("entry", "file"),
    [
        ({"image_encoder": [None, None]}, None),
        ({}, "image_processor/preprocessor_config.json"),
        ({}, "image_encoder/config.json"),
        ({}, "image_encoder/model.safetensors"),
    ],
)
def test_a_checkpoint_without_all_of_its_image_encoder(reasons, checkpoints, pictures, tmp_path, entry, file):
    path = shutil.copytree(checkpoints.of_images("wan2.1"), tmp_path / "lacking")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps({**index, **entry}))
    if file is not None:
        (path / file).unlink()
    assert reasons(**{**SMALL, "model.path": str(path), "image": str(pictures / GOOD)}) == ["model.path"]
