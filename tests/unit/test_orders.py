"""An order of placement is obeyed or refused, wherever it was given: command line, a user's YAML, Python."""

import json
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from support.checkpoints import WAN_SHAPES
from support.commands import wan_dist
from support.plans import set_keys
from wan_dist.agent.plan import show_plan
from wan_dist.agent.prepare import Invocation, check, freeze_run
from wan_dist.cli.compose import _typed
from wan_dist.config import freeze
from wan_dist.config.schema import Config
from wan_dist.config.store import conf_dir, register_schemas
from wan_dist.planning.placement import Orders
from wan_dist.planning.refusal import RefusedError

SMALL = ["model=wan_shapes", "runtime.device=cpu", "prompt=a"]


@pytest.fixture(scope="module", autouse=True)
def hydra_reads_conf():
    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


def composed(*overrides: str, also: Path | None = None) -> Config:
    return deepcopy(_composed(*overrides, also=also))


@cache
def _composed(*overrides: str, also: Path | None) -> Config:
    search = [] if also is None else [f"hydra.searchpath=[file://{also}]"]
    cfg = compose("config", [*overrides, *search])
    return _typed(cfg)


def refused(*overrides: str, **settings) -> list[str]:
    with pytest.raises(RefusedError) as caught:
        check(set_keys(composed(*SMALL, *overrides), **settings), Invocation(True, Path("unused")))
    return [refusal.key for refusal in caught.value.refusals]


def planned(config: Config, capsys) -> dict[str, dict]:
    """`{component: its line}` of the best mesh of `task=plan`."""
    config.task = "plan"
    checked = check(config, Invocation(True, Path("unused")))
    show_plan(checked.config, checked.checkpoint, checked.source.name, guided=checked.guided)
    document = json.loads(capsys.readouterr().out)
    (best,) = [mesh for mesh in document["meshes"] if mesh["best"]]
    return {line["component"]: line for line in best["plan"]}


PLAN = [
    "model=wan2_2_t2v_a14b", "plan.device_memory_gb=300", "plan.ranks=2", "parallelism.cfg=1", "parallelism.ulysses=2"
]  # fmt: skip
HOW = {"transformer": "layerwise", "text_encoder": "component", "vae": "component"}


@pytest.mark.parametrize("mode", ["auto", "speed", "memory", "manual"])
@pytest.mark.parametrize("how", ["resident", "component", "layerwise"])
def test_of_the_command_line(capsys, mode, how):
    orders = [f"offload.mode={mode}", f"offload.transformer={how}", "offload.vae=component"]
    lines = planned(composed(*PLAN, *orders), capsys)
    assert lines["transformer"]["placement"] == lines["transformer_2"]["placement"] == how
    assert f"offload.transformer={how}" in lines["transformer"]["reason"]
    assert lines["vae"]["placement"] == "component"
    assert lines["text_encoder"]["placement"] == ("component" if mode == "memory" else "resident")


@pytest.mark.parametrize(
    ("key", "value", "shown"), [("prefetch", 1, "prefetch"), ("resident_blocks", 3, "resident_blocks")]
)
@pytest.mark.parametrize("mode", ["auto", "memory", "manual"])
def test_numbers(capsys, key, value, shown, mode):
    """The A14B would prefetch 2, and keep no block."""
    overrides = ["offload.transformer=layerwise", f"offload.mode={mode}", f"offload.{key}={value}"]
    lines = planned(composed(*PLAN, *overrides), capsys)
    assert lines["transformer"]["streaming"][shown] == lines["transformer_2"]["streaming"][shown] == value


@pytest.mark.parametrize("switch", ["on", "off", "true", "False"])
@pytest.mark.parametrize("memory", [45, 300])
def test_fsdp(capsys, switch, memory):
    overrides = [f"parallelism.fsdp.enabled={switch}", f"plan.device_memory_gb={memory}"]
    lines = planned(composed(*PLAN, *overrides), capsys)
    wanted = "fsdp" if switch in ("on", "true") else "resident" if memory == 300 else "layerwise"
    assert lines["transformer"]["placement"] == wanted


