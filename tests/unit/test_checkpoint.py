"""A checkpoint's JSON files: what they say, what is wrong with them, and the fingerprint made of them."""

import json
import random
import shutil

import pytest
from safetensors.torch import load_file, save_file

from support.checkpoints import WAN_SHAPES
from wan_dist.loading.checkpoint import fingerprint, open_checkpoint, weight_problems
from wan_dist.loading.tensor_files import CheckpointError

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(WAN_SHAPES, tmp_path / "copy")


def edit_index(folder, **entries) -> None:
    file = folder / "model_index.json"
    index = {**json.loads(file.read_text()), **entries}
    file.write_text(json.dumps({name: value for name, value in index.items() if value != "drop"}))


def refusal(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


def test_what_a_checkpoint_says_of_itself():
    checkpoint = open_checkpoint(WAN_SHAPES)
    assert set(checkpoint.configs) == {"text_encoder", "vae", "transformer"}
    assert checkpoint.experts == ("transformer",)
    assert checkpoint.boundary_ratio is None
    assert checkpoint.transformer_config["num_attention_heads"] == 8
    assert checkpoint.scheduler["_class_name"] == "UniPCMultistepScheduler"
    assert weight_problems(checkpoint) == []


def test_two_experts_and_either_alone(checkpoints):
    path = checkpoints(experts=2, boundary_ratio=0.875)
    checkpoint = open_checkpoint(path)
    assert checkpoint.experts == ("transformer", "transformer_2")
    assert checkpoint.boundary_ratio == 0.875


def test_the_low_noise_expert_alone(copy):
    (copy / "transformer").rename(copy / "transformer_2")
    edit_index(copy, transformer=[None, None], transformer_2=["diffusers", "WanTransformer3DModel"])
    assert open_checkpoint(copy).experts == ("transformer_2",)


def test_a_folder_that_is_not_there(tmp_path):
    assert refusal(tmp_path / "none") == f"{tmp_path / 'none'}: no such folder"
    assert "no model_index.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    assert refusal(copy) == f"{copy / name}: missing"


@pytest.mark.parametrize("text", ["{", "", "[]", "3", "\xff"])
@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
def test_a_damaged_file_is_named(copy, name, text):
    (copy / name).write_bytes(text.encode("latin-1"))
    assert refusal(copy).startswith(f"{copy / name}: ")


def test_no_tokenizer(copy):
    shutil.rmtree(copy / "tokenizer")
    assert refusal(copy) == f"{copy / 'tokenizer'}: no such folder"


@pytest.mark.parametrize("name", ["text_encoder", "vae", "transformer"])
@pytest.mark.parametrize("value", [[None, None], "drop"])
def test_a_component_that_the_index_does_not_name(copy, name, value):
    edit_index(copy, **{name: value})
    assert f"names no {name}" in refusal(copy)


def test_components_without_weights_are_all_told(copy):
    (copy / TRANSFORMER).unlink()
    (copy / "vae" / "diffusion_pytorch_model.safetensors").rename(copy / "vae" / "diffusion_pytorch_model.bin")
    problems = weight_problems(open_checkpoint(copy))
    assert len(problems) == 2
    assert any(str(copy / "transformer") in p and "no safetensors file" in p for p in problems)
    assert any(str(copy / "vae") in p and "pickled" in p for p in problems)


def test_a_copy_elsewhere_has_the_same_fingerprint(copy):
    assert fingerprint(open_checkpoint(copy)) == fingerprint(open_checkpoint(WAN_SHAPES))


@pytest.mark.parametrize("change", ["shape", "dtype", "name", "config", "scheduler"])
def test_any_other_architecture_has_another_fingerprint(copy, change):
    before = fingerprint(open_checkpoint(copy))
    tensors = load_file(copy / TRANSFORMER)
    name, tensor = next((n, t) for n, t in tensors.items() if t.ndim == 2 and t.shape[0] != t.shape[1])
    changed = {
        "shape": tensor.t().contiguous(),
        "dtype": tensor.bfloat16() if tensor.element_size() == 4 else tensor.float(),
    }
    if change in changed:
        save_file({**tensors, name: changed[change]}, copy / TRANSFORMER)
    elif change == "name":
        del tensors[name]
        save_file({**tensors, name[:-1] + "_": tensor}, copy / TRANSFORMER)
    else:
        file = copy / {"config": "vae/config.json", "scheduler": "scheduler/scheduler_config.json"}[change]
        file.write_text(json.dumps({**json.loads(file.read_text()), "extra": 1}))
    assert fingerprint(open_checkpoint(copy)) != before


def test_other_weights_of_the_same_shapes_have_another_fingerprint(copy, checkpoints):
    before = fingerprint(open_checkpoint(copy))
    assert fingerprint(open_checkpoint(checkpoints(seed=2))) != fingerprint(open_checkpoint(checkpoints(seed=3)))
    weights = (copy / TRANSFORMER).read_bytes()
    middle, length = len(weights) // 2, len(weights) // 10  # no sample of the file misses as much
    noise = random.Random(0).randbytes(length)
    (copy / TRANSFORMER).write_bytes(weights[:middle] + noise + weights[middle + length :])
    assert fingerprint(open_checkpoint(copy)) != before


def test_a_missing_shard_is_no_reason_to_lose_the_record(copy):
    before = fingerprint(open_checkpoint(copy))
    (copy / TRANSFORMER).unlink()
    assert fingerprint(open_checkpoint(copy)) != before


def test_other_files_in_the_folder_do_not_count(copy):
    before = fingerprint(open_checkpoint(copy))
    (copy / "video.json").write_text("{}")
    assert fingerprint(open_checkpoint(copy)) == before


def test_a_boundary_that_is_no_number(copy):
    edit_index(copy, boundary_ratio="0.9")
    assert "boundary_ratio is '0.9', not a number" in refusal(copy)
