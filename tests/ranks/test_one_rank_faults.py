"""A fault that one rank sees is the same error on all of them."""

import shutil

import pytest

from support.ranks import generate, run_ranks
from wan_dist.distributed.process_group import process_group
from wan_dist.loading.tensor_files import CheckpointError
from wan_dist.loading.weights import on_every_rank


def read_with_one_bad_rank(env, bad: int) -> str:
    import torch

    degrees = {"dp": 1, "cfg": 1, "ring": 1, "ulysses": env.world_size, "tp": 1}
    with process_group(env, degrees, torch.device("cpu"), 60) as mesh:

        def read() -> str:
            if env.rank == bad:
                raise CheckpointError("shard 2: tensor 'a' is cut short")
            return "read"

        assert on_every_rank(mesh.world, lambda: "fine") == "fine"
        with pytest.raises(CheckpointError) as caught:
            on_every_rank(mesh.world, read)
        return str(caught.value)


@pytest.mark.parametrize("bad", [0, 2])
def test_all_ranks_raise_it(bad):
    assert run_ranks(3, read_with_one_bad_rank, bad) == ["shard 2: tensor 'a' is cut short"] * 3


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer/tokenizer.json", "{"),
        ("text_encoder/config.json", '{"model_type": "umt5", "d_model": "wide"}'),
        ("vae/config.json", '{"_class_name": "AutoencoderKLWan", "z_dim": 4}'),
    ],
)
def test_a_file_that_a_library_cannot_use_is_named(tmp_path, tiny, file, text):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    (broken / file).write_text(text)
    with pytest.raises(AssertionError) as caught:
        generate(tmp_path, broken, **{"output.formats": ["frames"], "parallelism.ulysses": 2})
    assert f"CheckpointError: {broken / file.split('/')[0]}: cannot be used" in str(caught.value)
