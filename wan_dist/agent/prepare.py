"""From a composed config to a frozen one that ranks can run, or to every reason why not."""

import os
import sys
import tempfile
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from wan_dist.agent.hints import vocabulary_hint
from wan_dist.agent.inputs import image_file_refusals, input_refusals, take_over_model, take_over_request
from wan_dist.agent.resume import resume_refusals
from wan_dist.agent.room import best_mesh, contradictions, plan_refusals, ranks_found, room_refusals
from wan_dist.config import freeze
from wan_dist.config.normalise import normalise_switches
from wan_dist.config.schema import Config
from wan_dist.loading.checkpoint import Checkpoint, header_problems, open_checkpoint, weight_problems
from wan_dist.loading.published import published
from wan_dist.loading.source import Source
from wan_dist.loading.tensor_files import CheckpointError
from wan_dist.output.names import PLAN_FILE, output_paths, run_folder, temporary_path
from wan_dist.planning import refusals as rules
from wan_dist.planning.defaults import resolve, resolve_bench
from wan_dist.planning.degrees import AXES, choose_degrees, given_degrees, wanted_ranks
from wan_dist.planning.image_input import image_refusals
from wan_dist.planning.refusal import Refusal, RefusedError
from wan_dist.planning.video_shape import ModelShape
from wan_dist.sampling.schedule import Step, is_guided
from wan_dist.topology import slurm_step, usable_cores, visible_gpus


@dataclass(frozen=True)
class Invocation:
    """How this run was started, as far as it decides what the config means.

    recipe_named: `model=` was given, so its recipe applies even beside a `model.path`.
    default_dir: the folder for a null `output.dir`.
    world, local_ranks: torchrun's, or None where wan-dist starts the ranks itself, on `nodes` nodes.
    model_known: false where the choice of the model was refused already: what depends on it is then not judged.
    """

    recipe_named: bool
    default_dir: Path
    world: int | None = None
    local_ranks: int | None = None
    model_known: bool = True
    nodes: int = 1


@dataclass(frozen=True)
class Checked:
    """A config that can run: `config` is resolved but for the checkpoint's folder, which `source` can provide."""

    config: Config
    source: Source | None
    ranks: int
    checkpoint: Checkpoint | None = None
    guided: bool = True


def run_id(torchrun_id: str | None = None) -> str:
    """One name for one run: torchrun's id where it was given one, else `WAN_DIST_RUN_ID` (with which a batch script
    gives a requeued job the folder it had), else Slurm's job and step, else the time."""
    if torchrun_id and torchrun_id != "none":
        return torchrun_id
    if given := os.environ.get("WAN_DIST_RUN_ID"):
        return given
    step = slurm_step()
    return datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3] if step is None else f"{step.job}.{step.step}"


def run_dir(config: Config) -> Path:
    """Where a run keeps its frozen config and its ranks' logs."""
    assert config.output.dir is not None, "resolved before"
    return run_folder(Path(config.output.dir), config.output.name)


