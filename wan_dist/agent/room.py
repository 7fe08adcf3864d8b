"""Whether a run fits this machine, and which mesh suits it: asked before a rank starts, and by `task=plan`."""

from functools import partial

from wan_dist.config.schema import Config
from wan_dist.loading.checkpoint import Checkpoint
from wan_dist.planning.degrees import AXES, choose_degrees, given_degrees, wanted_ranks
from wan_dist.planning.footprint import Machine
from wan_dist.planning.placement import Orders, order_refusals
from wan_dist.planning.refusal import Refusal, RefusedError
from wan_dist.planning.room import place_or_refuse
from wan_dist.planning.survey import Place, best, survey
from wan_dist.planning.workload import Task, work_of
from wan_dist.topology import free_host_memory, visible_gpus

DEFAULT_CPU_RANKS = 2


def ranks_found(device: str) -> int:
    """How many ranks this machine suggests."""
    return max(visible_gpus(), 1) if device == "cuda" else DEFAULT_CPU_RANKS


def best_mesh(
    config: Config, checkpoint: Checkpoint, usual: dict[str, int], *, guided: bool, ranks: int, local_ranks: int
) -> dict[str, int]:
    """The degrees that `task=plan` would mark, of those that the given ones leave open; the usual ones where nothing is
    open, or nothing fits."""
    task = Task.of_request(config, checkpoint, guided=guided)
    place = Place(ranks, max(1, ranks // local_ranks), config.runtime.device, None, _host_bytes(config))
    found = best(survey(config, checkpoint, task, place), usual)
    return usual if found is None else found.degrees


def contradictions(config: Config, checkpoint: Checkpoint | None) -> list[Refusal]:
    """Orders of placement that contradict each other or the model, as far as it is known."""
    experts = () if checkpoint is None or config.task == "decode" else checkpoint.experts
    shapes = {name: checkpoint.configs[name].get("num_layers", 40) for name in experts} if checkpoint else {}
    return order_refusals(Orders.of(config), blocks=shapes)


def room_refusals(config: Config, checkpoint: Checkpoint, *, guided: bool, local_ranks: int | None) -> list[Refusal]:
    """On a CPU, whose memory is known here, what does not fit; elsewhere the ranks ask their devices before they read
    weights. config: resolved, the mesh chosen."""
    decoding = config.task == "decode"
    task = Task.of_decoding(config) if decoding else Task.of_request(config, checkpoint, guided=guided)
    try:
        _place(config, checkpoint, task, local_ranks)
        return []
    except RefusedError as error:
        refusals = error.refusals
    if len(task.experts) < 2:
        return refusals
    from wan_dist.sampling.solvers import scheduled  # takes torch: only where it may decide

    schedule = scheduled(config.sampler, checkpoint.scheduler)[1]
    try:
        _place(config, checkpoint, Task.of_schedule(config, schedule), local_ranks)
    except RefusedError as error:
        return error.refusals
    return []


def _place(config: Config, checkpoint: Checkpoint, task: Task, local_ranks: int | None) -> None:
    degrees, ranks = {axis: getattr(config.parallelism, axis) for axis in AXES}, config.runtime.ranks
    assert ranks is not None, "chosen before"
    machine = Machine(config.runtime.device, None, _host_bytes(config), local_ranks or ranks)
    work_for = partial(
        work_of,
        checkpoint=checkpoint,
        task=task,
        degrees=degrees,
        device=machine.device,
        local_ranks=machine.local_ranks,
    )
    place_or_refuse(config, work_for, machine)


def _host_bytes(config: Config) -> int | None:
    return free_host_memory() if config.runtime.device == "cpu" else None


def plan_refusals(config: Config, *, guided: bool, heads: list[int]) -> list[Refusal]:
    """Choose the number of ranks to plan for, in place; returns why there can be no mesh of so many."""
    plan, runtime = config.plan, config.runtime
    numbers = [*given_degrees(config.parallelism).values(), plan.ranks, plan.nodes, runtime.ranks]
    if any(number is not None and number < 1 for number in numbers):
        return []  # outside their limits, which is said elsewhere
    ranks = plan.ranks or wanted_ranks(
        config.parallelism, world=None, asked=runtime.ranks, found=ranks_found(runtime.device)
    )
    source = "plan.ranks" if plan.ranks else "the number of ranks"
    _, found = choose_degrees(config.parallelism, ranks, guided=guided, source=source, heads=min(heads, default=0))
    if plan.nodes is not None and ranks % plan.nodes:
        why = f"{ranks} ranks do not divide over it"
        legal = ", ".join(str(nodes) for nodes in range(1, ranks + 1) if ranks % nodes == 0)
        found.append(Refusal("plan.nodes", plan.nodes, why, f"use one of {legal}"))
    runtime.ranks = ranks
    return found


def planned_place(config: Config) -> Place:
    """The machine that `task=plan` plans for: what is stated, else what is found here."""
    plan, device, ranks = config.plan, config.runtime.device, config.runtime.ranks
    assert ranks is not None, "chosen before"
    stated = plan.device_memory_gb is not None
    host_bytes, device_bytes = _bytes(plan.host_memory_gb), _bytes(plan.device_memory_gb)
    if not stated:
        device_bytes = _found_device_bytes(device)
        host_bytes = free_host_memory() if host_bytes is None else host_bytes
    return Place(ranks, plan.nodes or 1, device, device_bytes, host_bytes)


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(1e9 * gigabytes)


def _found_device_bytes(device: str) -> int | None:
    """What is free on the GPU that has the least."""
    if device != "cuda":
        return None
    import torch

    return min(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
