"""Where each component of a run lives: one pure function from sizes, room and orders to a plan with its reasons.

A plan is a choice for each component: `resident` (on the device from its loading to the end of the run), `component`
(only while it works), `layerwise` (its blocks in host memory, visiting the device) or `fsdp` (its rows divided over
ranks). Choices are tried from the fastest to the most frugal one, and the first that fits is taken. What the user
ordered is the same in all of them: an order is obeyed or refused, never overridden.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import ceil

from wan_dist.config.schema import Config
from wan_dist.planning.footprint import (
    COMPONENT,
    DECODE,
    DENOISE,
    FSDP,
    LAYERWISE,
    RESIDENT,
    Choice,
    Footprint,
    Machine,
    Work,
    footprint,
    is_expert,
    phases_of,
)
from wan_dist.planning.refusal import Refusal
from wan_dist.planning.streaming import Streaming, choose_streaming

TO_SPARE = 0.1  # of what is free: allocators leave fragments, and estimates err
_AUTO = "auto"


@dataclass(frozen=True)
class Orders:
    """What the user decided: `auto` is the planner's to set. fsdp: `auto`, `on` or `off`."""

    mode: str = _AUTO
    transformer: str = _AUTO
    text_encoder: str = _AUTO
    image_encoder: str = _AUTO
    vae: str = _AUTO
    prefetch: int | None = None
    resident_blocks: int | None = None
    fsdp: str = _AUTO

    @classmethod
    def of(cls, config: Config) -> "Orders":
        offload = config.offload
        return cls(
            mode=offload.mode,
            transformer=offload.transformer,
            text_encoder=offload.text_encoder,
            image_encoder=offload.image_encoder,
            vae=offload.vae,
            prefetch=_count(offload.prefetch),
            resident_blocks=_count(offload.resident_blocks),
            fsdp=config.parallelism.fsdp.enabled,
        )

    def of_component(self, name: str) -> str:
        return getattr(self, "transformer" if is_expert(name) else name)


@dataclass(frozen=True)
class Placement:
    """Of one component. first, last: the phases between which it is on the device. streaming: where it is streamed."""

    component: str
    how: str
    reason: str
    first: str
    last: str
    streaming: Streaming | None = None


@dataclass(frozen=True)
class Plan:
    """placements: in the order of loading. footprint: what is predicted on `machine`. experts_leave: see `Choice`.
    warnings: what the user should know."""

    placements: tuple[Placement, ...]
    footprint: Footprint
    machine: Machine
    experts_leave: bool = False
    warnings: tuple[str, ...] = ()

    def how(self, component: str) -> str | None:
        """The placement of a component; None where it is not loaded."""
        return next((p.how for p in self.placements if p.component == component), None)

    def streaming(self, component: str) -> Streaming | None:
        return next((p.streaming for p in self.placements if p.component == component), None)

    def digest(self) -> str:
        """The same on two ranks only if their plans are."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class DoesNotFitError(ValueError):
    """Nothing that the orders allow fits. footprint: of the most frugal choice; choice: that one."""

    def __init__(self, choice: Choice, found: Footprint) -> None:
        super().__init__("does not fit")
        self.choice, self.footprint = choice, found


def place(work: Work, machine: Machine, orders: Orders) -> Plan:
    """The first choice that fits with a tenth to spare (`offload.mode=speed` spares nothing); where none does, the one
    that fits and leaves most.

    Raises DoesNotFitError where none does. The orders must have passed `order_refusals`.
    """
    choices = list(_choices(work, machine, orders))
    prints = [footprint(work, choice, machine) for choice in choices]
    possible = [
        (choice, found)
        for choice, found in zip(choices, prints, strict=True)
        if fits(found, machine, 0.0) and not _is_unknown_and_whole(found, choice, machine)
    ]
    spared = 0.0 if orders.mode == "speed" else TO_SPARE
    for choice, found in possible:
        if fits(found, machine, spared):
            return _plan(work, machine, orders, choice, found, whole=prints[0], barely=False)
    if possible:  # of equals the fastest
        choice, found = min(possible, key=lambda pair: _share(*_tightest(pair[1], machine)))
        return _plan(work, machine, orders, choice, found, whole=prints[0], barely=True)
    if prints[-1].unknown and fits(prints[-1], machine, 0.0):
        return _plan(work, machine, orders, choices[-1], prints[-1], whole=prints[0], barely=False)
    raise DoesNotFitError(choices[-1], prints[-1])


def fits(found: Footprint, machine: Machine, to_spare: float) -> bool:
    """Whether that share of the room is left. On a CPU the node's host memory is the room, elsewhere the device too."""
    usable = 1 - to_spare
    on_device = machine.device == "cpu" or _within(found.peak_device, machine.device_bytes, usable)
    return on_device and _within(found.peak_node, machine.host_bytes, usable)