def check(config: Config, invocation: Invocation) -> Checked:
    """Resolve and check; nothing is written, no weight is read. Raises RefusedError with every reason."""
    config = deepcopy(config)
    normalise_switches(config)
    found = rules.value_refusals(config) + rules.request_refusals(config)
    found += image_file_refusals(config)
    config.output.dir = str(
        Path(config.output.dir if config.output.dir is not None else invocation.default_dir).absolute()
    )
    writes = config.task != "plan"
    found += _output_dir_refusals(Path(config.output.dir), config.output.name) if writes else []
    found += input_refusals(config)
    found += rules.launch_refusals(config.launch, world=invocation.world)

    source, checkpoint, heads, guided = None, None, [], True  # no heads: unknown, and not judged
    unnamed = config.task == "decode" and not _names_model(config, invocation)
    found += take_over_model(config) if unnamed else []
    model_known = invocation.model_known and not (unnamed and config.model.path is None)
    _choose_device(config)
    names_model = (
        config.task != "bench"
        or config.bench.kind == "meaning"
        or (config.bench.kind in ("load", "vae") and _names_model(config, invocation))
    )
    if config.task == "bench":
        resolve_bench(config)
        heads, guided = [count for count in [config.bench.heads or 0] if count > 0], config.bench.guidance
    if names_model and model_known:
        source, checkpoint, problems = _open(config, invocation)
        found += problems
        if checkpoint is not None:
            resolved = resolve(config, checkpoint, recipe_applies=_recipe_applies(config, invocation))
            more, heads, guided = _request_against_checkpoint(config, resolved, checkpoint)
            found += more
            config = resolved
    found += _place(config, invocation, heads, guided, checkpoint if not found else None)
    if config.task != "plan" and config.runtime.ranks is not None and config.runtime.ranks > 0:
        found += rules.node_refusals(config.runtime.ranks, invocation.nodes)
    if config.task in ("generate", "decode", "plan"):
        found += contradictions(config, checkpoint)
    if checkpoint is not None and not found and config.task in ("generate", "decode"):
        ranks = config.runtime.ranks or 1
        local_ranks = invocation.local_ranks or ranks // invocation.nodes
        found += room_refusals(config, checkpoint, guided=guided, local_ranks=local_ranks)
    if found:
        raise RefusedError(found)
    assert config.runtime.ranks is not None, "chosen above"
    return Checked(config, source, config.runtime.ranks, checkpoint, guided)


def freeze_run(checked: Checked, *, node: int = 0) -> Path:
    """Fetch or build the checkpoint, make the run directory, and write the frozen config: returns its path.

    node: each has a file of its own, since a checkpoint may lie elsewhere on another node; the first also removes what
    an earlier run of the name logged there.
    """
    config = deepcopy(checked.config)
    if checked.source is not None:
        try:
            components = _components(config)
            folder = checked.source.complete(components)
            problems = weight_problems(open_checkpoint(folder), components)
        except (CheckpointError, OSError) as error:
            problems = [str(error)]
        if problems:
            raise RefusedError([_model_refusal(checked.source.name, problem) for problem in problems])
        config.model.path = str(folder)
        if node == 0 and (found := resume_refusals(config, open_checkpoint(folder))):  # rank 0 reads the state
            raise RefusedError(found)
        if node == 0 and config.task == "generate" and (hint := vocabulary_hint(config.prompt, folder)):
            print(f"wan-dist: {hint}", file=sys.stderr, flush=True)
    directory = run_dir(config)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        old = [*directory.glob("rank*.log"), *directory.glob("failure.rank*.json"), directory / PLAN_FILE]
        for stale in old if node == 0 else []:
            stale.unlink(missing_ok=True)
        frozen = directory / ("config.yaml" if node == 0 else f"config.node{node}.yaml")
        scratch = frozen.with_name(frozen.name + ".tmp")
        scratch.write_text(freeze.to_yaml(config), encoding="utf-8")
        scratch.replace(frozen)
    except OSError as error:
        raise RefusedError([_output_refusal(Path(str(config.output.dir)), error)]) from error
    return frozen


def _recipe_applies(config: Config, invocation: Invocation) -> bool:
    return config.model.path is None or invocation.recipe_named


def _names_model(config: Config, invocation: Invocation) -> bool:
    return config.model.path is not None or invocation.recipe_named


def _open(config: Config, invocation: Invocation) -> tuple[Source, Checkpoint | None, list[Refusal]]:
    source = Source(config.model.path if config.model.path is not None else config.model.recipe.path or "")
    if not _recipe_applies(config, invocation):
        config.model.name = None
    try:
        checkpoint = _known(source) if config.task == "plan" else open_checkpoint(source.configs())
        here = Path(source.name).is_dir() and not source.name.startswith("built:")
        problems = weight_problems(checkpoint, _components(config)) if here else []
        if here and config.task == "plan" and not problems:  # a run says so when it reads them
            problems = header_problems(checkpoint)
        found = [_model_refusal(source.name, problem) for problem in problems]
        found += rules.checkpoint_refusals(checkpoint, "model.path", source.name)
        for expert in checkpoint.experts:
            ModelShape.from_configs(checkpoint.configs[expert], checkpoint.configs["vae"])
    except (CheckpointError, ValueError) as error:
        return source, None, [_model_refusal(source.name, str(error))]
    return source, None if found else checkpoint, found


