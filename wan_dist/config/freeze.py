"""The frozen config: one YAML file that a run writes once and that every rank reads.

Plain YAML on both sides, never OmegaConf: a frozen value is final, so a prompt that contains `${...}` must not be
interpolated a second time.
"""

import types
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from wan_dist.config.schema import Config


def to_yaml(config: Config) -> str:
    """The config as YAML that reads back equal; readable text where YAML leaves it alone, escapes where it would not
    (it folds U+0085 and its like into line breaks)."""
    values = asdict(config)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1 << 20)
    if yaml.safe_load(text) != values:
        text = yaml.safe_dump(values, sort_keys=False, width=1 << 20)
    return text


def from_yaml(text: str) -> Config:
    return _build(Config, yaml.safe_load(text))


def load(path: Path) -> Config:
    return from_yaml(path.read_text(encoding="utf-8"))


def _build(cls: type, values: dict[str, Any]) -> Any:
    """`cls(**values)`, dataclasses within dataclasses; an unknown or missing key is an error."""
    hints = get_type_hints(cls)
    names = {f.name for f in fields(cls)}
    if set(values) != names:
        raise ValueError(f"frozen {cls.__name__}: keys that differ from its schema: {sorted(set(values) ^ names)}")
    return cls(**{name: _convert(hints[name], value) for name, value in values.items()})


def _convert(hint: Any, value: Any) -> Any:
    if is_dataclass(hint):
        return _build(hint, value)  # type: ignore[arg-type]
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value
