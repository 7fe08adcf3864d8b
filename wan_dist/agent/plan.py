"""`task=plan`: what would run, on which mesh, at what cost: one JSON object on stdout, one table on stderr."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from wan_dist.agent.room import planned_place
from wan_dist.config.schema import Config
from wan_dist.loading.checkpoint import Checkpoint
from wan_dist.loading.published import file_dtypes
from wan_dist.planning.degrees import AXES, choose_degrees
from wan_dist.planning.rates import rates_of
from wan_dist.planning.refusal import RefusedError
from wan_dist.planning.room import counted
from wan_dist.planning.survey import Candidate, Place, best, shown_placement, survey
from wan_dist.planning.workload import Sizes, Task, step_shape


def show_plan(config: Config, checkpoint: Checkpoint, name: str, *, guided: bool) -> None:
    """Print the plan of a resolved config. name: of the checkpoint. Raises RefusedError, once all is printed, where no
    mesh can run it."""
    task = Task.of_request(config, checkpoint, guided=guided)
    place, on_disk = planned_place(config), file_dtypes(name)
    candidates = survey(config, checkpoint, task, place, on_disk=on_disk)
    heads = checkpoint.transformer_config.get("num_attention_heads", 40)
    usual, _ = choose_degrees(
        config.parallelism,
        place.ranks,
        guided=guided,
        source="plan.ranks",
        heads=heads,
        ranks_per_node=place.ranks_per_node,
    )
    chosen = best(candidates, usual)
    document = {
        "task": "plan",
        "model": name,
        "request": _request(config, checkpoint, task),
        "machine": {**asdict(place), "rates": asdict(rates_of(config.plan, place.device))},
        "components": _components(config, checkpoint, task, on_disk),
        "meshes": [_mesh(candidate, candidate is chosen) for candidate in candidates],
        "best": None if chosen is None else {**chosen.degrees, "overrides": overrides(chosen)},
    }
    print(json.dumps(document), flush=True)
    print(text(config, place, candidates, chosen), file=sys.stderr, flush=True)
    if chosen is None:  # the table names them all; in full, that of the mesh that would be tried first
        first = next((c for c in candidates if c.degrees == usual), candidates[0])
        raise RefusedError(list(first.refusals))


def overrides(candidate: Candidate) -> str:
    """What to type to get this mesh, beside `model=` and the request."""
    return " ".join(f"parallelism.{axis}={degree}" for axis, degree in candidate.degrees.items() if axis != "dp")


def _request(config: Config, checkpoint: Checkpoint, task: Task) -> dict[str, Any]:
    video = config.video
    return {
        "video": f"{video.height}x{video.width}x{video.num_frames}",
        "tokens": step_shape(config, checkpoint).tokens,
        "steps": task.steps,
        "guided": task.guided,
        "dtype": config.runtime.dtype,
    }


def _components(
    config: Config, checkpoint: Checkpoint, task: Task, on_disk: Mapping[str, str]
) -> dict[str, dict[str, int | None]]:
    """Bytes of each component, whole: in the serving dtype and in its files."""
    sizes = Sizes(checkpoint, task, on_disk)
    found = {}
    for name in sorted(checkpoint.configs):
        weights = sizes.of(config, name)
        served, files = (None, None) if weights is None else (weights.total, weights.file_bytes)
        found[name] = {"served_bytes": served, "file_bytes": files}
    return found


def _mesh(candidate: Candidate, is_best: bool) -> dict[str, Any]:
    """One mesh of the document."""
    line: dict[str, Any] = {"mesh": candidate.degrees, "possible": candidate.cost is not None, "best": is_best}
    if candidate.plan is None or candidate.cost is None:
        return {**line, "refused": [str(refusal) for refusal in candidate.refusals]}
    plan, cost = candidate.plan, candidate.cost
    return {
        **line,
        "plan": [
            {
                "component": p.component,
                "placement": p.how,
                "reason": p.reason,
                "on_device": [p.first, p.last],
                **({} if p.streaming is None else {"streaming": {**asdict(p.streaming), "hidden": p.streaming.hidden}}),
            }
            for p in plan.placements
        ],
        "device_bytes": plan.footprint.device,
        "rank_host_bytes": plan.footprint.rank,
        "node_host_bytes": plan.footprint.node,
        "peak_device_bytes": plan.footprint.peak_device,
        "peak_rank_host_bytes": plan.footprint.peak_rank,
        "peak_node_host_bytes": plan.footprint.peak_node,
        "warnings": list(plan.warnings),
        "step_s": cost.step,
        "communication_share": cost.communication,
        "transfer_share": cost.transfer,
        "bytes_sent_per_step": cost.sent,
        "decode_s": cost.decode_s,
        "bytes_read_per_rank": cost.bytes_read,
        "load_s": cost.load_s,
        "video_s": cost.video_s,
    }


def text(config: Config, place: Place, candidates: list[Candidate], chosen: Candidate | None) -> str:
    """The table, with what decided it above and what was refused below."""
    where = f"{counted(place.ranks, 'rank')} on {counted(place.nodes, 'node')}, {place.device}"
    where += "" if place.device_bytes is None else f", {place.device_bytes / 1e9:g} GB a device"
    where += "" if place.host_bytes is None else f", {place.host_bytes / 1e9:.3g} GB of host memory a node"
    video = f"{config.video.height}x{config.video.width}x{config.video.num_frames}"
    head = ["", "mesh", "placement", "GB a rank", "host GB a node", "s/step", "sending", "copying", "load s", "video s"]
    rows = [head, ["---"] * len(head)]
    possible = [c for c in candidates if c.cost is not None]
    for candidate in sorted(possible, key=lambda c: c.cost.video_s if c.cost is not None else 0.0):
        assert candidate.plan is not None and candidate.cost is not None
        plan, cost = candidate.plan, candidate.cost
        rows.append(
            [
                "best" if candidate is chosen else "",
                shown_mesh(candidate),
                shown_placement(plan),
                f"{plan.footprint.peak_device / 1e9:.3g}",
                f"{plan.footprint.peak_node / 1e9:.3g}",
                f"{cost.step_s:.3g}",
                f"{100 * cost.communication:.0f} %",
                f"{100 * cost.transfer:.0f} %",
                f"{cost.load_s:.3g}",
                f"{cost.video_s:.4g}",
            ]
        )
    what = f"{video}, {config.sampler.steps} steps, {config.runtime.dtype}"
    lines = [f"{what}; {where}; seconds are predicted, not measured"]
    lines += ["| " + " | ".join(row) + " |" for row in rows] if possible else []
    if chosen is not None and chosen.plan is not None:
        lines += ["", f"best: {overrides(chosen)}"]
        lines += [f"  {p.component}: {p.how}: {p.reason}" for p in chosen.plan.placements]
        lines += [f"  warning: {warning}" for warning in chosen.plan.warnings]
    for candidate in candidates:
        lines += [f"refused: {shown_mesh(candidate)}: {str(r).splitlines()[0]}" for r in candidate.refusals]
    return "\n".join(lines)


def shown_mesh(candidate: Candidate) -> str:
    named = [f"{axis} {candidate.degrees[axis]}" for axis in AXES if candidate.degrees[axis] > 1]
    return " x ".join(named) or "one rank"
