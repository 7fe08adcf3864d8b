"""Where each component lived, and why: the `plan` of the run record."""

from wan_dist.pipeline.run import Run, wants_pixels


def plan_rows(run: Run, experts: list[str], others: list[str], share_text_encoder: bool) -> list[dict[str, str]]:
    """One row of component, placement and reason for each component that is loaded on any rank, in loading order."""
    why = "every rank holds all of its weights, but for what tensor parallelism divides"
    if run.config.parallelism.fsdp.enabled == "on":
        why += "; FSDP is on, but one rank is all that it could divide a replica over"
    transformer = ("resident", why)
    text_encoder = ("component", "on rank 0 while it encodes the prompt, freed before the transformer is loaded")
    if run.sharding is not None:
        ranks = run.sharding.fsdp.shard.size
        transformer = ("fsdp", f"parallelism.fsdp.enabled=on: its rows are divided over {ranks} ranks")
        if share_text_encoder:
            text_encoder = ("fsdp", f"it does not fit one device: divided over {ranks} ranks, freed after encoding")
    placements = {
        "text_encoder": text_encoder,
        "image_encoder": ("component", "on rank 0 while it encodes the images, freed before the transformer is loaded"),
        "vae": _vae(run),
    }
    before = [name for name in ("text_encoder", "image_encoder") if name in others]
    rows = [(name, *placements.get(name, transformer)) for name in [*before, *experts, *({"vae"} & set(others))]]
    return [{"component": name, "placement": placement, "reason": reason} for name, placement, reason in rows]


def _vae(run: Run) -> tuple[str, str]:
    working = min(run.vae_mesh["vae"].size, run.latent_shape[3])
    where = "on rank 0" if working == 1 else f"on {working} ranks, each with its rows of the {run.latent_shape[3]}"
    if run.config.image is None or run.config.task != "generate":
        return "component", f"{where}, loaded when the latents are there"
    if not wants_pixels(run):
        return "component", f"{where} while it encodes the images, freed before the transformer is loaded"
    return "resident", f"{where}; it encodes the images, and its decoder stays for the latents"
