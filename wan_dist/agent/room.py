"""Whether a run fits this machine, and which mesh suits it: asked before a rank starts, and by `task=plan`."""

from functools import partial

from wan_dist.config.schema import Config
from wan_dist.loading.checkpoint import Checkpoint
from wan_dist.loading.published import file_dtypes
from wan_dist.planning.degrees import AXES, choose_degrees, given_degrees, wanted_ranks
from wan_dist.planning.footprint import Machine
from wan_dist.planning.placement import Orders, order_refusals
from wan_dist.planning.refusal import Refusal, RefusedError
from wan_dist.planning.refusals import device_refusals
from wan_dist.planning.room import place_or_refuse
from wan_dist.planning.survey import Place, best, survey
from wan_dist.planning.workload import Task, work_of
from wan_dist.topology import free_host_memory, threads_per_rank, usable_cores, visible_gpus

DEFAULT_CPU_RANKS = 2
MOST_RANKS = 4096  # the limit of `plan.ranks`


def ranks_found(device: str) -> int:
    """How many ranks this machine suggests."""
    return max(visible_gpus(), 1) if device == "cuda" else DEFAULT_CPU_RANKS


def best_mesh(
    config: Config, checkpoint: Checkpoint, usual: dict[str, int], *, guided: bool, ranks: int, local_ranks: int
) -> dict[str, int]:
    """The degrees that `task=plan` would mark, of those that the given ones leave open; the usual ones where nothing is
    open, nothing fits, or there are several nodes."""
    if local_ranks < ranks:
        return usual  # other nodes, with other memory, are asked the same: they must come to the same answer
    task, device = Task.of_request(config, checkpoint, guided=guided), config.runtime.device
    place = Place(ranks, 1, device, _found_device_bytes(device), free_host_memory())
    on_disk = file_dtypes(config.model.path or config.model.recipe.path or "")
    found = best(survey(config, checkpoint, task, place, on_disk=on_disk), usual)
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
        threads=threads_per_rank(machine.local_ranks),
    )
    place_or_refuse(config, work_for, machine)


def _host_bytes(config: Config) -> int | None:
    return free_host_memory() if config.runtime.device == "cpu" else None


def plan_refusals(
    config: Config, *, guided: bool, heads: list[int], world: int | None, local_ranks: int | None, nodes: int = 1
) -> list[Refusal]:
    """Choose the number of ranks and nodes to plan for, in place; returns why there can be no such mesh, and what the
    device could not run. world, local_ranks: torchrun's; nodes: those that wan-dist was started on."""
    plan, runtime, stated = config.plan, config.runtime, config.plan.device_memory_gb is not None
    numbers = [*given_degrees(config.parallelism).values(), plan.ranks, plan.nodes, runtime.ranks]
    if any(number is not None and not 1 <= number <= MOST_RANKS for number in numbers):
        return []  # outside their limits, which is said elsewhere
    ranks = plan.ranks or wanted_ranks(
        config.parallelism, world=world, asked=runtime.ranks, found=nodes * ranks_found(runtime.device)
    )
    source = "plan.ranks" if plan.ranks else "torchrun's world" if world else "the number of ranks"
    _, found = choose_degrees(config.parallelism, ranks, guided=guided, source=source, heads=min(heads, default=0))
    if stated and runtime.device == "cpu":
        why = "it plans for CUDA, and runtime.device=cpu is ordered"
        found.append(Refusal("plan.device_memory_gb", plan.device_memory_gb, why, "leave one of the two out"))
    if plan.ranks and runtime.ranks not in (None, plan.ranks):
        found.append(Refusal("runtime.ranks", runtime.ranks, f"plan.ranks is {plan.ranks}", "give one of the two"))
    if plan.nodes is None and world and local_ranks and not plan.ranks:
        plan.nodes = max(1, world // local_ranks)
    if plan.nodes is None and nodes > 1 and not plan.ranks:
        plan.nodes = nodes
    if plan.nodes is not None and ranks % plan.nodes:
        why = f"{ranks} ranks do not divide over it"
        legal = ", ".join(str(nodes) for nodes in range(1, ranks + 1) if ranks % nodes == 0)
        found.append(Refusal("plan.nodes", plan.nodes, why, f"use one of {legal}"))
    local = max(1, ranks // (plan.nodes or 1))
    gpus = local if stated else visible_gpus() if runtime.device == "cuda" else 0
    found += device_refusals(config, device=runtime.device, gpus=gpus, local_ranks=local, cores=usable_cores())
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
    """What the smallest GPU here has in all: asking what is free would take memory on each."""
    if device != "cuda" or visible_gpus() == 0:
        return None
    import torch

    return min(torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count()))
