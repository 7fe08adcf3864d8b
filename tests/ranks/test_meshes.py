"""Between meshes: the same video on one rank and on many, for lengths and head counts that do not divide."""

import pytest
import torch

from support.ranks import generate

ONE = {"parallelism.cfg": 1, "parallelism.ulysses": 1}


def mesh(cfg: int = 1, ulysses: int = 1) -> dict[str, int]:
    return {"parallelism.cfg": cfg, "parallelism.ulysses": ulysses}


def test_cfg_parallel_is_bitwise_serial(tmp_path, tiny):
    one = generate(tmp_path, tiny, **ONE)["latents"]
    assert torch.equal(generate(tmp_path, tiny, **mesh(cfg=2))["latents"], one)


# (height, width, frames): 18 tokens; 105; 1 and 2 (fewer tokens than ranks); 6 (one or two a rank)
SIZES = [(32, 48, 9), (80, 112, 9), (16, 16, 1), (16, 32, 1), (32, 48, 1)]


@pytest.mark.parametrize("heads", [3, 5])
@pytest.mark.parametrize("size", SIZES)
def test_ulysses_of_any_length_and_head_count(tmp_path, checkpoints, heads, size):
    path = checkpoints(heads=heads)
    request = dict(zip(("video.height", "video.width", "video.num_frames"), size, strict=True))
    one = generate(tmp_path, path, **ONE, **request)["latents"]
    for degree in (2, 3, 4):
        if degree <= heads:
            many = generate(tmp_path, path, **mesh(ulysses=degree), **request)["latents"]
            assert (many - one).abs().max() <= 1e-5, degree


def test_a_feed_forward_width_that_fills_no_vector(tmp_path, checkpoints):
    path = checkpoints(heads=7, ffn=100)
    request = {"video.height": 80, "video.width": 144, "video.num_frames": 13, "sampler.steps": 6}
    one = generate(tmp_path, path, **ONE, **request)["latents"]
    assert (generate(tmp_path, path, **mesh(ulysses=3), **request)["latents"] - one).abs().max() <= 1e-6


def test_cfg_times_ulysses_with_two_experts(tmp_path, checkpoints):
    path = checkpoints(heads=3, experts=2, boundary_ratio=0.9, seed=2)
    scales = {"sampler.guidance_scale": 4.0, "sampler.guidance_scale_2": 1.0}
    one = generate(tmp_path, path, **ONE, **scales)["latents"]
    four = generate(tmp_path, path, **mesh(cfg=2, ulysses=2), **scales)["latents"]
    assert (four - one).abs().max() <= 1e-5
    assert torch.equal(generate(tmp_path, path, **mesh(cfg=2), **scales)["latents"], one)


def test_the_seed_alone_decides_the_noise(tmp_path, tiny):
    """One step of Euler from the same noise: another seed must differ, another mesh must not."""
    steps = {"sampler.steps": 1, "sampler.solver": "euler", "sampler.guidance_scale": 1.0}
    first, again, other = (
        generate(tmp_path, tiny, **steps, **degrees, **{"sampler.seed": seed})["latents"]
        for degrees, seed in ((ONE, 5), (mesh(ulysses=2), 5), (ONE, 6))
    )
    assert (first - again).abs().max() <= 1e-5
    assert (first - other).abs().max() > 0.1
