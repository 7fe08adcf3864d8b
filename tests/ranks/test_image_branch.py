"""Transformers that also attend to an image, in batches of two: divided by heads, by tokens and by rows, their forward
is diffusers' own."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from support.ranks import run_cases
from support.sharded import image_branch, load, match, mesh_of, save_transformer

FRAME_AND_LAST_FRAME = 2 * 257
MODELS = {
    "image": image_branch(4),
    "two images": {**image_branch(4), "pos_embed_seq_len": FRAME_AND_LAST_FRAME},
    "six heads": {**image_branch(6), "ffn_dim": 100},
}
CASES = [
    ("image", {"tp": 2}, False),
    ("image", {"ring": 2}, True),
    ("six heads", {"tp": 3}, False),
    ("image", {"tp": 4}, False),
    ("image", {"tp": 2, "ulysses": 2}, False),
    ("image", {"tp": 2, "ulysses": 2}, True),
    ("two images", {"tp": 2, "ulysses": 2}, True),
    ("six heads", {"tp": 2, "ring": 2}, True),
]


def inputs(model: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = 2 if model == "two images" else 1
    return {
        "hidden_states": torch.randn(2, 36, 3, 10, 14, generator=generator),  # 105 tokens
        "timestep": torch.tensor([999.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 512, 32, generator=generator),
        "encoder_hidden_states_image": torch.randn(2 * images, 257, 40, generator=generator),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image-transformers")
    return {name: save_transformer(folder / name, **config) for name, config in MODELS.items()}


@torch.no_grad()
def forward(env, folder, model, degrees, fsdp) -> torch.Tensor:
    with mesh_of(env, **degrees) as mesh:
        transformer = load(mesh, match(mesh, folder), fsdp=fsdp)
        first, again = (transformer(**inputs(model), return_dict=False)[0] for _ in range(2))
        assert torch.equal(first, again)  # nothing that was remembered of a forward changes the next
        return first


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_forward_is_that_of_diffusers(models, ranks):
    cases = [case for case in CASES if torch.Size(case[1].values()).numel() == ranks]
    results = run_cases(ranks, forward, [(models[model], model, degrees, fsdp) for model, degrees, fsdp in cases])
    for (model, degrees, fsdp), by_rank in zip(cases, results, strict=True):
        with torch.no_grad():
            expected = WanTransformer3DModel.from_pretrained(models[model])(**inputs(model), return_dict=False)[0]
        for out in by_rank:
            assert torch.equal(out, by_rank[0])
            assert (out - expected).abs().max() <= 5e-5, (model, degrees, fsdp)