def _within(need: int, room: int | None, usable: float) -> bool:
    return room is None or need <= usable * room


def _tightest(found: Footprint, machine: Machine) -> tuple[int, int]:
    """What is needed and the room for it, where that is scarcest: on the device or in a node's host memory."""
    limits = [] if machine.device == "cpu" else [(found.peak_device, machine.device_bytes)]
    limits += [(found.peak_node, machine.host_bytes)]
    return max(((need, room) for need, room in limits if room is not None), key=lambda limit: _share(*limit))


def _share(need: int, room: int) -> float:
    return need / max(room, 1)


def _is_unknown_and_whole(found: Footprint, choice: Choice, machine: Machine) -> bool:
    """Whether a component of unknown size is to be held whole: it counts as large, unless room is no limit."""
    room = machine.host_bytes if machine.device == "cpu" else machine.device_bytes
    return room is not None and any(choice.how[name] in (RESIDENT, COMPONENT) for name in found.unknown)


def order_refusals(orders: Orders, *, blocks: Mapping[str, int]) -> list[Refusal]:
    """Orders that contradict each other or that no component can obey. blocks: of each component that can stream."""
    found = []
    for name in ("vae", "image_encoder"):
        if getattr(orders, name) == LAYERWISE:
            shown = {"vae": "VAE"}.get(name, name.replace("_", " "))
            why = f"the {shown} is never streamed: every call runs all of its weights for a moment's work"
            found.append(Refusal(f"offload.{name}", LAYERWISE, why, "use component, or auto"))
    if orders.fsdp == "on" and orders.transformer != _AUTO:
        why = "parallelism.fsdp.enabled=on orders the same weights to be divided over ranks"
        found.append(Refusal("offload.transformer", orders.transformer, why, "leave one of the two at auto"))
    most = min((count for name, count in blocks.items() if is_expert(name)), default=None)
    if orders.resident_blocks is not None and most is not None and orders.resident_blocks > most:
        why = f"the transformer has {most} blocks"
        found.append(Refusal("offload.resident_blocks", orders.resident_blocks, why, f"use 0 to {most}"))
    return found


def _choices(work: Work, machine: Machine, orders: Orders) -> Iterator[Choice]:
    """From the fastest to the most frugal one, with the orders in all of them."""
    for transformer in _transformer_options(work, orders):
        for others, experts_leave in _other_options(work, orders, transformer):
            how = {
                name: transformer if is_expert(name) else _ordered(orders, name) or others[name]
                for name in work.weights
            }
            plain = Choice(how, _streaming(work, machine, orders, how), experts_leave)
            if (blocks := _blocks_that_fit_beside(work, machine, plain)) > 0:
                yield Choice(how, _streaming(work, machine, orders, how, may_stay=blocks), experts_leave)
            yield plain
            if (blocks := _blocks_without_room_on_host(work, machine, plain)) > 0:
                yield Choice(how, _streaming(work, machine, orders, how, stay=blocks), experts_leave)


def _blocks_without_room_on_host(work: Work, machine: Machine, plain: Choice) -> int:
    """How many blocks of each streamed transformer the host's memory is short of, so that they must stay on a GPU; 0
    where it is not, or they are too many to be streamed at all."""
    streamed = [work.weights[name] for name in work.experts if plain.how[name] == LAYERWISE]
    blocks = [weights.blocks for weights in streamed if weights is not None and weights.blocks]
    if not blocks or machine.device == "cpu" or machine.host_bytes is None:
        return 0
    short = footprint(work, plain, machine).peak_node - (1 - TO_SPARE) * machine.host_bytes
    count = ceil(short / (work.copies * sum(map(max, blocks)))) if short > 0 else 0
    return count if count < min(map(len, blocks)) else 0


