"""Switches: `on`, `off`, `true` and `false` mean the same from YAML and from the command line.

YAML 1.1 reads an unquoted `on` as a boolean, which OmegaConf stores as 'True' in a string field; here, and only
here, such values become `on` and `off` again. `dpmpp` is the other common spelling of `dpm++`.
"""

from dataclasses import fields, is_dataclass
from typing import Any

_SWITCH = {"true": "on", "false": "off", "on": "on", "off": "off"}


def normalise_switches(node: Any) -> None:
    """Rewrite, in place, every field of a config dataclass whose choices include `off`."""
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value):
            normalise_switches(value)
        elif "off" in f.metadata.get("choices", ()) and isinstance(value, str):
            setattr(node, f.name, _SWITCH.get(value.lower(), value))
        elif "dpm++" in f.metadata.get("choices", ()) and value == "dpmpp":
            setattr(node, f.name, "dpm++")
