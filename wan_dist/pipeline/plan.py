"""The plan that all ranks share: made from what the rank with the least room has, before a weight is read."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wan_dist.config.schema import Config
from wan_dist.distributed.collectives import gather_objects
from wan_dist.distributed.mesh import AXES, Mesh
from wan_dist.loading.checkpoint import Checkpoint
from wan_dist.loading.tensor_files import CheckpointError
from wan_dist.loading.weights import on_every_rank
from wan_dist.log import logger
from wan_dist.offload.host_blocks import machine_identity
from wan_dist.output.identity import differences, run_identity
from wan_dist.output.memory import host_to_device_rate
from wan_dist.output.names import PLAN_FILE, run_folder
from wan_dist.output.record import RankReport
from wan_dist.planning.advice import planned_note
from wan_dist.planning.footprint import Machine
from wan_dist.planning.patience import phase_seconds, stall_limits
from wan_dist.planning.placement import Plan
from wan_dist.planning.rates import rates_of
from wan_dist.planning.room import place_or_refuse
from wan_dist.planning.traffic import crossing_warning
from wan_dist.planning.workload import Sizes, Task, work_of
from wan_dist.topology import free_host_memory


def agreed_plan(config: Config, checkpoint: Checkpoint, task: Task, mesh: Mesh, report: RankReport) -> Plan:
    """Rank 0's plan, which every rank makes for itself; the watchdog's patience goes by it. Raises RefusedError, on all
    of them, where nothing that is allowed fits, CheckpointError where one of them made another plan."""
    device = report.device
    machine = common_machine(mesh, device, rates_of(config.plan, device.type).host)
    degrees = {axis: getattr(config.parallelism, axis) for axis in AXES}
    sizes = Sizes(checkpoint, task)  # the headers are read once
    work_for = partial(
        work_of,
        checkpoint=checkpoint,
        task=task,
        degrees=degrees,
        device=device.type,
        local_ranks=machine.local_ranks,
        threads=max(gather_objects(mesh.world, torch.get_num_threads())),
        sizes=sizes,
    )
    plan = on_every_rank(mesh.world, partial(place_or_refuse, config, work_for, machine))
    if device.type == "cuda" and config.plan.host_gb_s is None and any(p.streaming for p in plan.placements):
        measured = min(gather_objects(mesh.world, host_to_device_rate(device)))
        plan = place_or_refuse(config, work_for, replace(machine, host_bytes_per_s=measured))
    request = run_identity(replace(config, image=None, last_image=None), "")  # pictures are the first rank's to read
    _check_agreement(mesh, (degrees, plan.digest(), request), checkpoint)
    expected = phase_seconds(
        config, checkpoint, task, machine, degrees=degrees, work=work_for(config), plan=plan, sizes=sizes
    )
    report.pulse.allow(stall_limits(config.runtime.stall_timeout_s, seconds=expected))
    for placement in plan.placements:
        logger.info("plan: %s %s: %s", placement.component, placement.how, placement.reason)
    if mesh.world.rank == 0:
        crossing = crossing_warning(degrees, machine.local_ranks)
        _tell(plan, config, [*plan.warnings, *([crossing] if crossing else [])])
    return plan


def _check_agreement(mesh: Mesh, mine: tuple[dict[str, int], str, dict[str, Any]], checkpoint: Checkpoint) -> None:
    """Raises CheckpointError on every rank where one has another request, mesh or plan than rank 0."""
    everyone = gather_objects(mesh.world, mine)
    for rank, (degrees, digest, request) in enumerate(everyone):
        if found := differences(everyone[0][2], request):
            raise CheckpointError(f"rank {rank} was told another request than rank 0: there {', '.join(found)}")
        if degrees != everyone[0][0]:
            raise CheckpointError(f"rank {rank} was told the mesh {degrees}, rank 0 {everyone[0][0]}: give the degrees")
        if digest != everyone[0][1]:
            why = "the files of the two nodes differ in size"
            raise CheckpointError(f"{checkpoint.path}: rank {rank} plans otherwise than rank 0: {why}")


def _tell(plan: Plan, config: Config, warnings: Sequence[str]) -> None:
    """Warnings to the terminal; what is planned into the run's folder, for whoever finds a rank killed."""
    for warning in warnings:
        logger.warning("%s", warning)
        print(f"wan-dist: {warning}", file=sys.stderr, flush=True)
    file = run_folder(Path(str(config.output.dir)), config.output.name) / PLAN_FILE
    try:
        file.write_text(planned_note(plan, config) + "\n")
    except OSError as error:
        logger.warning("%s: %s", file, error)


def common_machine(mesh: Mesh, device: torch.device, host_bytes_per_s: float) -> Machine:
    """What every rank can count on: the least that is free on a device and in a node's host memory, the most ranks that
    share a node. host_bytes_per_s: of the link to a GPU, as stated."""
    on_gpu = device.type == "cuda"
    here = (machine_identity(), torch.cuda.mem_get_info(device)[0] if on_gpu else None, free_host_memory())
    nodes, on_device, on_host = zip(*gather_objects(mesh.world, here), strict=True)
    return Machine(
        device=device.type,
        device_bytes=_least(on_device),
        host_bytes=_least(on_host),
        local_ranks=max(nodes.count(node) for node in nodes),
        host_bytes_per_s=host_bytes_per_s if on_gpu else None,
    )


def plan_rows(plan: Plan) -> list[dict[str, str]]:
    """Where each component lived, and why: the `plan` of the run record, in the order of loading."""
    return [{"component": p.component, "placement": p.how, "reason": p.reason} for p in plan.placements]


def _least(values: tuple[Any, ...]) -> Any:
    return min((value for value in values if value is not None), default=None)
