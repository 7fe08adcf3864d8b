"""Free text on the command line, taken literally: `prompt=a cat, surfing (slow): 'wow' = 100% ${x}` means just that.

Hydra's override grammar gives commas, quotes, braces, `${` and more a meaning. A value of a free-text key is turned
into a quoted string of that grammar that stands for exactly the characters the program received.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wan_dist.config.schema import FREE_TEXT, Config

_FREE_TEXT_OVERRIDE = re.compile(rf"(\+{{0,2}})({'|'.join(map(re.escape, FREE_TEXT))})=(.*)", re.DOTALL)
_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_VALUE_FLAGS = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--package", "-p")
# OmegaConf reads the value `???` as "missing", and has no escape for it; a private-use character in front is ours.
_MISSING, _GUARD = "???", "\ue000"
_QUOTED_LIST = re.compile(rf"{_QUOTED}(?:\s*,\s*{_QUOTED})+", re.DOTALL)


def literal(text: str) -> str:
    r"""`text` as a quoted string of Hydra's grammar.

    Two readers come after the shell. Hydra's lexer: inside single quotes a backslash is itself unless it stands
    before a quote or at the end, where a run of them must be doubled. OmegaConf: `${` opens an interpolation unless
    escaped, and a run of backslashes before it must be doubled to stay. `unguard` undoes what is left.
    """
    if text == _MISSING or text.startswith(_GUARD):
        text = _GUARD + text
    text = re.sub(r"(\\*)\$\{", lambda m: m.group(1) * 2 + r"\${", text)
    text = re.sub(r"(\\*)'", lambda m: m.group(1) * 2 + r"\'", text)
    text = re.sub(r"(\\+)\Z", lambda m: m.group(1) * 2, text)
    return f"'{text}'"


def unguard(config: Config) -> None:
    """Take the guard off the composed config's free text, in place: the last step of its way through OmegaConf."""
    for key in FREE_TEXT:
        *path, leaf = key.split(".")
        node: Any = config
        for part in path:
            node = getattr(node, part)
        text = getattr(node, leaf)
        if text is not None:
            setattr(node, leaf, text.removeprefix(_GUARD))


def literal_overrides(arguments: Sequence[str], *, multirun: bool) -> list[str]:
    """The command line with every free-text value quoted; under `--multirun` a list of quoted strings stays a list,
    over which Hydra sweeps, each of its elements literal."""
    result = []
    for argument in arguments:
        match = _FREE_TEXT_OVERRIDE.fullmatch(argument)
        if match:
            prefix, key, text = match.groups()
            swept = multirun and _QUOTED_LIST.fullmatch(text)
            values = [_unquote(element) for element in re.findall(_QUOTED, text, re.DOTALL)] if swept else [text]
            argument = f"{prefix}{key}={','.join(map(literal, values))}"
        result.append(argument)
    return result


def _unquote(element: str) -> str:
    """What a quoted string of Hydra's grammar stands for: a run of backslashes before its kind of quote, or at the
    end, is halved, and the quote is itself."""
    quote, inner = element[0], element[1:-1]
    inner = re.sub(rf"(\\*)\\{quote}", lambda m: m.group(1)[: len(m.group(1)) // 2] + quote, inner)
    return re.sub(r"(\\+)\Z", lambda m: m.group(1)[: len(m.group(1)) // 2], inner)


def is_multirun(arguments: Sequence[str]) -> bool:
    """Whether Hydra would take this command line for a sweep (its parser accepts abbreviated flags)."""
    return any(a == "-m" or (len(a) > 2 and "--multirun".startswith(a)) for a in arguments)


def overrides_first(arguments: Sequence[str]) -> list[str]:
    """The command line with its overrides in front of its flags: Hydra's parser takes them in one run only, and
    `--info` would take the override after it for its value."""
    overrides: list[str] = []
    flags: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_override = (
            "=" in argument and not argument.startswith("-") and not (before in _VALUE_FLAGS or _is_config_dir(before))
        )
        (overrides if is_override else flags).append(argument)
    return overrides + flags


def config_dirs(arguments: Sequence[str]) -> list[Path]:
    """The folders that `--config-dir` (or `-cd`) names."""
    found = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        flag, equals, value = argument.partition("=")
        if _is_config_dir(before):
            found.append(Path(argument))
        elif equals and _is_config_dir(flag):
            found.append(Path(value))
    return found


def _is_config_dir(flag: str) -> bool:
    """`--config-dir`, also abbreviated as far as it is not another flag, or `-cd`."""
    return flag == "-cd" or (flag.startswith("--config-d") and "--config-dir".startswith(flag))