def _blocks_that_fit_beside(work: Work, machine: Machine, plain: Choice) -> int:
    """How many blocks of each streamed transformer there is room for on the device beside what `plain` takes there
    while they work."""
    streamed = [work.weights[name] for name in work.experts if plain.how[name] == LAYERWISE]
    largest = sum(max(weights.blocks, default=0) for weights in streamed if weights is not None)
    if not largest or machine.device_bytes is None:
        return 0
    left = (1 - TO_SPARE) * machine.device_bytes - footprint(work, plain, machine).device[DENOISE]
    return max(0, int(left) // largest)


def _transformer_options(work: Work, orders: Orders) -> list[str]:
    if orders.fsdp == "on":  # one rank alone has all rows of its replica
        return [FSDP if work.shards > 1 else RESIDENT]
    if orders.transformer != _AUTO:
        return [orders.transformer]
    if orders.mode == "manual":
        return [RESIDENT]
    if orders.mode == "memory":
        return [LAYERWISE]
    sharded = [FSDP] if work.shards > 1 and orders.fsdp == _AUTO else []
    one_at_a_time = [COMPONENT] if orders.mode == "speed" or work.few_steps else []
    # Few steps of a distilled model are no time to bring all blocks back for each: that is the user's to order.
    streamed = [] if work.few_steps else [LAYERWISE]
    return [RESIDENT, *sharded, *one_at_a_time, *streamed]


def _other_options(work: Work, orders: Orders, transformer: str) -> list[tuple[dict[str, str], bool]]:
    """What the other components do beside that, and whether resident transformers leave before decoding: from the most
    that is kept to the least."""
    encoders_leave = {"text_encoder": COMPONENT, "image_encoder": COMPONENT}
    stay = dict.fromkeys((*encoders_leave, "vae"), RESIDENT)
    if orders.mode == "manual":
        return [(stay, False)]
    may_leave = transformer == RESIDENT and orders.transformer == _AUTO and DECODE in work.working
    divided = {"text_encoder": FSDP if transformer == FSDP else LAYERWISE}
    rest = [({**encoders_leave, "vae": COMPONENT}, may_leave)]
    could_be_sharded = transformer == RESIDENT and orders.fsdp == _AUTO and work.shards > 1
    if not (orders.mode == "speed" and could_be_sharded):  # which is tried next, and streams nothing
        rest.append(({**encoders_leave, **divided, "vae": COMPONENT}, may_leave))
    if orders.mode == "memory":
        return rest
    leave = [({**stay, **encoders_leave}, False), *([({**stay, **encoders_leave}, True)] if may_leave else [])]
    # What is ordered of the transformer drags nothing along; what was chosen because room is short comes after this.
    chosen = transformer != RESIDENT and orders.transformer == _AUTO and orders.fsdp != "on"
    return [*([] if chosen else [(stay, False)]), *leave, *rest]


def _ordered(orders: Orders, name: str) -> str | None:
    order = orders.of_component(name)
    return None if order == _AUTO else order


def _streaming(
    work: Work, machine: Machine, orders: Orders, how: Mapping[str, str], *, may_stay: int = 0, stay: int | None = None
) -> dict[str, Streaming]:
    """How each streamed component streams; the orders are about the transformer. may_stay: how many blocks there is
    room for, if hiding the copies takes them. stay: how many are to stay on the device, whatever they hide."""
    found = {}
    resident_blocks = orders.resident_blocks if orders.resident_blocks is not None else stay
    decides = orders.mode != "manual" and work.block_s is not None
    for name, weights in work.weights.items():
        if how[name] != LAYERWISE:
            continue
        blocks = weights.blocks if weights is not None else ()
        visit_s = work.block_s * work.branches if decides and work.block_s is not None and is_expert(name) else None
        found[name] = choose_streaming(
            blocks,
            compute_s=visit_s,
            bytes_per_s=machine.host_bytes_per_s,
            prefetch=orders.prefetch if is_expert(name) else 1,
            resident_blocks=resident_blocks if is_expert(name) else 0,
            # at the change of experts two blocks of the next one are on their way
            least_prefetch=2 if is_expert(name) and len(work.experts) > 1 and orders.mode != "manual" else 1,
            may_stay=min(may_stay, len(blocks)),
        )
    return found


def _plan(
    work: Work, machine: Machine, orders: Orders, choice: Choice, found: Footprint, *, whole: Footprint, barely: bool
) -> Plan:
    placements = []
    for name in (*(name for name in work.weights if name != "vae"), *({"vae"} & set(work.weights))):
        reason = _reason(work, machine, orders, choice, name, found, whole) + _where(work, choice, name)
        phases = phases_of(work, choice, name)
        placements.append(Placement(name, choice.how[name], reason, phases[0], phases[-1], choice.streaming.get(name)))
    warnings = [_transfer_warning(name, streaming) for name, streaming in choice.streaming.items() if is_expert(name)]
    if barely:
        need, room = _tightest(found, machine)
        warnings.append(f"less than a tenth of the memory is to spare: {_gb(need)} of {_gb(room)} GB")
    return Plan(tuple(placements), found, machine, choice.experts_leave, tuple(dict.fromkeys(filter(None, warnings))))


def _where(work: Work, choice: Choice, name: str) -> str:
    """Which ranks hold it, where that is not all of them."""
    if name == "vae" and work.vae_ranks > 1:
        return f"; on {work.vae_ranks} ranks, each with its rows of the video"
    return "; on rank 0" if not is_expert(name) and choice.how[name] != FSDP else ""


def _transfer_warning(name: str, streaming: Streaming) -> str:
    if not streaming.exposed_s():
        return ""
    assert streaming.copy_s is not None and streaming.compute_s is not None
    return (
        "streaming waits for copies (a short clip, or a slow link to the device): a block of the transformer takes "
        f"{1e3 * streaming.copy_s:.1f} ms to copy, {1e3 * streaming.compute_s:.1f} to compute with; "
        f"{100 * streaming.hidden:.0f} % of the copying is hidden"
    )


def _reason(
    work: Work, machine: Machine, orders: Orders, choice: Choice, name: str, found: Footprint, whole: Footprint
) -> str:
    """One sentence."""
    how, room = choice.how[name], machine.host_bytes if machine.device == "cpu" else machine.device_bytes
    order = _order_of(orders, name, how, work)
    if how == LAYERWISE:
        how_it_streams = _streaming_words(choice.streaming[name])
        return f"{order or _why_not_whole(found, whole, machine, room, name)}: {how_it_streams}"
    if how == FSDP:
        why = order or _why_not_whole(found, whole, machine, room, name)
        return f"{why}: its rows are divided over {work.shards} ranks"
    if order:
        return order
    if how == COMPONENT:
        leaves = "it is on the device only while it works"
        return f"{_why_not_whole(found, whole, machine, room, name)}: {leaves}"
    if room is None:
        return "room is not known to be a limit"
    leaves = "; it makes room before decoding" if is_expert(name) and choice.experts_leave else ""
    return f"it fits: {_gb(_need(found, machine))} of {_gb(room)} GB at the peak{leaves}"


def _order_of(orders: Orders, name: str, how: str, work: Work) -> str | None:
    """The order that a placement follows, as the user would type it."""
    if how == FSDP and is_expert(name) and orders.fsdp == "on":
        return "parallelism.fsdp.enabled=on"
    if how == RESIDENT and is_expert(name) and orders.fsdp == "on":
        return "parallelism.fsdp.enabled=on: there is one rank to divide its rows over, which holds all of them"
    if _ordered(orders, name) is not None:
        return f"offload.{'transformer' if is_expert(name) else name}={how}"
    if orders.mode == "manual" or (orders.mode == "memory" and how in (LAYERWISE, COMPONENT)):
        return f"offload.mode={orders.mode}"
    return None


def _why_not_whole(found: Footprint, whole: Footprint, machine: Machine, room: int | None, name: str) -> str:
    if name in found.unknown:
        return "its size is unknown, which counts as large"
    if room is None:
        return "offload.mode"
    return f"all resident would take {_gb(_need(whole, machine))} of {_gb(room)} GB"


def _streaming_words(streaming: Streaming) -> str:
    words = f"prefetch {streaming.prefetch}"
    if streaming.resident_blocks:
        words += f", {streaming.resident_blocks} of {streaming.blocks} blocks resident"
    if streaming.copy_s is not None:
        words += f", {100 * streaming.hidden:.0f} % of the copying hidden behind computing"
    return words


def _need(found: Footprint, machine: Machine) -> int:
    return found.peak_node if machine.device == "cpu" else found.peak_device


def _gb(nbytes: int | None) -> str:
    return "?" if nbytes is None else f"{nbytes / 1e9:.3g}"


def _count(value: str | int) -> int | None:
    """Of `auto` or a whole number, which Python code may give as one."""
    return int(value) if str(value).isdecimal() else None
