"""Every rule that a configuration must obey before a rank starts. Each function returns all that it finds wrong.

The same functions serve the command line, torchrun's ranks and (later) the planner: they see values, not processes.
"""

import math
from dataclasses import asdict
from typing import Any

from wan_dist.config.schema import (
    BenchConfig,
    Config,
    FsdpConfig,
    LaunchConfig,
    ParallelismConfig,
    SamplerConfig,
    VideoConfig,
    leaves,
)
from wan_dist.distributed.shard_conditions import CONDITIONS
from wan_dist.loading.checkpoint import Checkpoint
from wan_dist.planning.defaults import SOLVERS
from wan_dist.planning.degrees import choose_degrees, given_degrees
from wan_dist.planning.image_input import image_input
from wan_dist.planning.refusal import Refusal
from wan_dist.planning.video_shape import WAN_2_1, ModelShape, nearest_multiples, parse_video

# Keys of the contract whose other values are not built yet, and the values that are. A value here is never ignored.
_AVAILABLE: dict[str, tuple[Any, ...]] = {
    "task": ("generate", "decode", "plan", "bench"),
    "parallelism.dp": (None, 1),
    "runtime.compile": (False,),
    "runtime.profile": (False,),
    "runtime.deterministic": (False,),
}
_ENCODERS = {
    "text_encoder": ("UMT5EncoderModel", "T5EncoderModel"),
    "image_encoder": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
}
_TRANSFORMER_BLOCK = "blocks.0"  # of the one class of transformer that runs; asking the model itself takes torch
_RANKS_ON_ANY_CPU, _RANKS_PER_CORE = 64, 8  # to try a mesh on a laptop; each takes half a gigabyte for its libraries
_SEED_RANGE = (-(2**63), 2**64 - 1)  # what torch.Generator.manual_seed takes
_LONGEST_SUFFIX = len(".latents.safetensors.tmp")


def value_refusals(config: Config) -> list[Refusal]:
    """Values outside a field's choices or limits, and values that are not built yet."""
    found: list[Refusal] = []
    for key, value, rule in leaves(config):
        for item in value if isinstance(value, list) else [value]:
            if item is None:
                continue
            choices, low = rule.get("choices"), rule.get("low")
            if choices and item not in choices:
                found.append(Refusal(key, item, "not one of its values", f"use {', '.join(choices)}"))
            elif low is not None and not _within(item, rule):
                found.append(Refusal(key, item, "outside its limits", f"it must be {_limits(rule)}"))
            elif rule.get("count") and item != "auto" and not _is_count(str(item)):
                found.append(Refusal(key, item, "neither auto nor a whole number of 0 or more", "use auto, 1, 2, ..."))
        if key in _AVAILABLE and value not in _AVAILABLE[key] and all(r.key != key for r in found):
            able = ", ".join("null" if v is None else str(v) for v in _AVAILABLE[key])
            found.append(Refusal(key, value, "not yet available in this version", f"use {able}"))
    return found


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _within(value: float, rule: dict[str, Any]) -> bool:
    above_low = value > rule["low"] if rule["above"] else value >= rule["low"]
    return (
        math.isfinite(value)
        and above_low
        and value <= rule["high"]
        and not (rule["multiple"] and value % rule["multiple"])
    )


def _limits(rule: dict[str, Any]) -> str:
    """`finite`, `at least 1`, `above 0 and at most 1e+06`, `at least 2 and a multiple of 2`."""
    low = [] if rule["low"] == -math.inf else [f"{'above' if rule['above'] else 'at least'} {rule['low']:g}"]
    high = [] if rule["high"] == math.inf else [f"at most {rule['high']:g}"]
    even = [f"a multiple of {rule['multiple']}"] if rule["multiple"] else []
    return " and ".join(low + high + even) or "finite"


