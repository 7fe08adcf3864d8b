"""Every mesh of a number of ranks: whether it can run, where components would live on it, what it would cost.

`task=plan` shows all of it; `parallelism=auto` takes the mesh that is marked best.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod

from wan_dist.config.schema import Config
from wan_dist.loading.checkpoint import Checkpoint
from wan_dist.planning.cost import Rates, predicted_step
from wan_dist.planning.degrees import AXES, given_degrees
from wan_dist.planning.footprint import COMPONENT, FSDP, LAYERWISE, Machine, Work
from wan_dist.planning.placement import Plan
from wan_dist.planning.rates import rates_of
from wan_dist.planning.refusal import Refusal, RefusedError
from wan_dist.planning.refusals import fsdp_refusals, mesh_refusals
from wan_dist.planning.room import place_or_refuse
from wan_dist.planning.traffic import bytes_sent, crosses_nodes, crossing_warning, forwards_per_step
from wan_dist.planning.workload import DTYPE_BYTES, Sizes, Task, decode_flops, step_flops, step_shape, work_of
from wan_dist.topology import threads_per_rank

_AS_GOOD = 1.05  # of the fastest mesh's time: within it the usual order of axes decides, which needs no prediction
_VAE_RATE = 0.12  # of a device's matmul rate, that convolutions reach: 639 TFLOP in 6.9 s were seen on one H100
_COLLECTIVES = ("all_to_all", "p2p", "all_reduce", "all_gather", "fsdp_all_gather")


@dataclass(frozen=True)
class Cost:
    """Seconds of a step by part (`predicted_step`, and `transfer`: waiting for streamed blocks) and of a video; bytes
    that a rank sends in a step, and reads; seconds to read them from disk."""

    step: dict[str, float]
    sent: dict[str, int]
    decode_s: float
    load_s: float
    bytes_read: int
    video_s: float

    @property
    def step_s(self) -> float:
        return self.step["total"]

    @property
    def communication(self) -> float:
        """Its share of a step."""
        return sum(self.step.get(name, 0.0) for name in _COLLECTIVES) / self.step_s

    @property
    def transfer(self) -> float:
        """Its share of a step."""
        return self.step["transfer"] / self.step_s


@dataclass(frozen=True)
class Candidate:
    """A mesh; either it is refused, or it has a plan and a cost."""

    degrees: dict[str, int]
    refusals: tuple[Refusal, ...] = ()
    plan: Plan | None = None
    cost: Cost | None = None


@dataclass(frozen=True)
class Place:
    """Where it is to run: so many ranks on so many nodes, and what each has (see `Machine`)."""

    ranks: int
    nodes: int
    device: str
    device_bytes: int | None
    host_bytes: int | None

    @property
    def ranks_per_node(self) -> int:
        return -(-self.ranks // self.nodes)


def survey(
    config: Config, checkpoint: Checkpoint, task: Task, place: Place, *, on_disk: Mapping[str, str] | None = None
) -> list[Candidate]:
    """All meshes of `place.ranks` that leave the given degrees as they are. config: resolved but for the degrees."""
    sizes = Sizes(checkpoint, task, on_disk)
    return [
        _candidate(config, checkpoint, task, place, degrees, sizes)
        for degrees in meshes(given_degrees(config.parallelism), place.ranks)
    ]


def best(candidates: list[Candidate], usual: Mapping[str, int]) -> Candidate | None:
    """The fastest of those that can run, or the usual mesh where it is as good; None where none can."""
    possible = [candidate for candidate in candidates if candidate.cost is not None]
    if not possible:
        return None
    fastest = min(possible, key=_video_s)
    return next(
        (c for c in possible if c.degrees == dict(usual) and _video_s(c) <= _AS_GOOD * _video_s(fastest)), fastest
    )


def meshes(given: Mapping[str, int], ranks: int) -> Iterator[dict[str, int]]:
    """Degrees of all axes whose product is `ranks`; the given ones as they are, dp 1 unless it is given, cfg at most 2.

    >>> [tuple(degrees.values()) for degrees in meshes({"ring": 1, "tp": 1}, 4)]
    [(1, 1, 1, 4, 1), (1, 2, 1, 2, 1)]
    """

    def rest(axes: tuple[str, ...], left: int) -> Iterator[dict[str, int]]:
        if not axes:
            if left == 1:
                yield {}
            return
        axis, *others = axes
        most = {"dp": 1, "cfg": 2}.get(axis, left)
        choices = [given[axis]] if axis in given else [n for n in range(1, min(most, left) + 1) if left % n == 0]
        for degree in choices:
            if left % degree == 0:
                for more in rest(tuple(others), left // degree):
                    yield {axis: degree, **more}

    yield from rest(AXES, ranks)


def _video_s(candidate: Candidate) -> float:
    assert candidate.cost is not None
    return candidate.cost.video_s


def _candidate(
    config: Config,
    checkpoint: Checkpoint,
    task: Task,
    place: Place,
    degrees: dict[str, int],
    sizes: Sizes,
) -> Candidate:
    heads = {checkpoint.configs[name].get("num_attention_heads", 40) for name in checkpoint.experts}
    refusals = [r for count in sorted(heads) for r in mesh_refusals(degrees, heads=count, guided=task.guided)]
    refusals += fsdp_refusals(config.parallelism.fsdp, degrees)
    if prod(degrees.values()) % place.nodes:
        why = f"{place.ranks} ranks do not divide over {place.nodes} nodes"
        refusals.append(Refusal("plan.nodes", place.nodes, why, "use a divisor of the ranks"))
    if refusals:
        return Candidate(degrees, tuple(dict.fromkeys(refusals)))
    rates = rates_of(config.plan, place.device)
    machine = Machine(
        device=place.device,
        device_bytes=place.device_bytes,
        host_bytes=place.host_bytes,
        local_ranks=place.ranks_per_node,
        host_bytes_per_s=rates.host if place.device == "cuda" else None,
    )
    work_for = partial(
        work_of,
        checkpoint=checkpoint,
        task=task,
        degrees=degrees,
        device=place.device,
        local_ranks=place.ranks_per_node,
        threads=threads_per_rank(place.ranks_per_node),
        sizes=sizes,
    )
    work = work_for(config)
    try:
        plan = place_or_refuse(config, work_for, machine)
    except RefusedError as error:
        return Candidate(degrees, tuple(error.refusals))
    if (crossing := crossing_warning(degrees, place.ranks_per_node)) is not None:
        plan = replace(plan, warnings=(*plan.warnings, crossing))
    step = step_cost(config, checkpoint, task, place, degrees=degrees, work=work, plan=plan, rates=rates)
    cost = _cost(config, checkpoint, task, place, step=step, work=work, plan=plan, rates=rates, sizes=sizes)
    return Candidate(degrees, (), plan, cost)


def _cost(
    config: Config,
    checkpoint: Checkpoint,
    task: Task,
    place: Place,
    *,
    step: tuple[dict[str, int], dict[str, float]],
    work: Work,
    plan: Plan,
    rates: Rates,
    sizes: Sizes,
) -> Cost:
    """Of the first rank, which has the most to do. step: what one sends, and its seconds by part."""
    sent, seconds = step
    decode_s = decode_seconds(config, checkpoint, place, rates) if task.decodes else 0.0
    read = sum(_bytes_read(work, plan, name) for name in work.weights)
    load_s = sum(bytes_from_disk(config, place, work=work, plan=plan, sizes=sizes).values()) / rates.disk
    video_s = task.steps * seconds["total"] + decode_s + load_s
    return Cost(seconds, sent, decode_s, load_s, read, video_s)


def decode_seconds(config: Config, checkpoint: Checkpoint, place: Place, rates: Rates) -> float:
    """Of the whole video."""
    ranks = place.ranks if config.parallelism.vae != "off" else 1
    return decode_flops(config, checkpoint) / (_VAE_RATE * rates.matmul) / ranks


def bytes_from_disk(config: Config, place: Place, *, work: Work, plan: Plan, sizes: Sizes) -> dict[str, int]:
    """Of a node's disk, by component: what several ranks of a node read comes from it once, then from the page
    cache."""
    found = {}
    for name in work.weights:
        whole = sizes.of(config, name)
        readers = 1 if name in ("text_encoder", "image_encoder") and plan.how(name) != FSDP else place.ranks_per_node
        found[name] = min(whole.file_bytes if whole is not None else 0, readers * _bytes_read(work, plan, name))
    return found


def step_cost(
    config: Config,
    checkpoint: Checkpoint,
    task: Task,
    place: Place,
    *,
    degrees: Mapping[str, int],
    work: Work,
    plan: Plan,
    rates: Rates,
) -> tuple[dict[str, int], dict[str, float]]:
    """Bytes that a step sends, and its seconds by part."""
    expert = task.experts[0]
    weights, is_sharded = work.weights[expert], plan.how(expert) == FSDP
    shards, streaming = work.shards if is_sharded else 1, plan.streaming(expert)
    sent = bytes_sent(
        step_shape(config, checkpoint),
        degrees,
        dtype_bytes=DTYPE_BYTES[str(config.runtime.dtype)],
        guided=task.guided,
        device=place.device,
        streamed_blocks=0 if streaming is None else streaming.blocks - streaming.resident_blocks,
        gather_bytes=(shards - 1) * weights.sharded if weights is not None else 0,
        reshard_after_forward=config.parallelism.fsdp.reshard_after_forward,
    )
    crosses = crosses_nodes(degrees, place.ranks_per_node, fsdp_shards=shards)
    forwards = forwards_per_step(degrees, guided=task.guided)
    step = predicted_step(step_flops(config, checkpoint, degrees), forwards, sent, crosses, rates)
    step["transfer"] = streaming.exposed_s() if streaming is not None else 0.0
    step["total"] += step["transfer"]
    return sent, step


def _bytes_read(work: Work, plan: Plan, name: str) -> int:
    """By the first rank."""
    weights = work.weights[name]
    if weights is None:
        return 0
    return weights.sharded_file_bytes if plan.how(name) == FSDP else weights.file_bytes


def shown_placement(plan: Plan) -> str:
    """`transformer fsdp, text_encoder component`: what is not resident."""
    rest = [f"{p.component} {p.how}" for p in plan.placements if p.how in (COMPONENT, FSDP, LAYERWISE)]
    return ", ".join(rest) or "all resident"
