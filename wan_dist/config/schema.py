"""The typed shape of a configuration: one dataclass per config group, no torch.

Hydra checks names and types against these classes; `choices` and `limits` below are checked together with
everything else that can be wrong with a run, so that the user reads all of it at once. `None` means "not said": see
`wan_dist.planning.defaults` for what is taken instead.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any


def one_of(default: Any, *values: str) -> Any:
    """A string field that takes one of `values` (or None, where that is its default)."""
    return field(default=default, metadata={"choices": values})


def limits(low: float, high: float = float("inf"), *, above: bool = False, multiple: int = 0) -> dict[str, Any]:
    """Metadata of a number (or of each in a list) that must be finite, `>= low` (`> low` where `above`), `<= high`, and
    a multiple where one is given."""
    return {"low": low, "high": high, "above": above, "multiple": multiple}


def at_least(default: Any, low: float, high: float = float("inf"), *, above: bool = False, multiple: int = 0) -> Any:
    """A number within `limits`."""
    return field(default=default, metadata=limits(low, high, above=above, multiple=multiple))


def finite(default: Any = None) -> Any:
    """A number that must be neither infinite nor NaN."""
    return at_least(default, float("-inf"))


@dataclass(kw_only=True)
class RecipeConfig:
    """What a named model brings along: where its checkpoint is and the settings its authors recommend."""

    path: str | None = None  # a hub id, `asset:NAME` (carried in the package) or `built:NAME` (made on first use)
    steps: int | None = at_least(None, 1)
    guidance_scale: float | None = finite()
    guidance_scale_2: float | None = finite()
    flow_shift: float | None = at_least(None, 0, above=True)
    height: int | None = at_least(None, 1)
    width: int | None = at_least(None, 1)
    num_frames: int | None = at_least(None, 1)
    fps: float | None = at_least(None, 0.1, 1000)  # what H.264 players and time bases bear


@dataclass(kw_only=True)
class ModelConfig:
    """Which checkpoint; `path` wins over the recipe's."""

    name: str | None = None
    path: str | None = None
    recipe: RecipeConfig = field(default_factory=RecipeConfig)


@dataclass(kw_only=True)
class SamplerConfig:
    steps: int | None = at_least(None, 1)
    guidance_scale: float | None = finite()
    guidance_scale_2: float | None = finite()
    flow_shift: float | None = at_least(None, 0, above=True)
    solver: str | None = one_of(None, "unipc", "euler", "dpm++")
    seed: int | None = None
    boundary_ratio: float | None = finite()


@dataclass(kw_only=True)
class VideoConfig:
    height: int | None = at_least(None, 1)
    width: int | None = at_least(None, 1)
    num_frames: int | None = at_least(None, 1)
    fps: float | None = at_least(None, 0.1, 1000)  # what H.264 players and time bases bear


@dataclass(kw_only=True)
class FsdpConfig:
    enabled: str = one_of("auto", "auto", "on", "off")
    replicate: int = at_least(1, 1)
    shard_conditions: list[str] = field(default_factory=list)
    reshard_after_forward: bool = True


@dataclass(kw_only=True)
class ParallelismConfig:
    """Degrees of the mesh; their product is the number of ranks."""

    dp: int | None = at_least(None, 1)
    cfg: int | None = at_least(None, 1)
    ring: int | None = at_least(None, 1)
    ulysses: int | None = at_least(None, 1)
    tp: int | None = at_least(None, 1)
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    vae: str = one_of("auto", "auto", "on", "off")


@dataclass(kw_only=True)
class OffloadConfig:
    mode: str = one_of("auto", "auto", "speed", "memory", "manual")
    transformer: str = one_of("auto", "auto", "resident", "component", "layerwise")
    text_encoder: str = one_of("auto", "auto", "resident", "component", "layerwise")
    image_encoder: str = one_of("auto", "auto", "resident", "component", "layerwise")
    vae: str = one_of("auto", "auto", "resident", "component", "layerwise")
    prefetch: str = field(default="auto", metadata={"count": True})
    resident_blocks: str = field(default="auto", metadata={"count": True})


@dataclass(kw_only=True)
class OutputConfig:
    dir: str | None = None
    name: str = "video"
    formats: list[str] = field(default_factory=lambda: ["mp4"], metadata={"choices": ("mp4", "frames", "latents")})
    checkpoint_every: int = at_least(0, 0)
    resume: str = one_of("off", "auto", "off")
    keep_latents: bool = True
    preview: bool = False


