"""Checking overrides one by one against the schema, before Hydra composes: Hydra stops at the first mistake, a user
wants to read all of them, each with what is allowed."""

import difflib
from collections.abc import Sequence
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

from wan_dist.config.schema import GROUPS, Config, leaves
from wan_dist.config.store import group_options
from wan_dist.planning.refusal import Refusal

_GROUP_NAMES = (*GROUPS, "experiment")
_FOREIGN_LAUNCHERS = ("submitit_slurm", "submitit_local", "joblib")


def check_overrides(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> tuple[list[Refusal], list[str]]:
    """The refusals, and the overrides that have none. What Hydra's parser cannot read is left for Hydra to explain.

    config_dirs: folders beside conf/ that hold config groups too (`--config-dir`).
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, scratch = OverridesParser.create(), Scratch()
    elsewhere = any(text.lstrip("+").startswith("hydra.searchpath=") for text in overrides)  # options we cannot list
    refusals: list[Refusal] = []
    good: list[str] = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
            is_group = override.key_or_group in _GROUP_NAMES
            found = [] if elsewhere and is_group else _check(override, config_dirs, scratch)
        except HydraException:
            found = []
        refusals += found
        if not found:
            good.append(text)
    return refusals, good


class Scratch:
    """A config to set values in, to see whether they can be. Made for the first of them, which takes 20 ms."""

    @cached_property
    def config(self) -> Any:
        from omegaconf import OmegaConf

        return OmegaConf.structured(Config)

    @cached_property
    def rules(self) -> dict[str, dict[str, Any]]:
        """What is known of each key."""
        return {leaf: rule for leaf, _, rule in leaves(Config())}


def _check(override: Any, config_dirs: Sequence[Path], scratch: Scratch) -> list[Refusal]:
    key = override.key_or_group
    if key == "hydra/launcher" and override.value() in _FOREIGN_LAUNCHERS:
        why = "what becomes of its jobs would not be known here: the sweep would end with 0 whatever happens"
        return [Refusal(key, override.value(), why, "use hydra/launcher=slurm, or leave it out: one job after another")]
    if key.split(".")[0] == "hydra" or key.startswith("hydra/") or override.is_delete() or override.package:
        return []
    if key in _GROUP_NAMES:
        return [refusal for value in _values(override) for refusal in _check_option(key, value, config_dirs, scratch)]
    return [refusal for value in _values(override) for refusal in _check_value(key, value, scratch)]


def _check_option(group: str, value: Any, config_dirs: Sequence[Path], scratch: Scratch) -> list[Refusal]:
    """`group=NAME`; or `group={steps: 3}`, which sets keys."""
    options = group_options(group, config_dirs)
    if value in options or (value is None and group == "experiment"):
        return []
    if isinstance(value, dict) and group in GROUPS:
        return _check_value(group, value, scratch)
    return [Refusal(group, value, "no such option", f"use {', '.join(options)}")]


def _check_value(key: str, value: Any, scratch: Scratch) -> list[Refusal]:
    rules = scratch.rules
    if key in rules:
        return _check_type(key, value, scratch)
    if any(leaf.startswith(key + ".") for leaf in rules):
        items = value.items() if isinstance(value, dict) else ()
        return [refusal for name, item in items for refusal in _check_value(f"{key}.{name}", item, scratch)]
    same_name = [leaf for leaf in rules if leaf.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = list(dict.fromkeys([*same_name, *difflib.get_close_matches(key, rules, n=3)]))
    remedy = f"did you mean {' or '.join(near)}?" if near else "wan-dist --help lists all keys"
    return [Refusal(key, value, "no such key", remedy)]


def _values(override: Any) -> list[Any]:
    """The value, or each value of a sweep over a list; other sweeps are Hydra's to check."""
    from hydra.core.override_parser.types import QuotedString

    if override.is_sweep_override():
        values = list(override.sweep_iterator()) if override.is_choice_sweep() else []
    else:
        values = [override.value()]
    return [value.text if isinstance(value, QuotedString) else value for value in values]


def _check_type(key: str, value: Any, scratch: Scratch) -> list[Refusal]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(value, str) and "${" in value:
        return []  # an interpolation: its value is known, and checked, after composing
    if isinstance(value, Enum):
        value = str(value)
    try:
        OmegaConf.update(scratch.config, key, value)
    except OmegaConfBaseException as error:
        kind = _kind(key)
        choices = scratch.rules[key].get("choices")
        remedy = f"use {', '.join(choices)}" if choices else f"give {kind}"
        return [Refusal(key, value, f"not {kind}" if kind else str(error).splitlines()[0], remedy)]
    return []


def _kind(key: str) -> str:
    """What a key takes, in words, from its annotation."""
    node: Any = Config
    for part in key.split("."):
        node = get_type_hints(node)[part]
    text = getattr(node, "__name__", None) if isinstance(node, type) else str(node)
    words = {
        "int": "a whole number",
        "int | None": "a whole number or null",
        "float": "a number",
        "float | None": "a number or null",
        "bool": "on, off, true or false",
        "str": "text",
        "str | None": "text or null",
        "list[str]": "a list: [a,b]",
    }
    return words.get(str(text), str(text))
