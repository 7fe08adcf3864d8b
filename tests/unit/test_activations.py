"""Working memory by arithmetic: equal to what fake tensors count, and to figures computed by hand."""

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from support.tiers import in_all
from wan_dist.bench.live_bytes import PeakLiveBytes
from wan_dist.bench.random_transformer import TransformerShape, random_transformer
from wan_dist.distributed.mesh import AXES, build_mesh
from wan_dist.planning.activations import (
    TransformerSize,
    denoise_bytes,
    image_encoder_bytes,
    process_bytes,
    remembered_bytes,
    text_encoder_bytes,
    vae_decode_bytes,
    vae_encode_bytes,
)
from wan_dist.planning.video_shape import WAN_2_1
from wan_dist.sampling.denoise import guided_prediction
from wan_dist.sampling.schedule import Step

ASSETS = Path(__file__).resolve().parents[2] / "wan_dist" / "assets"
WAN_14B = TransformerSize(width=5120, ffn=13824, blocks=40)
SMALL = TransformerShape(blocks=3, heads=8, head_dim=64, ffn=1536, text_dim=512)


def _forward_bytes(shape: TransformerShape, dtype: torch.dtype, video: tuple[int, int, int], **degrees: int) -> int:
    """The peak of two guided steps of rank 0 on fake tensors: `video` is height, width and frames."""
    world = prod(degrees.values())
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        mesh = build_mesh({**dict.fromkeys(AXES, 1), **degrees}, "cpu")
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model = random_transformer(shape, dtype=dtype, device=torch.device("cpu"), mesh=mesh)
            latents = torch.empty(WAN_2_1.latent_shape(video[2], *video[:2]))
            text = [torch.empty(1, 512, shape.text_dim, dtype=dtype) for _ in range(2)]

            def predict(latents: torch.Tensor, timestep: torch.Tensor, _step: Step, branches: Any) -> Any:
                return [model(latents.to(dtype), timestep, text[branch], return_dict=False)[0] for branch in branches]

            with PeakLiveBytes() as live:
                for index in range(2):
                    step = Step(index, 500.0, "transformer", 5.0, True)
                    guided_prediction(predict, latents, torch.tensor([500]), step, mesh["cfg"])
    finally:
        dist.destroy_process_group()
    return live.peak


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("degrees", "dtype"),
    [
        *(({}, FP32), ({"cfg": 2}, BF16), ({"ring": 2, "ulysses": 2}, FP32), ({"ulysses": 2, "tp": 2}, BF16)),
        *in_all(({}, BF16), ({"cfg": 2}, FP32), ({"ring": 2, "ulysses": 2}, BF16), ({"ulysses": 2, "tp": 2}, FP32)),
        *in_all(*(({axis: 4}, dtype) for axis in ("ulysses", "ring") for dtype in (FP32, BF16))),
        *in_all(({"tp": 2}, FP32), ({"tp": 2}, BF16)),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_denoising_is_what_fake_tensors_count(degrees: dict[str, int], dtype: torch.dtype) -> None:
    video = (480, 832, 33)
    size = TransformerSize(width=512, ffn=SMALL.ffn, blocks=SMALL.blocks)
    split = {axis: degree for axis, degree in degrees.items() if axis != "cfg"}
    branches = 1 if degrees.get("cfg") == 2 else 2
    tokens = WAN_2_1.tokens(video[2], *video[:2])
    predicted = denoise_bytes(size, tokens, dtype_bytes=dtype.itemsize, branches=branches, cpu=True, **split)
    predicted -= 7 * tokens * size.outputs * 4  # what the solver holds: it is not run here
    assert predicted == pytest.approx(_forward_bytes(SMALL, dtype, video, **degrees), rel=0.1)


@pytest.mark.parametrize(
    ("degrees", "video", "counted"),
    [  # `bench=scale`, in GB
        ({"ulysses": 4}, (480, 832, 81), 1.36),
        ({"ulysses": 4}, (720, 1280, 81), 2.74),
        ({"ulysses": 8}, (480, 832, 81), 0.89),
        ({"ulysses": 8}, (720, 1280, 81), 1.77),
        ({"ulysses": 8, "ring": 4}, (480, 832, 81), 0.68),
        ({"ulysses": 8, "ring": 4}, (720, 1280, 81), 1.56),
    ],
)
def test_the_14b_takes_what_the_scaling_benchmark_counts(
    degrees: dict[str, int], video: tuple[int, int, int], counted: float
) -> None:
    tokens = WAN_2_1.tokens(video[2], *video[:2])
    predicted = denoise_bytes(WAN_14B, tokens, dtype_bytes=2, cpu=True, steps=1, **degrees)
    assert predicted / 1e9 == pytest.approx(counted, rel=0.1)


def test_remembered_keys_by_hand() -> None:
    # 40 blocks x 2 x 512 x 5120 in bf16, and the embedding of 512 x 5120
    assert remembered_bytes(WAN_14B, tp=1, dtype_bytes=2, branches=1) == 40 * 2 * 512 * 5120 * 2 + 512 * 5120 * 2
    assert remembered_bytes(WAN_14B, tp=4, dtype_bytes=2, branches=2) == 2 * (40 * 2 * 512 * 1280 * 2 + 512 * 5120 * 2)


def test_denoising_grows_linearly_with_tokens_and_is_shared_out() -> None:
    def peak(tokens: int, **split: int) -> int:
        return denoise_bytes(WAN_14B, tokens, dtype_bytes=2, **split)

    assert peak(40000) - peak(30000) == pytest.approx(peak(30000) - peak(20000), rel=1e-6)
    assert peak(32000) > peak(32000, ulysses=2) > peak(32000, ulysses=4) > peak(32000, ring=4, ulysses=8)
    assert peak(32000, tp=2) <= peak(32000)


def test_two_branches_at_once_have_their_hidden_states_twice() -> None:
    def peak(**how: Any) -> int:
        return denoise_bytes(WAN_14B, 32760, dtype_bytes=2, branches=2, remembered=False, **how)

    assert peak(together=True) - peak() == 32760 * 5120 * 2


def test_text_encoder_is_what_fake_tensors_count() -> None:
    import transformers

    for size in ({"d_model": 64, "d_ff": 128, "num_heads": 4, "d_kv": 16},
                 {"d_model": 512, "d_ff": 1024, "num_heads": 8, "d_kv": 64},
                 {"d_model": 512, "d_ff": 4096, "num_heads": 2, "d_kv": 64}):  # fmt: skip
        config = transformers.UMT5Config(**size, num_layers=2, vocab_size=256, feed_forward_proj="gated-gelu")
        with FakeTensorMode(), torch.no_grad():
            model = transformers.UMT5EncoderModel(config).eval()
            tokens = torch.zeros(1, 512, dtype=torch.long)
            with PeakLiveBytes() as live:
                model(tokens, torch.ones_like(tokens))
        assert text_encoder_bytes(size, dtype_bytes=4, prompts=0) == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("images", [1, 2])
def test_image_encoder_is_what_fake_tensors_count(images: int) -> None:
    import transformers

    size = {"hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 4, "image_size": 224, "patch_size": 14}
    config = transformers.CLIPVisionConfig(**size, num_attention_heads=4)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = transformers.CLIPVisionModel(config).eval()
        with PeakLiveBytes() as live:
            pixels = torch.empty(images, 3, 224, 224)
            model(pixels, output_hidden_states=True)
    assert image_encoder_bytes(size, images=images) == pytest.approx(live.peak, rel=0.1)


RESIDUAL = {"base_dim": 32, "decoder_base_dim": 48, "z_dim": 16, "is_residual": True, "in_channels": 12,
            "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}  # fmt: skip


def _vae_config(name: str) -> dict[str, Any]:
    if name == "residual":
        return RESIDUAL
    return json.loads((ASSETS / name / "vae" / "config.json").read_text()) if name != "wan2.1" else {}


@pytest.mark.parametrize("work", ["decode", "encode"])
@pytest.mark.parametrize("name", ["wan_shapes", "residual", *in_all("tiny", "wan2.1")])
def test_vae_is_what_fake_tensors_count(name: str, work: str) -> None:
    from diffusers import AutoencoderKLWan

    from wan_dist.models.wan_vae import parallelize_vae

    config = _vae_config(name)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = AutoencoderKLWan.from_config(config).eval()
        vae = parallelize_vae(model, build_mesh(dict.fromkeys(AXES, 1), "cpu"))
        stride = model.config.scale_factor_spatial
        with PeakLiveBytes() as live:
            if work == "decode":
                latents = torch.empty(1, 16, 3, 16, 24)
                for _ in vae.decode(latents):
                    pass
            else:
                vae.encode(9, 16 * stride, lambda begin, end: torch.empty(1, 3, 9, end - begin, 24 * stride))
    predict = vae_decode_bytes if work == "decode" else vae_encode_bytes
    predicted = predict(config, frames=3, rows=16, columns=24) / 1.1  # without cuDNN's workspace
    assert predicted == pytest.approx(live.peak, rel=0.1)


def test_vae_rows_are_shared_out() -> None:
    def peak(**how: Any) -> int:
        return vae_decode_bytes({}, frames=21, columns=104, **how)

    assert peak(rows=120) == pytest.approx(2 * peak(rows=60), rel=1e-3)
    assert peak(rows=60, ranks=2) == pytest.approx(peak(rows=60) / 2, rel=0.05)  # and halo rows
    assert peak(rows=60, ranks=7) == pytest.approx(peak(rows=60) * 9 / 60, rel=0.1)  # the first has one row more
    assert peak(rows=60, cpu=True) > peak(rows=60)


def test_a_process_takes_more_where_it_writes_video() -> None:
    assert process_bytes(pixels=480 * 832) - process_bytes() == 230 * 480 * 832
