"""What cannot fit, said before a weight is read: the bytes of each component and phase, and what to try, in order."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

from wan_dist.config.schema import Config
from wan_dist.planning.footprint import COMPONENT, LAYERWISE, Footprint, Machine, Work
from wan_dist.planning.placement import DoesNotFitError, Orders, Plan, order_refusals, place
from wan_dist.planning.refusal import Refusal, RefusedError

_OFFLOAD_KEYS = ("transformer", "text_encoder", "image_encoder", "vae", "prefetch", "resident_blocks", "mode")
# What may be proposed instead of a larger one: sizes that every Wan model makes.
_SMALLER_VIDEOS: tuple[dict[str, Any], ...] = (
    {"height": 480, "width": 832},
    {"num_frames": 33},
    {"height": 480, "width": 832, "num_frames": 33},
)


def place_or_refuse(config: Config, work_for: Callable[[Config], Work], machine: Machine) -> Plan:
    """The plan. Raises RefusedError where orders contradict each other or nothing that they allow fits.

    work_for: what is to be done, for this config or one that differs in what may be tried instead."""
    orders, work = Orders.of(config), work_for(config)
    blocks = {name: len(weights.blocks) for name, weights in work.weights.items() if weights is not None}
    found = order_refusals(orders, blocks=blocks)
    if found:
        raise RefusedError(found)
    try:
        return place(work, machine, orders)
    except DoesNotFitError as error:
        tries = list(things_to_try(config, work_for, machine))
        key, value = _culprit(config, work_for, machine)
        more = "fewer ranks" if machine.device == "cpu" and machine.local_ranks > 1 else "more ranks"
        memory = "more host memory" if machine.device == "cpu" else "a device with more memory"
        remedy = "try, in order: " + "; ".join([*tries, f"{more}, or {memory}"])
        why = f"does not fit {room_words(machine)}"
        raise RefusedError([Refusal(key, value, why, f"{remedy}\n{table(error.footprint)}")]) from None


def _culprit(config: Config, work_for: Callable[[Config], Work], machine: Machine) -> tuple[str, str]:
    """The key that does not fit: the first order without which the rest would, else the first, else the mode."""
    orders = _orders(config)
    for key in orders:
        if _would_fit(config, {key: "auto"}, work_for, machine):
            return key, orders[key]
    return next(iter(orders.items()), ("offload.mode", config.offload.mode))


def _orders(config: Config) -> dict[str, str]:
    """What the user ordered of placements, by key."""
    given = {f"offload.{key}": str(getattr(config.offload, key)) for key in _OFFLOAD_KEYS}
    given["parallelism.fsdp.enabled"] = config.parallelism.fsdp.enabled
    return {key: value for key, value in given.items() if value not in ("auto", "off")}


def things_to_try(config: Config, work_for: Callable[[Config], Work], machine: Machine) -> Iterator[str]:
    """Overrides with which it would fit, the least costly first."""
    free = dict.fromkeys(_orders(config), "auto")
    least = {**free, "offload.mode": "memory", "runtime.vae_dtype": "bfloat16"}
    steps: list[dict[str, str]] = [
        *({key: "auto"} for key in free),
        free,
        {"parallelism.fsdp.enabled": "on"},
        {**free, "parallelism.fsdp.enabled": "on"},
        {"offload.transformer": LAYERWISE},
        {"offload.transformer": COMPONENT},
        {"runtime.vae_dtype": "bfloat16"},
        {**free, "offload.mode": "memory"},
        least,
    ]
    for video in _SMALLER_VIDEOS:
        if all((getattr(config.video, key) or 0) >= value for key, value in video.items()):
            steps.append({f"video.{key}": value for key, value in video.items()})
            steps.append({**least, **steps[-1]})
    for number, overrides in enumerate(steps):
        if overrides and overrides not in steps[:number] and _would_fit(config, overrides, work_for, machine):
            yield " ".join(f"{key}={value}" for key, value in overrides.items())


def _would_fit(
    config: Config, overrides: Mapping[str, Any], work_for: Callable[[Config], Work], machine: Machine
) -> bool:
    other = deepcopy(config)
    for key, value in overrides.items():
        *path, leaf = key.split(".")
        node: Any = other
        for part in path:
            node = getattr(node, part)
        setattr(node, leaf, value)
    if other == config:
        return False
    work, orders = work_for(other), Orders.of(other)
    if orders.fsdp == "on" and (work.shards == 1 or orders.transformer != "auto"):
        return False
    try:
        place(work, machine, orders)
    except DoesNotFitError:
        return False
    return True


def room_words(machine: Machine) -> str:
    """`the 24 GB of the device`, or of a node's host memory."""
    ranks = counted(machine.local_ranks, "rank")
    on_host = f"the {_gb(machine.host_bytes)} GB of host memory that a node has for {ranks}"
    if machine.device == "cpu":
        return on_host
    on_device = f"the {_gb(machine.device_bytes)} GB that are free on the device"
    return on_device if machine.host_bytes is None else f"{on_device} and {on_host}"


def table(found: Footprint) -> str:
    """Bytes by component and phase, as lines to print under a message."""
    names = sorted({name for here in found.components.values() for name in here})
    lines = [["GB a rank", *found.device]]
    for name in names:
        cells = [_gb(here[name]) if name in here else "" for here in found.components.values()]
        lines.append([f"{name} (size unknown)" if name in found.unknown else name, *cells])
    working = [total - sum(found.components[phase].values()) for phase, total in found.device.items()]
    lines.append(["beside the weights", *map(_gb, working)])
    lines.append(["on the device", *map(_gb, found.device.values())])
    lines.append(["host memory of a node", *map(_gb, found.node.values())])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(f"    {row.rstrip()}" for row in rows)


def counted(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def _gb(nbytes: int | None) -> str:
    return "?" if nbytes is None else f"{nbytes / 1e9:.3g}"