YAML = {
    "offload/mistyped.yaml": """
        prefetchh: 1
        """,
    "sampler/mistyped.yaml": """
        defaults: [base, _self_]
        steps: many
        """,
    "offload/mine.yaml": """
        # Mine.
        defaults: [base, _self_]
        transformer: layerwise
        text_encoder: component
        prefetch: 1
        resident_blocks: 3
        """,
    "experiment/mine.yaml": """
        # @package _global_
        # Mine.
        defaults:
          - override /model: wan2_2_t2v_a14b
          - override /offload: mine
        offload: {vae: component, resident_blocks: "4"}
        parallelism: {fsdp: {enabled: off}}
        """,
    "experiment/sharded.yaml": """
        # @package _global_
        # Mine too.
        defaults:
          - override /model: wan2_2_t2v_a14b
        parallelism: {fsdp: {enabled: on}}
        offload: {mode: memory, text_encoder: resident}
        """,
}


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    for name, text in YAML.items():
        (folder / name).parent.mkdir(exist_ok=True)
        lines = text.strip("\n").splitlines()
        (folder / name).write_text("\n".join(line[8:] for line in lines) + "\n")
    return folder


def test_of_a_users_group(capsys, mine):
    lines = planned(composed(*PLAN, "offload=mine", also=mine), capsys)
    assert {name: line["placement"] for name, line in lines.items()} == {
        "text_encoder": "component", "transformer": "layerwise", "transformer_2": "layerwise", "vae": "resident"
    }  # fmt: skip
    streaming = lines["transformer"]["streaming"]
    assert (streaming["prefetch"], streaming["resident_blocks"]) == (1, 3)


def test_of_a_users_experiment(capsys, mine):
    lines = planned(composed(*PLAN[1:], "experiment=mine", also=mine), capsys)
    assert lines["vae"]["placement"] == "component"
    assert lines["transformer"]["streaming"]["resident_blocks"] == 4
    lines = planned(composed(*PLAN[1:], "experiment=sharded", also=mine), capsys)
    assert (lines["transformer"]["placement"], lines["text_encoder"]["placement"]) == ("fsdp", "resident")


@pytest.mark.parametrize(("name", "how"), [("offload=mine", "layerwise"), ("experiment=sharded", "fsdp")])
def test_of_the_real_command(mine, tmp_path, name, how):
    end = wan_dist("task=plan", "--config-dir", str(mine), *PLAN, name, cwd=tmp_path)
    assert end.returncode == 0, end.stderr
    (best,) = [mesh for mesh in json.loads(end.stdout)["meshes"] if mesh["best"]]
    assert {line["placement"] for line in best["plan"] if line["component"].startswith("transformer")} == {how}
    assert list(tmp_path.iterdir()) == []


def test_a_users_yaml_is_refused_like_anything_else(mine, tmp_path):
    orders = ["parallelism.fsdp.enabled=on", "offload.vae=layerwise", "offload.resident_blocks=41"]
    end = wan_dist("task=plan", "--config-dir", str(mine), *PLAN, "offload=mine", *orders, cwd=tmp_path)
    assert end.returncode == 2 and end.stdout == "" and "Traceback" not in end.stderr
    assert "(3 reasons)" in end.stderr
    for reason in (
        "offload.transformer=layerwise: parallelism.fsdp.enabled=on",
        "offload.vae=layerwise",
        "use 0 to 40",
    ):
        assert reason in end.stderr


def python(**settings) -> Config:
    config = Config(prompt="a cat")
    small = {"model.path": str(WAN_SHAPES), "runtime.device": "cpu", "runtime.ranks": 2}
    small |= {"video.height": 64, "video.width": 64, "video.num_frames": 17}
    return set_keys(config, **{**small, **settings})


@pytest.mark.parametrize("one", [1, "1"])
def test_of_python(capsys, tmp_path, one):
    """A number may be given as one, or as the text that the schema has."""
    orders = {f"offload.{name}": how for name, how in HOW.items()}
    config = python(**orders, **{"offload.prefetch": one, "offload.resident_blocks": one, "output.dir": str(tmp_path)})
    frozen = freeze.load(freeze_run(check(config, Invocation(False, tmp_path))))
    assert Orders.of(frozen) == Orders(**HOW, prefetch=1, resident_blocks=1)
    lines = planned(config, capsys)
    assert {name: line["placement"] for name, line in lines.items()} == HOW
    assert (lines["transformer"]["streaming"]["prefetch"], lines["transformer"]["streaming"]["resident_blocks"]) == (
        1,
        1,
    )


