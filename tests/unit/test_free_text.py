"""Free text typed on the command line arrives exactly as typed, whatever Hydra's grammar would make of it."""

import random
import re

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from wan_dist.cli.free_text import _QUOTED, _unquote, config_dirs, is_multirun, literal, literal_overrides, unguard
from wan_dist.config.schema import FREE_TEXT, Config

PIECES = (
    "\\", "\\\\", "'", '"', "${", "}", "{", "$", ",", "\n", "\r", "\t", " ", "猫", "é", "null", "choice(", "(", ")",
    "a", "=", "[", "]", "%", ":", "1e5", "${oc.env:HOME}", "${x}", "#", "~", "|", "'a','b'", "🏄", "+", "true", "??",
    "???", "\ue000",
)  # fmt: skip


def random_texts(count: int) -> list[str]:
    rng = random.Random(20)
    return ["".join(rng.choices(PIECES, k=rng.randrange(9))) for _ in range(count)]


@pytest.fixture(scope="module")
def parser() -> OverridesParser:
    return OverridesParser.create()


@pytest.fixture
def config():
    return OmegaConf.structured(Config)


def received(parser, config, override: str) -> str:
    OmegaConf.update(config, "prompt", parser.parse_override(override).value())
    typed = OmegaConf.to_object(config)
    unguard(typed)
    return typed.prompt


def test_random_text_comes_back_from_hydra_and_omegaconf(parser, config):
    for text in random_texts(2000):
        assert received(parser, config, f"prompt={literal(text)}") == text


def test_random_text_survives_the_second_parse_of_a_sweep(parser, config):
    for text in random_texts(1000):
        once = parser.parse_override(f"prompt={literal(text)}")
        assert not once.is_sweep_override()
        assert received(parser, config, f"prompt={once.get_value_element_as_str()}") == text


@pytest.mark.parametrize(
    "text",
    ["", " ", "'", "\\", "\\'", "'quoted'", '"quoted"', "a,b", "null", "[a]", "${x}", "\\${x}", "???", "\ue000???"],
)
def test_short_texts(parser, config, text):
    assert received(parser, config, f"prompt={literal(text)}") == text


@pytest.mark.parametrize("key", FREE_TEXT)
@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_every_key_and_prefix(parser, key, prefix):
    (override,) = literal_overrides([f"{prefix}{key}=it's ${{a}}, {{b}}"], multirun=False)
    parsed = parser.parse_override(override)
    assert parsed.key_or_group == key
    assert override.startswith(f"{prefix}{key}='")
    config = OmegaConf.create({})
    OmegaConf.update(config, key, parsed.value())
    assert OmegaConf.select(config, key) == "it's ${a}, {b}"


@pytest.mark.parametrize(
    "argument", ["sampler.seed=1,2", "--multirun", "-m", "model=tiny", "xprompt=a'b", "prompt.x=a", "~prompt"]
)
def test_everything_else_is_left_alone(argument):
    assert literal_overrides([argument], multirun=True) == [argument]


@pytest.mark.parametrize("text", ["'a','b'", "\"a, b\" , 'c'", "'it\\'s','b'", "'line\nbreak','b'"])
def test_quoted_lists_sweep_only_under_multirun(parser, config, text):
    argument = f"prompt={text}"
    (swept,) = literal_overrides([argument], multirun=True)
    as_hydra = parser.parse_override(argument).sweep_string_iterator()
    assert list(parser.parse_override(swept).sweep_string_iterator()) == [
        parser.parse_override(f"x={element}").get_value_element_as_str().replace('"', "'") for element in as_hydra
    ]
    (single,) = literal_overrides([argument], multirun=False)
    assert received(parser, config, single) == text


@pytest.mark.parametrize("text", ["a,b", "'a'", "'a',b", "choice(a,b)", "range(1,3)", "'a','b", "glob(*)"])
def test_under_multirun_everything_else_is_literal(parser, config, text):
    (override,) = literal_overrides([f"prompt={text}"], multirun=True)
    assert received(parser, config, override) == text


@pytest.mark.parametrize("flag", ["-m", "--multirun", "--multi", "--mu", "--m"])
def test_multirun_flags(flag):
    assert is_multirun(["prompt=a", flag])


@pytest.mark.parametrize("argument", ["prompt=-m", "--", "--help", "--multirunning", "m", "+m=1"])
def test_not_multirun(argument):
    assert not is_multirun([argument])


def test_the_elements_of_a_quoted_list_are_what_hydra_reads_them_as(parser):
    rng, read = random.Random(3), 0
    for _ in range(3000):
        quote = rng.choice("'\"")
        element = quote + "".join(rng.choices(["\\", "\\\\", "'", '"', "a", ",", "{", " "], k=rng.randrange(7))) + quote
        if re.fullmatch(_QUOTED, element, re.DOTALL):
            read += 1
            assert _unquote(element) == parser.parse_override(f"prompt={element}").value(), element
    assert read > 500


def test_the_elements_of_a_quoted_list_are_literal(parser, config):
    (override,) = literal_overrides(["prompt='a, b','c} ${x}','???'"], multirun=True)
    elements = list(parser.parse_override(override).sweep_string_iterator())
    assert [received(parser, config, f"prompt={e}") for e in elements] == ["a, b", "c} ${x}", "???"]


@pytest.mark.parametrize(
    "typed", [["--config-dir", "d"], ["--config-dir=d"], ["-cd", "d"], ["-cd=d"], ["--config-di", "d"]]
)
def test_config_dirs(typed):
    assert [str(folder) for folder in config_dirs(["prompt=x", *typed, "sampler.steps=3"])] == ["d"]
