"""On one rank the taught transformer is diffusers' own; keys and values of a prompt (and its image) are made once."""

import weakref
from collections import Counter

import pytest
import torch
from diffusers import WanTransformer3DModel

from wan_dist.distributed.mesh import AXES, build_mesh
from wan_dist.layers.attention_kernels import attention_kernel
from wan_dist.models.random_weights import randomise
from wan_dist.models.wan_transformer import parallelize_wan_transformer

CONFIG = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "ffn_dim": 64, "text_dim": 32}


def transformer() -> WanTransformer3DModel:
    model = WanTransformer3DModel(**CONFIG)
    randomise(model, 3)
    return model.eval().requires_grad_(False)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def taught():
    model = transformer()
    forget = parallelize_wan_transformer(model, build_mesh(dict.fromkeys(AXES, 1), "cpu"), attention_kernel("auto"))
    calls: Counter[str] = Counter()
    for name in ("to_q", "to_k", "to_v"):
        for n, block in enumerate(model.blocks):
            block.attn2.get_submodule(name).register_forward_hook(lambda *_, key=f"{n}.{name}": calls.update([key]))
    return model, forget, calls


@torch.no_grad()
def forward(model, text, seed: int = 0, timestep: int = 500, shape=(1, 16, 2, 6, 10)) -> torch.Tensor:
    return model(noise(*shape, seed=seed), torch.tensor([timestep]), text, return_dict=False)[0]


@pytest.mark.parametrize("shape", [(1, 16, 2, 6, 10), (1, 16, 1, 2, 2), (1, 16, 3, 4, 6)])
def test_one_rank_equals_diffusers(taught, shape):
    text = noise(1, 512, 32, seed=9)
    assert (forward(taught[0], text, shape=shape) - forward(transformer(), text, shape=shape)).abs().max() <= 1e-5


def test_keys_and_values_of_a_prompt_are_computed_once_for_all_steps(taught):
    model, _, calls = taught
    text = noise(1, 512, 32, seed=9)
    for step in range(3):
        forward(model, text, seed=step, timestep=900 - step)
    assert calls == {f"{n}.{name}": times for n in range(2) for name, times in (("to_q", 3), ("to_k", 1), ("to_v", 1))}


def test_another_prompt_is_computed_and_both_stay(taught):
    model, _, calls = taught
    texts = [noise(1, 512, 32, seed=seed) for seed in (1, 2)]
    first, second = (forward(model, text) for text in texts)
    assert (first - second).abs().max() > 1e-3
    assert calls["0.to_k"] == calls["1.to_v"] == 2
    assert torch.equal(forward(model, texts[0]), first)
    assert torch.equal(forward(model, texts[1]), second)
    assert calls["0.to_k"] == calls["1.to_v"] == 2


def test_a_prompt_changed_in_place_is_not_served_from_memory(taught):
    model, _, calls = taught
    text = noise(1, 512, 32, seed=1)
    forward(model, text)
    text.copy_(noise(1, 512, 32, seed=2))
    assert torch.equal(forward(model, text), forward(model, noise(1, 512, 32, seed=2)))
    assert calls["0.to_k"] == 3


def test_forgotten_text_is_computed_again(taught):
    model, forget, calls = taught
    text = noise(1, 512, 32, seed=9)
    first = forward(model, text)
    forget()
    assert torch.equal(forward(model, text), first)
    assert calls["0.to_k"] == calls["1.to_k"] == 2


def test_another_video_size_gets_its_own_rotary_table(taught):
    model = taught[0]
    text, plain = noise(1, 512, 32, seed=9), transformer()
    for shape in ((1, 16, 2, 6, 10), (1, 16, 2, 10, 6), (1, 16, 2, 6, 10)):
        assert (forward(model, text, shape=shape) - forward(plain, text, shape=shape)).abs().max() <= 1e-5


IMAGES = {**CONFIG, "in_channels": 36, "image_dim": 40, "added_kv_proj_dim": 48}


@torch.no_grad()
def test_each_prompt_with_each_image_has_keys_of_its_own_until_they_are_forgotten():
    plain, taught = (WanTransformer3DModel(**IMAGES).eval().requires_grad_(False) for _ in range(2))
    for model in (plain, taught):
        randomise(model, 3)
    forget = parallelize_wan_transformer(taught, build_mesh(dict.fromkeys(AXES, 1), "cpu"), attention_kernel("auto"))
    made: list[weakref.ref] = []
    taught.condition_embedder.register_forward_hook(lambda _module, _args, output: made.append(weakref.ref(output[2])))
    texts, images = [noise(1, 512, 32, seed=n) for n in (1, 2)], [noise(1, 5, 40, seed=n) for n in (3, 4)]
    latents, timestep = noise(1, 36, 2, 6, 10), torch.tensor([500])
    for text, image in [(text, image) for _ in range(2) for text in texts for image in images]:
        ours, theirs = (
            model(latents, timestep, text, encoder_hidden_states_image=image, return_dict=False)[0]
            for model in (taught, plain)
        )
        assert (ours - theirs).abs().max() <= 1e-5
    assert len({id(joined()) for joined in made}) == 4
    forget()
    assert [joined() for joined in made] == [None] * 8
