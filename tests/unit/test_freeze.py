"""The frozen config file: what goes in comes out, types included, and any other file is refused."""

import random
from dataclasses import asdict

import pytest
import yaml

from wan_dist.config import freeze
from wan_dist.config.schema import Config, leaves

NASTY = [
    "${x} ${oc.env:HOME} \\${y}", "line\nbreak\r\nand\ttab", "猫 🏄 é \u2028 \x85 \ufeff", "'", '"', "'\"",
    "", " ", "\n", "null", "true", "on", "1e5", "0x10", "2024-01-01", "12:30:00", "- a", "a: b", "# no", "???",
    "!!python/none", "\x07", "trailing \n", "\\", "%", "{a: [b", "caf\udce9",
]  # fmt: skip


@pytest.mark.parametrize("prompt", NASTY)
def test_any_text_round_trips(prompt):
    config = Config(prompt=prompt)
    config.output.name = config.model.path = prompt
    assert freeze.from_yaml(freeze.to_yaml(config)) == config


def test_random_text_round_trips():
    rng = random.Random(1)
    for _ in range(60):
        config = Config(prompt="".join(rng.choices(NASTY, k=4)))
        assert freeze.from_yaml(freeze.to_yaml(config)).prompt == config.prompt


def test_numbers_and_nulls_keep_their_types():
    config = Config()
    config.sampler.guidance_scale, config.sampler.flow_shift, config.sampler.boundary_ratio = 5.0, 1e20, 0.8755
    config.sampler.steps, config.sampler.seed, config.runtime.timeout_s = 7, 2**64 - 1, 1e-7
    back = freeze.from_yaml(freeze.to_yaml(config))
    for (key, value, _), (_, again, _) in zip(leaves(config), leaves(back), strict=True):
        assert (type(again), again) == (type(value), value), key


def test_a_whole_number_in_a_float_field_becomes_a_float():
    values = asdict(Config())
    values["sampler"]["guidance_scale"], values["runtime"]["timeout_s"] = 5, 600
    config = freeze.from_yaml(yaml.safe_dump(values))
    assert type(config.sampler.guidance_scale) is type(config.runtime.timeout_s) is float
    assert type(config.bench.repeats) is int


def test_load_reads_a_utf8_file(tmp_path):
    config = Config(prompt="猫 ${x}")
    (tmp_path / "config.yaml").write_text(freeze.to_yaml(config), encoding="utf-8")
    assert freeze.load(tmp_path / "config.yaml") == config


def test_an_unknown_key_is_an_error():
    values = asdict(Config())
    values["sampler"]["step"] = 3
    with pytest.raises(ValueError, match=r"SamplerConfig.*\['step'\]"):
        freeze.from_yaml(yaml.safe_dump(values))


def test_a_missing_key_is_an_error():
    values = asdict(Config())
    del values["prompt"], values["video"]
    with pytest.raises(ValueError, match=r"Config.*\['prompt', 'video'\]"):
        freeze.from_yaml(yaml.safe_dump(values))


@pytest.mark.parametrize("separator", ["\x85", "\u2028", "\u2029", "\x0b", "\x0c", "\x7f", "\ufeff", "\udc80"])
def test_characters_that_yaml_would_fold(separator):
    config = Config(prompt=f"a{separator}b")
    assert freeze.from_yaml(freeze.to_yaml(config)) == config
