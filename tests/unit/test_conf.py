"""The shipped YAML: every option composes, says in its first comment what it is for, and fits the schema."""

from copy import deepcopy
from functools import cache

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from wan_dist.config.normalise import normalise_switches
from wan_dist.config.schema import FREE_TEXT, GROUPS, Config, leaves
from wan_dist.config.store import conf_dir, group_options, register_schemas

OPTIONS = [(path.parent.name, path.stem) for path in sorted(conf_dir().glob("*/*.yaml"))]


@pytest.fixture(scope="module", autouse=True)
def hydra_reads_conf():
    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


def composed(*overrides: str) -> Config:
    """A copy, since tests change what they have."""
    return deepcopy(composed_once(overrides))


@cache
def composed_once(overrides: tuple[str, ...]) -> Config:
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), compose("config", list(overrides))))
    assert isinstance(config, Config)
    return config


def test_the_defaults_compose_to_the_schemas_own_but_for_the_recipe():
    config, plain = composed(), Config()
    assert config.model.name == "wan_shapes"
    config.model = plain.model
    assert config == plain


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group, option):
    config = composed(f"{group}={option}")
    if group == "model":
        assert config.model.name == option
        assert config.model.recipe.path


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_opens_with_a_comment(group, option):
    lines = (conf_dir() / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
    opening = [line for line in lines[:2] if not line.startswith("# @package")]
    assert opening[0].startswith("# ")
    assert len(opening[0]) > 10


def test_groups_and_folders_are_the_same():
    folders = {path.name for path in conf_dir().iterdir() if path.is_dir()} - {"hydra"}
    assert folders == {*GROUPS, "experiment"}
    for group in GROUPS:
        assert group in Config.__dataclass_fields__
        assert group_options(group)


@pytest.mark.parametrize("preset", [p for p in group_options("parallelism") if p not in ("auto", "single")])
def test_presets_are_named_for_their_degrees(preset):
    parallelism = composed(f"parallelism={preset}").parallelism
    named = "_".join(
        f"{axis}{degree}"
        for axis in ("dp", "cfg", "ring", "ulysses", "tp")
        if (degree := getattr(parallelism, axis)) != 1
    )
    assert named == preset


def test_every_free_text_key_is_a_text_leaf():
    assert set(FREE_TEXT) <= {key for key, _, _ in leaves(Config())}


@pytest.mark.parametrize(
    ("yaml_value", "switch"), [("on", "on"), ("off", "off"), ("true", "on"), ("False", "off"), ("auto", "auto")]
)
@pytest.mark.parametrize("quote", ["", "'"])
def test_switches_from_yaml(yaml_value, switch, quote):
    typed = OmegaConf.create(f"parallelism:\n  vae: {quote}{yaml_value}{quote}\n  fsdp: {{enabled: {yaml_value}}}")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), typed))
    normalise_switches(config)
    assert (config.parallelism.vae, config.parallelism.fsdp.enabled) == (switch, switch)


@pytest.mark.parametrize(
    ("typed", "switch"), [("on", "on"), ("off", "off"), ("true", "on"), ("false", "off"), ("ON", "on")]
)
def test_switches_from_the_command_line(typed, switch):
    config = composed(f"runtime.vae_channels_last={typed}", f"runtime.compile={typed}", f"output.resume={typed}")
    normalise_switches(config)
    assert (config.runtime.vae_channels_last, config.output.resume) == (switch, switch)
    assert config.runtime.compile is (switch == "on")


def test_only_switches_are_rewritten():
    config = Config(prompt="true", negative_prompt="False")
    config.output.name, config.runtime.attention = "on", "true"
    normalise_switches(config)
    assert (config.prompt, config.negative_prompt, config.output.name) == ("true", "False", "on")
    assert config.runtime.attention == "true"


def test_the_other_spelling_of_dpm():
    config = composed("sampler.solver=dpmpp")
    normalise_switches(config)
    assert config.sampler.solver == "dpm++"
    assert composed("sampler.solver=dpm++").sampler.solver == "dpm++"


def test_an_experiment_overrides_the_root():
    config = composed("experiment=bench_14b_720p")
    assert (config.task, config.bench.heads, config.bench.columns) == ("bench", 40, 160)


def test_an_experiment_overrides_groups():
    config = composed("experiment=a14b_8gpu")
    assert config.model.recipe.guidance_scale_2 == 3.0
    assert (config.parallelism.cfg, config.parallelism.ulysses) == (2, 4)