def _known(source: Source) -> Checkpoint:
    """The checkpoint's configs: those that are here, else what is known of a published one, else the hub's."""
    known = published(source.name)
    try:
        return open_checkpoint(source.configs(ask_hub=known is None))
    except CheckpointError:
        if known is None:
            raise
        return known


def _model_refusal(name: str, problem: str) -> Refusal:
    remedy = "give the folder of a checkpoint in diffusers format with safetensors weights, or a hub id"
    return Refusal("model.path", name, problem.removeprefix(f"{name}: "), remedy)


def _request_against_checkpoint(
    given: Config, resolved: Config, checkpoint: Checkpoint
) -> tuple[list[Refusal], list[int], bool]:
    """Refusals of the video, the images and the sampler, the experts' numbers of heads, and whether any step is
    guided. Where latents are only decoded, heads and guidance decide nothing."""
    shape = ModelShape.from_configs(checkpoint.transformer_config, checkpoint.configs["vae"])
    if given.task == "decode":
        return take_over_request(given, resolved, shape), [], True
    found = rules.video_refusals(resolved.video, shape)
    if given.task in ("generate", "plan") or given.bench.kind == "meaning":
        known = {other.key for other in found}
        wrong = [r for r in image_refusals(resolved, checkpoint) if r.key not in known]
        found += [r for r in wrong if given.task != "plan" or r.value is not None]  # a plan needs no picture
    found += rules.sampler_refusals(given, resolved.sampler, checkpoint)
    heads = sorted(
        {ModelShape.from_configs(checkpoint.configs[e], checkpoint.configs["vae"]).heads for e in checkpoint.experts}
    )
    steps = _steps_if_they_matter(resolved, checkpoint) if not found else None
    sampler = resolved.sampler
    if steps is None:
        first, second = float(sampler.guidance_scale or 0), float(sampler.guidance_scale_2 or 0)
        two = given.task == "plan" and len(checkpoint.experts) > 1
        return found, heads, is_guided(first, first) or (two and is_guided(second, first))
    for expert in sorted({step.expert for step in steps} - set(checkpoint.experts)):
        why = f"steps fall to {expert}, which this checkpoint lacks"
        found.append(Refusal("sampler.boundary_ratio", sampler.boundary_ratio, why, f"it has {checkpoint.experts}"))
    return found, heads, any(step.guided for step in steps)


def _steps_if_they_matter(config: Config, checkpoint: Checkpoint) -> list[Step] | None:
    """The schedule, where which expert does which step decides something; it takes torch, so not otherwise."""
    sampler = config.sampler
    one_expert = len(checkpoint.experts) < 2
    first, second = float(sampler.guidance_scale or 0), float(sampler.guidance_scale_2 or 0)
    scales_differ = is_guided(first, first) != is_guided(second, first)
    if config.task == "plan":  # which takes no torch: whatever may be guided is
        return None
    if sampler.boundary_ratio is None or not (one_expert or scales_differ) or not sampler.steps or sampler.steps < 1:
        return None
    from wan_dist.sampling.solvers import scheduled

    return scheduled(config.sampler, checkpoint.scheduler)[1]


def _choose_device(config: Config) -> None:
    """Device and dtype, in place. `bench=scale` computes on none, and plans for GPUs."""
    runtime, plans_for_gpus = config.runtime, config.task == "bench" and config.bench.kind == "scale"
    if plans_for_gpus:
        runtime.device = "cpu"
    elif config.task == "plan" and config.plan.device_memory_gb is not None and runtime.device == "auto":
        runtime.device = "cuda"
    if runtime.device not in ("cpu", "cuda"):
        runtime.device = "cuda" if visible_gpus() else "cpu"
    runtime.dtype = runtime.dtype or ("bfloat16" if runtime.device == "cuda" or plans_for_gpus else "float32")


