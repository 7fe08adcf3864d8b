"""Between meshes: the same video on one rank and on many, for lengths, head counts and widths that do not divide, and
the same bits whether FSDP shards the weights or not."""

from math import prod

import pytest
import torch
from safetensors.torch import load_file

from support.ranks import frozen, generate, generate_all, run_generation, run_ranks
from support.tiers import in_all
from wan_dist.layers.rows import pad_rows
from wan_dist.models import wan_attention, wan_transformer

FOUR_HEADS = {"heads": 4}
SIX_HEADS = {"heads": 6, "ffn": 100, "seed": 1}
FOUR_HEADS_TWO_EXPERTS = {"heads": 4, "experts": 2, "boundary_ratio": 0.9, "seed": 2}
SIX_HEADS_TWO_EXPERTS = {"heads": 6, "ffn": 100, "experts": 2, "boundary_ratio": 0.9, "seed": 3}
SCALES = {"sampler.guidance_scale": 4.0, "sampler.guidance_scale_2": 1.0}

OFF: dict = {}
ON = {"enabled": "on"}
TWO_REPLICAS = {"enabled": "on", "replicate": 2}
KEPT_GATHERED = {"enabled": "on", "reshard_after_forward": False}


def mesh(**degrees: int) -> dict[str, int]:
    return {f"parallelism.{axis}": degree for axis, degree in {"cfg": 1, "ulysses": 1, **degrees}.items()}


def size(height: int, width: int, frames: int) -> dict[str, int]:
    return {"video.height": height, "video.width": width, "video.num_frames": frames}


TOKENS_1, TOKENS_2, TOKENS_6 = size(16, 16, 1), size(16, 32, 1), size(32, 48, 1)
TOKENS_18, TOKENS_105 = size(32, 48, 9), size(80, 112, 9)

# degrees, checkpoint, request, and how FSDP is told to shard beside not at all
CASES: list[tuple[dict[str, int], dict, dict, list[dict]]] = [
    ({"tp": 2}, FOUR_HEADS, TOKENS_105, [ON]),
    ({"ring": 2}, FOUR_HEADS_TWO_EXPERTS, TOKENS_105, [KEPT_GATHERED, *in_all(ON)]),
    ({"cfg": 2}, SIX_HEADS_TWO_EXPERTS, TOKENS_18, [ON, *in_all(KEPT_GATHERED)]),
    ({"ring": 3}, FOUR_HEADS, TOKENS_1, [*in_all(ON)]),
    ({"ring": 3}, FOUR_HEADS_TWO_EXPERTS, TOKENS_105, [ON]),
    ({"tp": 3}, SIX_HEADS, TOKENS_105, [*in_all(ON)]),
    ({"tp": 4}, FOUR_HEADS_TWO_EXPERTS, TOKENS_105, [*in_all(ON)]),
    ({"ring": 2, "ulysses": 2}, SIX_HEADS_TWO_EXPERTS, TOKENS_105, [TWO_REPLICAS, *in_all(ON, KEPT_GATHERED)]),
    ({"tp": 2, "ulysses": 2}, SIX_HEADS, TOKENS_105, [ON]),  # three heads a rank of tp, for two Ulysses ranks
    ({"tp": 2, "ring": 2}, FOUR_HEADS, TOKENS_1, [*in_all(ON)]),
    ({"tp": 3, "ulysses": 2}, SIX_HEADS_TWO_EXPERTS, TOKENS_18, [*in_all(ON)]),
    ({"cfg": 2, "ulysses": 2, "tp": 2}, SIX_HEADS_TWO_EXPERTS, TOKENS_18, [ON]),
    *in_all(
        ({"tp": 2}, SIX_HEADS_TWO_EXPERTS, TOKENS_18, [ON]),
        ({"ring": 2}, SIX_HEADS, TOKENS_105, [ON]),
        ({"ring": 3}, SIX_HEADS, TOKENS_2, [ON]),
        ({"ring": 4}, FOUR_HEADS, TOKENS_105, [ON]),
        ({"tp": 2, "ulysses": 2}, FOUR_HEADS_TWO_EXPERTS, TOKENS_105, [ON]),
        ({"cfg": 2, "ring": 2}, FOUR_HEADS_TWO_EXPERTS, TOKENS_105, [ON, TWO_REPLICAS]),
        ({"tp": 6}, SIX_HEADS, TOKENS_105, [ON]),
        ({"cfg": 2, "ulysses": 2, "tp": 2}, FOUR_HEADS, TOKENS_105, [ON, TWO_REPLICAS]),
    ),
]


def limit(degrees: dict[str, int]) -> float:
    """How far the latents may be from one rank's: nothing but the order of sums differs."""
    if degrees.get("tp", 1) > 1:
        return 5e-5
    return 2e-5 if degrees.get("ring", 1) > 1 else 1e-5


