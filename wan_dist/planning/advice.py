"""What to try where memory ran out although a plan said it would do: the next rung down, as overrides to paste."""

from wan_dist.config.schema import Config
from wan_dist.planning.degrees import degrees_of, fsdp_division
from wan_dist.planning.footprint import COMPONENT, DECODE, DENOISE, ENCODE_TEXT, FSDP, LAYERWISE, RESIDENT
from wan_dist.planning.placement import Plan
from wan_dist.planning.room import table

# The phases of the run record -> those of the plan.
_PLANNED = {"encode": ENCODE_TEXT, "load": DENOISE, "denoise": DENOISE, "decode": DECODE, "write": DECODE}


def out_of_memory_note(plan: Plan, config: Config, phase: str, rank: int, measured: int | None) -> str:
    """The plan's numbers beside what was measured (the peak so far, bytes), and what to try. phase: the record's name
    of the one that failed, on that rank."""
    planned = plan.footprint.device.get(_PLANNED.get(phase, ""), plan.footprint.peak_device)
    had = "" if measured is None else f", {measured / 1e9:.3g} GB were taken at the peak until then"
    lines = [
        f"out of memory in phase {phase}: the plan said {planned / 1e9:.3g} GB on a rank{had}",
        table(plan.footprint),
    ]
    return "\n".join([*lines, "try, in order: " + "; ".join(next_to_try(plan, config, phase, rank))])


def planned_note(plan: Plan, config: Config) -> str:
    """The plan's numbers, and for each phase what to try where they prove wrong in a way that no rank lives to tell."""
    lines = [f"planned:\n{table(plan.footprint)}"]
    for phase in ("encode", "denoise", "decode"):
        if _PLANNED[phase] in plan.footprint.device:
            lines.append(f"if memory runs out in phase {phase}, try: {'; '.join(next_to_try(plan, config, phase, 0))}")
    return "\n".join(lines)


def next_to_try(plan: Plan, config: Config, phase: str, rank: int) -> list[str]:
    """Overrides that take less on that rank, the least costly first, then what changes the request."""
    tries: list[str] = []
    if rank > 0 and plan.how("text_encoder") != FSDP:
        pass  # it is the first rank's
    elif plan.how("text_encoder") == RESIDENT:
        tries.append("offload.text_encoder=component")
    elif plan.how("text_encoder") == COMPONENT and phase == "encode":
        tries.append("offload.text_encoder=layerwise")
    transformer = plan.how("transformer") or plan.how("transformer_2")
    if config.parallelism.fsdp.enabled == "on":
        transformer = None  # its weights are ordered elsewhere
    if phase in ("decode", "write"):
        ranks = config.runtime.ranks or 1
        tries += ["offload.transformer=component"] if transformer == RESIDENT and not plan.experts_leave else []
        tries += ["parallelism.vae=on"] if config.parallelism.vae == "off" and ranks > 1 else []
        tries += ["runtime.vae_dtype=bfloat16"] if config.runtime.vae_dtype == "float32" else []
    elif transformer in (RESIDENT, COMPONENT):
        _, shards = fsdp_division(config.parallelism.fsdp, degrees_of(config.parallelism))
        tries += ["parallelism.fsdp.enabled=on"] if shards > 1 and config.offload.transformer == "auto" else []
        tries += ["offload.transformer=layerwise"]
    elif transformer == FSDP:
        tries += ["offload.transformer=layerwise"]
    elif transformer == LAYERWISE:
        streaming = plan.streaming("transformer") or plan.streaming("transformer_2")
        tries += ["offload.resident_blocks=0"] if streaming and streaming.resident_blocks else []
        tries += ["offload.prefetch=1"] if streaming and streaming.prefetch > 1 else []
    if plan.how("vae") == RESIDENT and phase not in ("decode", "write"):
        tries.append("offload.vae=component")
    return [*tries, "more ranks (parallelism.ulysses, parallelism.ring)", "a smaller video (video.height, video.width)"]
