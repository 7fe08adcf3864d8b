"""What a placement takes, by phase: bytes on the device of the rank that needs most, and in the host memory of a node.

The phases of a generation, and what is on the device in each:
encode text: the text encoder; encode images: the image encoder and the VAE; denoise: the transformers; decode: the VAE.
Beside these, what is `resident` stays from its loading to the end of the run.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from wan_dist.planning.streaming import Streaming
from wan_dist.planning.weights import Weights

RESIDENT, COMPONENT, LAYERWISE, FSDP = "resident", "component", "layerwise", "fsdp"
ENCODE_TEXT, ENCODE_IMAGES, DENOISE, DECODE = "encode text", "encode images", "denoise", "decode"
PHASES = (ENCODE_TEXT, ENCODE_IMAGES, DENOISE, DECODE)
# FSDP gathers the next unit while one computes; gloo's gather holds what it sends, and what came, besides.
_GATHERED_UNITS = {"cuda": 2, "cpu": 4}


@dataclass(frozen=True)
class Machine:
    """device: `cpu` or `cuda`. device_bytes: free on the device that has least (CUDA). host_bytes: what the processes
    of a node may still take; either None where it is no limit. host_bytes_per_s: from host to device, None where copies
    do not run beside computing."""

    device: str
    device_bytes: int | None
    host_bytes: int | None
    local_ranks: int = 1
    host_bytes_per_s: float | None = None


@dataclass(frozen=True)
class Work:
    """What is to be done, as far as memory and placement depend on it.

    weights: of each component that is loaded, on one rank; None where its size is unknown. working: bytes beside the
    weights at the peak of each phase that is gone through; streamed: of denoising where blocks are streamed, so that
    both guidance branches are alive at once and text keys are not kept. branches: forwards of a step on one rank.
    block_s: seconds that a block of the transformer computes in one forward. shards: ranks that FSDP can divide weights
    over. copies: host copies that a node holds of streamed blocks (one per tensor-parallel rank). process: what a
    rank's process takes besides; writing: what the first one's does while it writes the video. few_steps: an unguided
    schedule of a few steps, as distilled models have it. vae_ranks: ranks that have rows of the video.
    """

    weights: Mapping[str, Weights | None]
    working: Mapping[str, int]
    streamed: int = 0
    branches: int = 1
    block_s: float | None = None
    shards: int = 1
    copies: int = 1
    process: int = 0
    writing: int = 0
    few_steps: bool = False
    vae_ranks: int = 1

    @property
    def experts(self) -> tuple[str, ...]:
        return tuple(name for name in self.weights if is_expert(name))

    @property
    def phases(self) -> tuple[str, ...]:
        return tuple(phase for phase in PHASES if phase in self.working)


@dataclass(frozen=True)
class Choice:
    """how: of each component. streaming: of each that is streamed (the transformers stream alike). experts_leave:
    whether resident transformers make room before decoding, after all."""

    how: Mapping[str, str]
    streaming: Mapping[str, Streaming]
    experts_leave: bool = False


@dataclass(frozen=True)
class Footprint:
    """Bytes by phase: device, of the first rank, which has most; rank, of its own (anonymous) host memory over what its
    imports take, on a CPU everything; node, of all host memory of the first node, streamed blocks included.
    components: by phase, those that are on the device and their bytes. unknown: of unknown size."""

    device: dict[str, int]
    rank: dict[str, int]
    node: dict[str, int]
    components: dict[str, dict[str, int]]
    unknown: tuple[str, ...]

    @property
    def peak_device(self) -> int:
        return max(self.device.values(), default=0)

    @property
    def peak_rank(self) -> int:
        return max(self.rank.values(), default=0)

    @property
    def peak_node(self) -> int:
        return max(self.node.values(), default=0)


def is_expert(component: str) -> bool:
    return component.startswith("transformer")


def footprint(work: Work, choice: Choice, machine: Machine) -> Footprint:
    """What `choice` takes on `machine`."""
    unknown = tuple(name for name, weights in work.weights.items() if weights is None)
    device, rank, node, components = {}, {}, {}, {}
    for phase in work.phases:
        alive = [name for name in work.weights if _is_alive(work, choice, name, phase)]
        here = {name: _on_device(work, choice, name, machine) for name in alive}
        experts = [name for name in here if is_expert(name)]
        for name in experts[1:]:
            if choice.how[name] == LAYERWISE:
                here[name] -= _ring(work, choice, name)  # they share one ring
            elif choice.how[name] == COMPONENT:
                here[name] = max(0, here[name] - here[experts[0]])  # one at a time: the larger one counts
        is_streamed = phase == DENOISE and any(choice.how[name] == LAYERWISE for name in experts)
        working = work.streamed if is_streamed else work.working[phase]
        device[phase] = sum(here.values()) + working
        components[phase] = here
        streamed = sum(_on_host(work, choice, name) for name in here)
        others = rank[phase] = work.process
        if machine.device == "cpu":
            firsts = sum(size for name, size in here.items() if _is_first_ranks(name, choice))
            firsts += working if phase == ENCODE_TEXT and choice.how["text_encoder"] != FSDP else 0
            rank[phase] += device[phase]
            others += device[phase] - firsts
        rank[phase] += work.writing if phase == DECODE else 0
        node[phase] = rank[phase] + (machine.local_ranks - 1) * others + streamed
    return Footprint(device, rank, node, components, unknown)


def phases_of(work: Work, choice: Choice, name: str) -> list[str]:
    """The phases in which a component is on the device, in order."""
    return [phase for phase in work.phases if _is_alive(work, choice, name, phase)]


def _is_alive(work: Work, choice: Choice, name: str, phase: str) -> bool:
    works_in = {
        "text_encoder": {ENCODE_TEXT},
        "image_encoder": {ENCODE_IMAGES},
        "vae": {ENCODE_IMAGES, DECODE} & set(work.working),
    }.get(name, {DENOISE})
    if phase in works_in:
        return True
    if choice.how[name] != RESIDENT or (is_expert(name) and choice.experts_leave):
        return False
    loaded = min(PHASES.index(first) for first in works_in) if works_in else 0
    if name == "vae":  # with the transformers, if not before
        loaded = min(loaded, PHASES.index(DENOISE))
    return PHASES.index(phase) >= loaded


def _is_first_ranks(name: str, choice: Choice) -> bool:
    """Whether only the first rank holds it."""
    return name in ("text_encoder", "image_encoder") and choice.how[name] != FSDP


def _on_device(work: Work, choice: Choice, name: str, machine: Machine) -> int:
    weights, how = work.weights[name], choice.how[name]
    if weights is None:
        return 0
    if how == FSDP:
        return weights.sharded + _GATHERED_UNITS[machine.device] * weights.largest_unit
    if how == LAYERWISE:
        stays = choice.streaming[name].resident_blocks
        return weights.outside + _largest(weights.blocks) * stays + _ring(work, choice, name)
    return weights.total


def _ring(work: Work, choice: Choice, name: str) -> int:
    """The slots on the device: no more than there are blocks to stream through them."""
    weights, streaming = work.weights[name], choice.streaming[name]
    if weights is None:
        return 0
    sharing = [other for other in choice.streaming if is_expert(other) == is_expert(name)]
    streamed = sum(choice.streaming[other].blocks - streaming.resident_blocks for other in sharing)
    return min(streaming.prefetch + 1, streamed) * _largest(weights.blocks)


def _on_host(work: Work, choice: Choice, name: str) -> int:
    """Bytes of a node's host memory that hold streamed blocks."""
    weights = work.weights[name]
    if weights is None or choice.how[name] != LAYERWISE:
        return 0
    stays = choice.streaming[name].resident_blocks
    streamed = sum(weights.blocks) - stays * _largest(weights.blocks)
    return max(0, streamed) * (work.copies if is_expert(name) else 1)


def _largest(blocks: tuple[int, ...]) -> int:
    return max(blocks, default=0)