def request_of(case: tuple) -> dict:
    _, model, request, _ = case
    return {**request, **(SCALES if "experts" in model else {})}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, checkpoints):
    """The latents of one rank for each of `CASES`, by number: many cases share them."""
    runs = [(checkpoints(**case[1]), {**mesh(), **request_of(case)}) for case in CASES]
    different = [run for number, run in enumerate(runs) if run not in runs[:number]]
    latents = [run["latents"] for run in generate_all(tmp_path_factory.mktemp("one_rank"), different)]
    return [latents[different.index(run)] for run in runs]


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
def test_every_mesh_gives_the_video_of_one_rank(tmp_path, checkpoints, one_rank, ranks):
    numbers = [number for number, case in enumerate(CASES) if prod(case[0].values()) == ranks]
    runs = []
    for number in numbers:
        degrees, model, _, shardings = CASES[number]
        for fsdp in [OFF, *shardings]:
            sharding = {f"parallelism.fsdp.{key}": value for key, value in fsdp.items()}
            runs.append((checkpoints(**model), {**mesh(**degrees), **request_of(CASES[number]), **sharding}))
    latents = iter([run["latents"] for run in generate_all(tmp_path, runs)])
    wrong = []
    for number in numbers:
        degrees, model, request, shardings = CASES[number]
        many = next(latents)
        distance = (many - one_rank[number]).abs().max().item()
        if not distance <= limit(degrees):
            wrong.append(f"{degrees}, {model}, {request}: {distance} from one rank")
        for fsdp in shardings:
            if not torch.equal(next(latents), many):
                wrong.append(f"{degrees}, {model}, {request}, {fsdp}: other bits than without FSDP")
    assert not wrong, "\n".join(wrong)


def test_in_bfloat16_no_further_from_fp32_than_one_rank_is(tmp_path, checkpoints):
    bf16, sharded = {"runtime.dtype": "bfloat16"}, {"parallelism.fsdp.enabled": "on"}
    many = {**mesh(tp=2, ring=2), **bf16}
    requests = [mesh(), {**mesh(), **bf16}, many, {**many, **sharded}]
    runs = generate_all(tmp_path, [(checkpoints(**SIX_HEADS), {**TOKENS_105, **request}) for request in requests])
    exact, *rounded = (run["latents"] for run in runs)
    one, four, four_sharded = ((latents - exact).square().mean().sqrt() for latents in rounded)
    assert four <= 1.5 * one
    assert torch.equal(rounded[1], rounded[2]), four_sharded


def generate_with_loud_padding(env, config) -> dict[str, str]:
    """A generation whose padding rows are 1e4 instead of 0."""

    def pad(x_BL: torch.Tensor, rows: int) -> torch.Tensor:
        padded = pad_rows(x_BL, rows)
        padded[:, x_BL.shape[1] :] = 1e4
        return padded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wan_attention, "pad_rows", pad)
        patch.setattr(wan_transformer, "pad_rows", pad)
        return run_generation(env, config)


def test_nobody_sees_the_padding(tmp_path, checkpoints):
    """Of the tokens of a rank that has one, two or none."""
    request = {**mesh(ring=2, tp=2), **TOKENS_1, "parallelism.fsdp.enabled": "on"}
    zeros = generate(tmp_path, checkpoints(**FOUR_HEADS), **request)["latents"]
    config = frozen(tmp_path, checkpoints(**FOUR_HEADS), **request, **{"output.name": "loud"})
    loud = run_ranks(4, generate_with_loud_padding, config)[0]["latents"]
    assert torch.equal(load_file(loud)["latents"], zeros)


@pytest.mark.parametrize("heads", [3, 5])
def test_ulysses_of_any_length_and_head_count(tmp_path, checkpoints, heads):
    path = checkpoints(heads=heads)
    sizes = [TOKENS_2, TOKENS_105, *in_all(TOKENS_1, TOKENS_6, TOKENS_18)]
    degrees = [1, *in_all(2), 3, *in_all(*([4] if heads == 5 else []))]
    grid = [(request, degree) for request in sizes for degree in degrees]
    runs = generate_all(tmp_path, [(path, {**mesh(ulysses=degree), **request}) for request, degree in grid])
    for number, (request, degree) in enumerate(grid):
        one = runs[number - number % len(degrees)]["latents"]
        assert (runs[number]["latents"] - one).abs().max() <= 1e-5, (request, degree)


def test_a_feed_forward_width_that_fills_no_vector(tmp_path, checkpoints):
    path = checkpoints(heads=7, ffn=100)
    request = {**size(80, 144, 13), "sampler.steps": 6}
    one = generate(tmp_path, path, **mesh(), **request)["latents"]
    assert (generate(tmp_path, path, **mesh(ulysses=3), **request)["latents"] - one).abs().max() <= 1e-6


def test_cfg_parallel_is_bitwise_serial(tmp_path, tiny, checkpoints):
    two_experts = checkpoints(**FOUR_HEADS_TWO_EXPERTS)
    runs = [(tiny, {}), (tiny, mesh(cfg=2)), (two_experts, SCALES), (two_experts, {**mesh(cfg=2), **SCALES})]
    one, two, one_of_two, two_of_two = (run["latents"] for run in generate_all(tmp_path, runs))
    assert torch.equal(two, one)
    assert torch.equal(two_of_two, one_of_two)


def test_the_seed_alone_decides_the_noise(tmp_path, tiny):
    """One step of Euler from the same noise: another seed must differ, another mesh must not."""
    steps = {"sampler.steps": 1, "sampler.solver": "euler", "sampler.guidance_scale": 1.0}
    meshes = ((mesh(), 5), (mesh(ulysses=2), 5), (mesh(), 6))
    runs = [(tiny, {**steps, **degrees, "sampler.seed": seed}) for degrees, seed in meshes]
    first, again, other = (run["latents"] for run in generate_all(tmp_path, runs))
    assert (first - again).abs().max() <= 1e-5
    assert (first - other).abs().max() > 0.1
