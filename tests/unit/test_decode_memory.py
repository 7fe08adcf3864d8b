"""What decoding holds does not grow with the number of frames: they are handed on as they come."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from wan_dist.bench.live_bytes import PeakLiveBytes
from wan_dist.distributed.mesh import AXES, build_mesh
from wan_dist.models.random_weights import randomise
from wan_dist.models.wan_latents import decode_frames
from wan_dist.models.wan_vae import parallelize_vae

ROWS, COLUMNS, PIXELS = 6, 8, 6 * 8 * 64


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1).eval().requires_grad_(False)
    randomise(vae, 0)
    return vae


def peak(vae: AutoencoderKLWan, latent_frames: int) -> int:
    parallel = parallelize_vae(vae, build_mesh(dict.fromkeys(AXES, 1), "cpu"))
    latents = torch.randn(1, 16, latent_frames, ROWS, COLUMNS)
    with torch.no_grad(), PeakLiveBytes() as memory:
        shapes = [frames.shape for frames in decode_frames(parallel, latents)]
    assert [shape[0] for shape in shapes] == [1] + [4] * (latent_frames - 1)
    return memory.peak


def test_the_peak_is_that_of_one_latent_frame(vae):
    per_latent_frame = 3 * 16 * ROWS * COLUMNS * 4  # the latents themselves, de-normalised and after the first 1x1x1
    grown = peak(vae, 12) - peak(vae, 4)
    assert grown <= 8 * per_latent_frame < 8 * 4 * PIXELS  # the second: what 8-bit frames of one channel would take