def test_of_python_are_not_changed_by_checking(capsys):
    config = python(**{"offload.transformer": "component", "parallelism.fsdp.enabled": "off"})
    planned(config, capsys)
    assert (config.offload.transformer, config.parallelism.fsdp.enabled) == ("component", "off")


@pytest.mark.parametrize("value", ["two", "-1", "1.5", "0x1", "'1 '", "off"])
def test_what_is_no_count(value):
    keys = ["offload.prefetch", "offload.resident_blocks"]
    assert refused(*(f"{key}={value}" for key in keys)) == keys


@pytest.mark.parametrize("value", [-1, 1.5, True, "²", "٣", ""])
def test_what_is_no_count_in_python(value):
    with pytest.raises(RefusedError) as caught:
        check(python(**{"offload.prefetch": value}), Invocation(False, Path("unused")))
    assert [refusal.key for refusal in caught.value.refusals] == ["offload.prefetch"]


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["offload.mode=fast"], {"offload.mode"}),
        (["offload.transformer=fsdp"], {"offload.transformer"}),
        (["offload.text_encoder=off"], {"offload.text_encoder"}),
        (["offload.vae=layerwise"], {"offload.vae"}),
        (["offload.image_encoder=layerwise"], {"offload.image_encoder"}),
        (["offload.resident_blocks=7"], {"offload.resident_blocks"}),  # of 6
        (["offload.transformer=layerwise", "parallelism.fsdp.enabled=on"], {"offload.transformer"}),
        (["offload.transformer=resident", "parallelism.fsdp.enabled=on", "parallelism.cfg=1"], {"offload.transformer"}),
        (
            ["offload.vae=layerwise", "offload.prefetch=x", "video.height=65", "sampler.steps=0"],
            {"offload.vae", "offload.prefetch", "video.height", "sampler.steps"},
        ),
        (
            ["offload.vae=layerwise", "offload.resident_blocks=9", "parallelism.fsdp.enabled=on",
             "offload.transformer=component", "runtime.ranks=0"],
            {"offload.vae", "offload.resident_blocks", "offload.transformer", "runtime.ranks"},
        ),
        (["parallelism.ulysses=0", "offload.vae=layerwise"], {"parallelism.ulysses", "offload.vae"}),
        (["offload.vae=layerwise", "model.path=/no/such/place"], {"offload.vae", "model.path"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("task", ["generate", "plan"])
def test_all_that_is_wrong_is_said_at_once(task, overrides, keys):
    found = refused(*overrides, task=task)
    assert set(found) == keys and len(found) == len(keys)


@pytest.mark.parametrize("number", ["plan.ranks=0", "plan.nodes=0", "plan.nodes=-1", "parallelism.tp=0"])
def test_a_plan_for_no_rank(number):
    assert refused("task=plan", number) == [number.split("=")[0]]


def test_contradictory_orders_exit_with_2_before_anything_starts(tmp_path):
    orders = ["offload.vae=layerwise", "offload.prefetch=two", "offload.resident_blocks=7", "video.height=65"]
    end = wan_dist(*SMALL, *orders, cwd=tmp_path)
    assert end.returncode == 2 and "(4 reasons)" in end.stderr and "Traceback" not in end.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "word"), [("offload=mistyped", "prefetchh"), ("sampler=mistyped", "many")])
def test_what_a_users_option_mistypes_is_refused(mine, tmp_path, option, word):
    """Whether or not it asks for its group's schema."""
    end = wan_dist("task=plan", "--config-dir", str(mine), *PLAN, option, cwd=tmp_path)
    assert end.returncode == 2 and word in end.stderr and "Traceback" not in end.stderr
    assert end.stdout == "" and list(tmp_path.iterdir()) == []
