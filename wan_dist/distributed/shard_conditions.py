"""Shard conditions: which modules of a model become FSDP units. Imports no torch.

A condition is a predicate of a module's qualified name and the module. Which ones apply is resolved in this order:
those named in the config, the classes that the model itself declares as its repeated blocks, numbered entries of the
common containers. A model that none of them matches is an error, never a model that is silently not sharded.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

# (qualified name, module) -> whether it is a unit of its own
ShardCondition = Callable[[str, Any], bool]

REFINER_CONTAINERS = ("refiner_blocks", "noise_refiner", "context_refiner")
COMMON_CONTAINERS = (
    "blocks",
    "layers",
    "double_blocks",
    "single_blocks",
    *REFINER_CONTAINERS,
    "transformer_blocks",
    "single_transformer_blocks",
    "block",  # transformers' T5 and UMT5
)


def is_module_list_entry(name: str, container: str) -> bool:
    """Whether `name` is a numbered entry of a list called `container`, at any depth: `blocks.0`, `encoder.block.12`;
    not `blocks`, `blocks.a`, `xblocks.0`, nor what lies inside an entry (`blocks.0.attn1`)."""
    parts = name.split(".")
    return len(parts) >= 2 and parts[-2] == container and parts[-1].isascii() and parts[-1].isdecimal()


def is_module_list_entry_in(name: str, containers: Iterable[str]) -> bool:
    """`is_module_list_entry` for any of several containers."""
    return any(is_module_list_entry(name, container) for container in containers)


def is_layer(name: str, module: Any = None) -> bool:
    """`layers.N`"""
    return is_module_list_entry(name, "layers")


def is_block(name: str, module: Any = None) -> bool:
    """`blocks.N`"""
    return is_module_list_entry(name, "blocks")


def is_double_block(name: str, module: Any = None) -> bool:
    """`double_blocks.N`"""
    return is_module_list_entry(name, "double_blocks")


def is_single_block(name: str, module: Any = None) -> bool:
    """`single_blocks.N`"""
    return is_module_list_entry(name, "single_blocks")


def is_refiner_block(name: str, module: Any = None) -> bool:
    """`refiner_blocks.N`, `noise_refiner.N`, `context_refiner.N`"""
    return is_module_list_entry_in(name, REFINER_CONTAINERS)


def is_common_numbered_block(name: str, module: Any = None) -> bool:
    """A numbered entry of any of the common containers."""
    return is_module_list_entry_in(name, COMMON_CONTAINERS)


# What `parallelism.fsdp.shard_conditions` takes.
CONDITIONS: dict[str, ShardCondition] = {
    condition.__name__: condition
    for condition in (
        is_layer,
        is_block,
        is_double_block,
        is_single_block,
        is_refiner_block,
        is_common_numbered_block,
    )
}


def has_class_in(class_names: Iterable[str]) -> ShardCondition:
    """Whether the module's class, or one it inherits from, has one of these names."""
    names = frozenset(class_names)
    return lambda _name, module: any(cls.__name__ in names for cls in type(module).__mro__)


@dataclass(frozen=True)
class ShardUnits:
    """The qualified names of a model's FSDP units, in the model's order, and the rule that chose them."""

    names: tuple[str, ...]
    rule: str


def shard_units(model: Any, explicit: Iterable[str] = ()) -> ShardUnits:
    """Resolve what to shard in `model` (an nn.Module).

    explicit: names in `CONDITIONS`; where given, nothing else is tried. Raises ValueError naming the model's class
    where nothing matches.
    """
    explicit = tuple(explicit)
    declared = _declared_block_classes(model)
    if explicit:
        rules = [(", ".join(explicit), lambda name, module: any(CONDITIONS[e](name, module) for e in explicit))]
    else:
        rules = [
            (f"block class {', '.join(declared)}", has_class_in(declared)),
            ("common numbered block", is_common_numbered_block),
        ]
    for rule, condition in rules:
        names = tuple(name for name, module in model.named_modules() if name and condition(name, module))
        if names:
            return ShardUnits(names, rule)
    tried = "; ".join(rule for rule, _ in rules)
    raise ValueError(f"{type(model).__name__}: no module matches a shard condition (tried: {tried})")


def _declared_block_classes(model: Any) -> tuple[str, ...]:
    """diffusers' `_repeated_blocks`, else transformers' `_no_split_modules`."""
    for declaration in ("_repeated_blocks", "_no_split_modules"):
        if classes := getattr(model, declaration, None):
            return tuple(classes)
    return ()