def _place(
    config: Config, invocation: Invocation, heads: list[int], guided: bool, checkpoint: Checkpoint | None
) -> list[Refusal]:
    """Choose the mesh (of a plan and of benchmarks of one rank: the number of ranks), in place; returns what does not
    fit. heads: of each expert, as far as known. checkpoint: of a request that can run, so far."""
    bench = config.bench.kind if config.task == "bench" else None
    if config.task == "plan":
        return plan_refusals(
            config,
            guided=guided,
            heads=heads,
            world=invocation.world,
            local_ranks=invocation.local_ranks,
            nodes=invocation.nodes,
        )
    if bench == "scale":
        config.runtime.ranks = 1  # the worlds are not run
        return rules.scale_refusals(config.bench, config.parallelism, world=invocation.world)
    one_rank = bench in ("offload", "state")
    several = rules.one_rank_refusals(config, world=invocation.world) if one_rank else []
    config.runtime.ranks = 1 if one_rank else config.runtime.ranks
    return several or _mesh(config, invocation, heads, guided, checkpoint)


def _mesh(
    config: Config, invocation: Invocation, heads: list[int], guided: bool, checkpoint: Checkpoint | None
) -> list[Refusal]:
    """The degrees, device and VAE of a run whose ranks hold a mesh between them."""
    runtime, parallelism, world = config.runtime, config.parallelism, invocation.world
    numbers = [*given_degrees(parallelism).values(), *([runtime.ranks] if runtime.ranks is not None else [])]
    if min(numbers, default=1) < 1:
        return []  # outside their limits, which is said elsewhere
    gpus = visible_gpus() if runtime.device == "cuda" else 0
    found_here = invocation.nodes * ranks_found(runtime.device)
    ranks = wanted_ranks(parallelism, world=world, asked=runtime.ranks, found=found_here)
    local_ranks = invocation.local_ranks or max(1, ranks // invocation.nodes)
    source = "torchrun's world" if world else "runtime.ranks" if runtime.ranks else "the number of ranks"
    degrees, found = choose_degrees(
        parallelism, ranks, guided=guided, source=source, heads=min(heads, default=0), ranks_per_node=local_ranks
    )
    if world and runtime.ranks not in (None, world):
        found.append(
            Refusal("runtime.ranks", runtime.ranks, f"torchrun started {world}", "leave it out under torchrun")
        )
    found += [r for count in heads for r in rules.mesh_refusals(degrees, heads=count, guided=guided) if r not in found]
    found += rules.fsdp_refusals(parallelism.fsdp, degrees)
    found += rules.device_refusals(
        config, device=runtime.device, gpus=gpus, local_ranks=local_ranks, cores=usable_cores()
    )
    if checkpoint is not None and not found and config.task == "generate":
        degrees = best_mesh(config, checkpoint, degrees, guided=guided, ranks=ranks, local_ranks=local_ranks)
    runtime.ranks = ranks
    if parallelism.vae == "auto":
        parallelism.vae = "on" if ranks > 1 else "off"
    for axis in AXES:
        setattr(parallelism, axis, degrees[axis])
    return found


def _components(config: Config) -> tuple[str, ...] | None:
    """The components whose weights a task reads; None is all."""
    vae_alone = config.task == "decode" or (config.task == "bench" and config.bench.kind == "vae")
    return ("vae",) if vae_alone else None


def _output_dir_refusals(directory: Path, name: str) -> list[Refusal]:
    """Try the nearest folder that exists: a file that vanishes is written there, and nothing stays behind."""
    nearest = directory
    try:
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        if not nearest.is_dir():
            raise NotADirectoryError(f"{nearest} is not a folder")
        with tempfile.TemporaryFile(dir=nearest):
            pass
        paths = output_paths(directory, name)
        folders = [path for path in (*paths, *map(temporary_path, paths)) if path.is_dir()]
    except OSError as error:
        return [_output_refusal(directory, error)]
    return [
        Refusal("output.name", name, f"{path} is a folder", "move it, or use another output.name") for path in folders
    ]


def _output_refusal(directory: Path, error: OSError) -> Refusal:
    why = error.strerror or str(error)
    return Refusal("output.dir", directory, f"cannot be written ({why})", "name a folder of yours: output.dir=DIR")