def request_refusals(config: Config) -> list[Refusal]:
    """The prompt, the output's name and formats, the seed."""
    found = []
    if config.prompts_file is not None:
        found.append(_prompts_file_refusal(config.prompts_file))
    elif config.prompt is None and config.task == "generate":
        found.append(Refusal("prompt", None, "task=generate needs a prompt", 'give one: prompt="a cat surfing"'))
    if config.task == "decode" and config.latents is None:
        found.append(Refusal("latents", None, "task=decode needs latents", "give the file: latents=FILE"))
    for key in ("prompt", "negative_prompt"):
        text = getattr(config, key)
        if text is not None and not _is_unicode(text):
            found.append(Refusal(key, ascii(text), "not valid UTF-8", "check the terminal's or the script's encoding"))
    name = config.output.name
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        found.append(
            Refusal("output.name", name, "not a file name", "use letters, without '/'; output.dir is the folder")
        )
    elif len(name.encode("utf-8", "surrogateescape")) + _LONGEST_SUFFIX > 255:
        found.append(
            Refusal(
                "output.name",
                name,
                f"{len(name)} characters are too long",
                f"use {255 - _LONGEST_SUFFIX} bytes at most",
            )
        )
    if not config.output.formats:
        found.append(Refusal("output.formats", "[]", "nothing would be written", "use mp4, frames, latents"))
    elif config.output.preview and not {"mp4", "frames"}.intersection(config.output.formats):
        why = "nothing is decoded, so there are no frames to show"
        found.append(Refusal("output.preview", "true", why, "add mp4 or frames to output.formats"))
    seed = config.sampler.seed
    if seed is not None and not _SEED_RANGE[0] <= seed <= _SEED_RANGE[1]:
        found.append(Refusal("sampler.seed", seed, "outside 64 bits", f"use {_SEED_RANGE[0]} to {_SEED_RANGE[1]}"))
    return found