@dataclass(kw_only=True)
class RuntimeConfig:
    device: str = one_of("auto", "auto", "cpu", "cuda")
    dtype: str | None = one_of(None, "bfloat16", "float32")
    vae_dtype: str = one_of("float32", "float32", "bfloat16")
    vae_channels_last: str = one_of("auto", "auto", "on", "off")
    ranks: int | None = at_least(None, 1)
    timeout_s: float = at_least(600.0, 0, 1e6, above=True)
    stall_timeout_s: float | None = at_least(None, 1, 1e6)  # ranks report twice a second
    compile: bool = False
    attention: str = one_of("auto", "auto", "flash", "efficient", "cudnn", "math")
    profile: bool = False
    deterministic: bool = False


@dataclass(kw_only=True)
class LaunchConfig:
    """Several nodes without Slurm."""

    nodes: int = at_least(1, 1)
    node_rank: int | None = at_least(None, 0)
    head: str | None = None
    port: int | None = at_least(None, 1, 65535)


@dataclass(kw_only=True)
class PlanConfig:
    """The machine that `task=plan` plans for."""

    ranks: int | None = at_least(None, 1, 4096)
    nodes: int | None = at_least(None, 1, 4096)
    device_memory_gb: float | None = at_least(None, 0, 1e6, above=True)
    host_memory_gb: float | None = at_least(None, 0, 1e6, above=True)
    matmul_tflops: float | None = at_least(None, 0, above=True)
    attention_tflops: float | None = at_least(None, 0, above=True)
    node_gb_s: float | None = at_least(None, 0, above=True)
    network_gb_s: float | None = at_least(None, 0, above=True)
    host_gb_s: float | None = at_least(None, 0, above=True)
    disk_gb_s: float | None = at_least(None, 0, above=True)


@dataclass(kw_only=True)
class BenchConfig:
    """`task=bench`: the shape of the random transformer, how often it is timed, and the worlds it is scaled to. Null is
    a default of the kind and device: see `wan_dist.planning.defaults`."""

    kind: str = one_of("step", "step", "load", "scale", "vae", "offload", "state", "meaning")
    blocks: int | None = at_least(None, 1)
    heads: int | None = at_least(None, 1)
    head_dim: int | None = at_least(None, 8, multiple=2)
    ffn: int | None = at_least(None, 1)
    text_dim: int | None = at_least(None, 1)
    frames: int | None = at_least(None, 1)  # latent frames
    rows: int | None = at_least(None, 2, multiple=2)  # latent rows
    columns: int | None = at_least(None, 2, multiple=2)  # latent columns; tokens = frames * rows/2 * columns/2
    guidance: bool = True
    repeats: int = at_least(3, 1)
    scenes: int = at_least(60, 1)
    worlds: list[int] = field(default_factory=lambda: [8, 16, 64, 256, 512], metadata=limits(2, 4096))
    videos: list[str] = field(default_factory=lambda: ["480x832x81", "720x1280x81"])
    ranks_per_node: int = at_least(8, 1)
    matmul_tflops: float = at_least(790.0, 0, above=True)
    attention_tflops: float = at_least(648.0, 0, above=True)
    node_gb_s: float = at_least(450.0, 0, above=True)
    network_gb_s: float = at_least(50.0, 0, above=True)


@dataclass(kw_only=True)
class Config:
    """Everything a run is told."""

    task: str = one_of("generate", "generate", "decode", "plan", "verify", "bench")
    prompt: str | None = None
    negative_prompt: str | None = None
    image: str | None = None
    last_image: str | None = None
    prompts_file: str | None = None
    latents: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


# Keys whose text is taken exactly as the program receives it, whatever Hydra's grammar would make of it.
FREE_TEXT = (
    "prompt",
    "negative_prompt",
    "image",
    "last_image",
    "prompts_file",
    "latents",
    "model.path",
    "output.dir",
    "output.name",
)

# Config groups and the dataclass of each; `experiment` composes over all of them.
GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "sampler": SamplerConfig,
    "video": VideoConfig,
    "parallelism": ParallelismConfig,
    "offload": OffloadConfig,
    "output": OutputConfig,
    "runtime": RuntimeConfig,
    "bench": BenchConfig,
    "launch": LaunchConfig,
    "plan": PlanConfig,
}


def leaves(node: Any, prefix: str = "") -> list[tuple[str, Any, dict[str, Any]]]:
    """`(dotted key, value, field metadata)` of every leaf of a config dataclass (or of a class: its defaults)."""
    found: list[tuple[str, Any, dict[str, Any]]] = []
    for f in fields(node):
        value, key = getattr(node, f.name), prefix + f.name
        if is_dataclass(value):
            found += leaves(value, key + ".")
        else:
            found.append((key, value, dict(f.metadata)))
    return found
