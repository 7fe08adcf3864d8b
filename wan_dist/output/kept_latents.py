"""What to type when a run fails after its latents were written: the decoding alone."""

import shlex
from pathlib import Path

from wan_dist.config import freeze
from wan_dist.config.schema import Config
from wan_dist.output.names import output_path


def how_to_decode(frozen: Path) -> str | None:
    """A sentence with the command that makes the video of the latents that this run left; None where it left none.

    frozen: the run's config file; latents older than it are not this run's.
    """
    try:
        config = freeze.load(frozen)
    except OSError:  # the folder was removed under the run
        return None
    if config.task != "generate":
        return None
    output, pixels = config.output, [kind for kind in config.output.formats if kind != "latents"]
    latents = output_path(Path(str(output.dir)), output.name, "latents")
    try:
        ours = latents.stat().st_mtime >= frozen.stat().st_mtime
    except OSError:
        return None
    return decode_command(config, latents) if ours and pixels else None


def decode_command(config: Config, latents: Path) -> str:
    """The same of latents in that file. config: frozen."""
    output, pixels = config.output, [kind for kind in config.output.formats if kind != "latents"]
    words = [
        "task=decode",
        f"latents={latents}",
        f"output.dir={output.dir}",
        f"output.name={output.name}",
        f"output.formats=[{','.join(pixels)}]",
        f"runtime.ranks={config.runtime.ranks}",
    ]
    usual = Config()
    for key, value, default in (
        ("runtime.vae_dtype", config.runtime.vae_dtype, usual.runtime.vae_dtype),
        ("runtime.vae_channels_last", config.runtime.vae_channels_last, usual.runtime.vae_channels_last),
        ("runtime.timeout_s", config.runtime.timeout_s, usual.runtime.timeout_s),
        ("parallelism.vae", config.parallelism.vae, "off" if config.runtime.ranks == 1 else "on"),
    ):
        words += [f"{key}={value}"] if value != default else []
    return "the latents are kept; to decode them alone: " + shlex.join(["wan-dist", *words])