def _prompts_file_refusal(path: str) -> Refusal:
    try:
        with open(path, encoding="utf-8") as stream:  # noqa: PTH123
            prompts = [line for line in stream.read().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        return Refusal("prompts_file", path, f"cannot be read ({error})", "name a text file, a prompt a line")
    if not prompts:
        return Refusal("prompts_file", path, "an empty list of prompts", "write a prompt a line")
    why = f"not yet available in this version (it holds {len(prompts)})"
    return Refusal("prompts_file", path, why, "sweep instead: wan-dist --multirun prompt=\"'first','second'\"")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def checkpoint_refusals(checkpoint: Checkpoint, key: str, name: str) -> list[Refusal]:
    """Checkpoints of a kind that this version does not run. key, name: how the user named it."""
    found = []
    pipeline = checkpoint.index.get("_class_name")
    kinds = {component: cfg.get("_class_name") for component, cfg in checkpoint.configs.items()}
    if pipeline not in ("WanPipeline", "WanImageToVideoPipeline"):
        why = f"its pipeline is {pipeline}"
        found.append(Refusal(key, name, why, "this version runs WanPipeline and WanImageToVideoPipeline"))
    for component in checkpoint.experts:
        if kinds[component] != "WanTransformer3DModel":
            why = f"{component} is a {kinds[component]}"
            found.append(Refusal(key, name, why, "this version runs WanTransformer3DModel"))
    if kinds["vae"] != "AutoencoderKLWan":
        found.append(Refusal(key, name, f"its vae is a {kinds['vae']}", "this version runs AutoencoderKLWan"))
    for component, runs in _ENCODERS.items():
        encoder = checkpoint.class_name(component)
        wanted = component == "text_encoder" or checkpoint.has_image_tokens
        if wanted and encoder not in runs:
            why = f"its {component.replace('_', ' ')} is a {encoder}"
            found.append(Refusal(key, name, why, f"this version runs {' and '.join(runs)}"))
    try:
        takes = {
            image_input(checkpoint.configs[e], checkpoint.configs["vae"], expand_timesteps=checkpoint.expand_timesteps)
            for e in checkpoint.experts
        }
    except ValueError as error:
        return [*found, Refusal(key, name, str(error), "use a Wan2.1 or Wan2.2 checkpoint")]
    if len(takes) > 1:
        found.append(Refusal(key, name, "its two transformers take different images", "use the pair of one model"))
    return found


def video_refusals(video: VideoConfig, shape: ModelShape) -> list[Refusal]:
    """Sizes that the model cannot make; never rounded, the nearest legal ones are named."""
    found = []
    frames = shape.stride_t * shape.patch[0]
    rules = (
        ("height", video.height, shape.multiple_h, 0, shape.patch[1] * shape.stride_s),
        ("width", video.width, shape.multiple_w, 0, shape.patch[2] * shape.stride_s),
        ("num_frames", video.num_frames, frames, (1 - shape.stride_t) % frames, shape.stride_t),
    )
    for name, value, multiple, offset, per_position in rules:
        assert value is not None, "resolved before"
        if value < 1:
            continue  # outside its limits, which is said elsewhere
        if value % multiple != offset % multiple:
            rule = f"not a multiple of {multiple}" + (f" plus {offset}" if offset else "")
            legal = " or ".join(map(str, nearest_multiples(value, multiple, offset)))
            found.append(Refusal(f"video.{name}", value, rule, f"the nearest that fit are {legal}"))
        elif (value - 1) // per_position + 1 > shape.max_positions:
            most = (
                (shape.max_positions - 1) * per_position + 1
                if name == "num_frames"
                else shape.max_positions * per_position
            )
            why = f"more than the model's {shape.max_positions} positions"
            found.append(Refusal(f"video.{name}", value, why, f"use {most} at most"))
    return found


def sampler_refusals(config: Config, sampler: SamplerConfig, checkpoint: Checkpoint) -> list[Refusal]:
    """The solver, and experts against boundary. config: as given; sampler: resolved."""
    found = []
    if sampler.solver is None:
        theirs = checkpoint.scheduler.get("_class_name")
        why = f"the checkpoint's scheduler {theirs} is none of {', '.join(SOLVERS)}"
        found.append(Refusal("sampler.solver", None, why, f"choose one: {', '.join(SOLVERS.values())}"))
    scheduler = checkpoint.scheduler
    noisy = {
        "dpm++": str(scheduler.get("algorithm_type", "")).startswith("sde"),
        "euler": scheduler.get("stochastic_sampling", False),
    }
    if noisy.get(str(sampler.solver)):
        why = "as the checkpoint sets it up, it draws noise at every step, which no seed and no mesh would share"
        found.append(Refusal("sampler.solver", sampler.solver, why, "use another solver"))
    if scheduler.get("use_dynamic_shifting"):
        why = "the checkpoint's scheduler shifts dynamically (use_dynamic_shifting), which Wan pipelines do not feed"
        found.append(Refusal("sampler.solver", sampler.solver, why, "use a checkpoint with a plain flow_shift"))
    if config.sampler.guidance_scale_2 is not None and sampler.boundary_ratio is None:
        why = "this checkpoint has one expert and no boundary_ratio"
        found.append(Refusal("sampler.guidance_scale_2", config.sampler.guidance_scale_2, why, "leave it out"))
    if sampler.boundary_ratio is None and "transformer" not in checkpoint.experts:
        why = "without it every step is the high-noise expert's, which this checkpoint lacks"
        found.append(Refusal("sampler.boundary_ratio", None, why, "give one, e.g. sampler.boundary_ratio=1.1"))
    return found


def mesh_refusals(degrees: dict[str, int], *, heads: int, guided: bool) -> list[Refusal]:
    """Degrees that this model and this request cannot fill. Tokens and ring need not divide anything."""
    found = []
    cfg, ulysses, tp = degrees["cfg"], degrees["ulysses"], degrees["tp"]
    if cfg > 2:
        found.append(Refusal("parallelism.cfg", cfg, "guidance has two branches", "use 1 or 2"))
    elif cfg == 2 and not guided:
        why = "no step is guided (guidance_scale <= 1), so the second half would have nothing to do"
        found.append(Refusal("parallelism.cfg", cfg, why, "use parallelism.cfg=1, or a guidance_scale above 1"))
    if heads % tp:
        why = f"the model's {heads} attention heads do not divide by it ({heads} = {heads // tp} x {tp} + {heads % tp})"
        legal = ", ".join(str(degree) for degree in range(1, heads + 1) if heads % degree == 0)
        found.append(Refusal("parallelism.tp", tp, why, f"use one of {legal}"))
    if ulysses > (heads if heads % tp else heads // tp):
        tp = 1 if heads % tp else tp
        of_tp = f" ({heads} over tp {tp} leaves {heads // tp} a rank)" if tp > 1 else ""
        why = f"more Ulysses ranks than attention heads{of_tp or f': the model has {heads}'}"
        found.append(Refusal("parallelism.ulysses", ulysses, why, f"use 1 to {heads // tp}, and ring for the rest"))
    return found


def fsdp_refusals(fsdp: FsdpConfig, degrees: dict[str, int]) -> list[Refusal]:
    """Shard conditions that do not exist; where FSDP is on, those that match nothing, and replicas that do not divide
    its axis."""
    found = []
    for name in fsdp.shard_conditions:
        if name not in CONDITIONS:
            why, remedy = "no such shard condition", f"use {', '.join(CONDITIONS)}"
            found.append(Refusal("parallelism.fsdp.shard_conditions", name, why, remedy))
    known = [CONDITIONS[name] for name in fsdp.shard_conditions if name in CONDITIONS]
    matching = [name for name, condition in CONDITIONS.items() if condition(_TRANSFORMER_BLOCK, None)]
    if fsdp.enabled == "on" and known and not found and not any(is_unit(_TRANSFORMER_BLOCK, None) for is_unit in known):
        why = f"no module of WanTransformer3DModel matches; its blocks are {_TRANSFORMER_BLOCK} and so on"
        value, remedy = ",".join(fsdp.shard_conditions), f"use {' or '.join(matching)}, or leave it out"
        found.append(Refusal("parallelism.fsdp.shard_conditions", value, why, remedy))
    size = degrees["cfg"] * degrees["ring"] * degrees["ulysses"]
    if fsdp.enabled == "on" and fsdp.replicate >= 1 and size % fsdp.replicate:
        shown = f"cfg {degrees['cfg']} x ring {degrees['ring']} x ulysses {degrees['ulysses']} = {size}"
        why = f"replicas share out the FSDP axis, {shown}, which does not divide by it"
        legal = ", ".join(str(count) for count in range(1, size + 1) if size % count == 0)
        found.append(Refusal("parallelism.fsdp.replicate", fsdp.replicate, why, f"use one of {legal}"))
    return found


def scale_refusals(bench: BenchConfig, parallelism: ParallelismConfig, *, world: int | None) -> list[Refusal]:
    """Of `bench=scale`: worlds that the given degrees do not fill, videos that do not fit. world: torchrun's."""
    found = []
    if world not in (None, 1):
        found.append(Refusal("bench", "scale", f"torchrun started {world} ranks; it takes one", "start it as wan-dist"))
    for ranks in bench.worlds:
        if ranks < 2 or not bench.heads or bench.heads < 1:
            continue  # outside their limits, which is said elsewhere
        degrees, problems = choose_degrees(
            parallelism, ranks, guided=bench.guidance, source="one of bench.worlds", heads=bench.heads
        )
        found += problems or mesh_refusals(degrees, heads=bench.heads, guided=bench.guidance)
        found += fsdp_refusals(parallelism.fsdp, degrees)
    for text in bench.videos:
        try:
            height, width, frames = parse_video(text)
        except ValueError as error:
            found.append(Refusal("bench.videos", text, str(error), "write e.g. 480x832x81"))
            continue
        video = VideoConfig(height=height, width=width, num_frames=frames)
        problems = video_refusals(video, WAN_2_1)
        found += [Refusal("bench.videos", text, f"{r.key}={r.value}: {r.why}", r.remedy) for r in problems]
    for key, values in (("bench.worlds", bench.worlds), ("bench.videos", bench.videos)):
        if not values:
            found.append(Refusal(key, "[]", "nothing would be measured", "leave it out, or name some"))
    return list(dict.fromkeys(found))


def launch_refusals(launch: LaunchConfig, *, world: int | None) -> list[Refusal]:
    """`launch.*` where torchrun has laid the ranks out over nodes already. world: torchrun's."""
    if world is None:
        return []
    usual, given = asdict(LaunchConfig()), asdict(launch)
    why, remedy = "torchrun has started the ranks", "leave it out: torchrun's own options say it"
    return [Refusal(f"launch.{key}", value, why, remedy) for key, value in given.items() if value != usual[key]]


def node_refusals(ranks: int, nodes: int) -> list[Refusal]:
    """Ranks that do not divide over the nodes: each node has as many."""
    if ranks % nodes == 0:
        return []
    why = f"{ranks} ranks do not divide over {nodes} nodes ({ranks} = {nodes} x {ranks // nodes} + {ranks % nodes})"
    below, above = nodes * (ranks // nodes), nodes * (ranks // nodes + 1)
    remedy = f"use degrees whose product is {f'{below} or ' if below else ''}{above}, or another number of nodes"
    return [Refusal("parallelism", ranks, why, remedy)]


def one_rank_refusals(config: Config, *, world: int | None) -> list[Refusal]:
    """Of `bench=offload` and `bench=state`: everything that asks for more than one rank. world: torchrun's."""
    kind, found = config.bench.kind, []
    if world not in (None, 1):
        found.append(Refusal("bench", kind, f"torchrun started {world} ranks; it takes one", "start it as wan-dist"))
    if config.runtime.ranks not in (None, 1):
        found.append(Refusal("runtime.ranks", config.runtime.ranks, f"bench={kind} takes one rank", "leave it out"))
    for axis, degree in given_degrees(config.parallelism).items():
        if degree > 1:
            why = f"bench={kind} takes one rank"
            found.append(Refusal(f"parallelism.{axis}", degree, why, "leave it out, or use 1"))
    return found


def device_refusals(config: Config, *, device: str, gpus: int, local_ranks: int, cores: int = 1) -> list[Refusal]:
    """More ranks than the node can serve, devices that are not there, attention kernels that the device does not have.
    device: resolved."""
    found = []
    if device == "cuda" and gpus == 0:
        found.append(Refusal("runtime.device", "cuda", "no GPU is visible here", "use cpu, or check the driver"))
    elif device == "cuda" and local_ranks > gpus:
        why = f"{local_ranks} ranks on this node, but {gpus} visible GPUs"
        found.append(Refusal("parallelism", local_ranks, why, f"use degrees whose product is {gpus} at most"))
    if device == "cpu" and local_ranks > max(_RANKS_ON_ANY_CPU, _RANKS_PER_CORE * cores):
        why = f"{local_ranks} ranks on this node's {cores} CPU cores would take more memory and time than they save"
        most = max(_RANKS_ON_ANY_CPU, _RANKS_PER_CORE * cores)
        found.append(Refusal("parallelism", local_ranks, why, f"use degrees whose product is {most} at most"))
    if device == "cpu" and config.runtime.attention in ("efficient", "cudnn"):
        found.append(Refusal("runtime.attention", config.runtime.attention, "a GPU kernel", "use auto, flash or math"))
    if device == "cuda" and config.runtime.attention in ("flash", "cudnn") and config.runtime.dtype == "float32":
        why = "this kernel takes bfloat16 only"
        found.append(Refusal("runtime.attention", config.runtime.attention, why, "use runtime.dtype=bfloat16, or auto"))
    return found
