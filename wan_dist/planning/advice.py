"""What to try where memory ran out although a plan said it would do: the next rung down, as overrides to paste."""

from wan_dist.config.schema import Config
from wan_dist.planning.footprint import COMPONENT, DECODE, DENOISE, ENCODE_TEXT, LAYERWISE, RESIDENT
from wan_dist.planning.placement import Plan
from wan_dist.planning.room import table

# The phases of the run record -> those of the plan.
_PLANNED = {"encode": ENCODE_TEXT, "load": DENOISE, "denoise": DENOISE, "decode": DECODE, "write": DECODE}


def out_of_memory_note(plan: Plan, config: Config, phase: str, measured: int | None) -> str:
    """The plan's numbers beside what was measured (the peak so far, bytes), and what to try. phase: the record's name
    of the one that failed."""
    planned = plan.footprint.device.get(_PLANNED.get(phase, ""), plan.footprint.peak_device)
    had = "" if measured is None else f", {measured / 1e9:.3g} GB were taken at the peak until then"
    lines = [
        f"out of memory in phase {phase}: the plan said {planned / 1e9:.3g} GB on a rank{had}",
        table(plan.footprint),
    ]
    return "\n".join([*lines, "try, in order: " + "; ".join(next_to_try(plan, config, phase))])


def planned_note(plan: Plan, config: Config) -> str:
    """The plan's numbers, and what to try where they prove wrong in a way that no rank lives to tell."""
    phase = max(plan.footprint.node, key=lambda name: plan.footprint.node[name], default=DENOISE)
    of_record = next((name for name, planned in _PLANNED.items() if planned == phase and name != "load"), "denoise")
    tries = "; ".join(next_to_try(plan, config, of_record))
    return f"planned:\n{table(plan.footprint)}\nif memory runs out, try, in order: {tries}"


def next_to_try(plan: Plan, config: Config, phase: str) -> list[str]:
    """Overrides that take less, the least costly first, then what changes the request."""
    tries = []
    if plan.how("text_encoder") == RESIDENT:
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
        tries += ["offload.transformer=layerwise"]
    elif transformer == LAYERWISE:
        streaming = plan.streaming("transformer") or plan.streaming("transformer_2")
        tries += ["offload.resident_blocks=0"] if streaming and streaming.resident_blocks else []
        tries += ["offload.prefetch=1"] if streaming and streaming.prefetch > 1 else []
    if plan.how("vae") == RESIDENT and phase not in ("decode", "write"):
        tries.append("offload.vae=component")
    return [*tries, "more ranks (parallelism.ulysses, parallelism.ring)", "a smaller video (video.height, video.width)"]
