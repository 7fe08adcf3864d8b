"""Weights go into a meta module as diffusers itself would put them there, or a named tensor says why not."""

import shutil
from collections import Counter

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from support.checkpoints import TINY, WAN_SHAPES
from wan_dist.loading import weights as weights_module
from wan_dist.loading.checkpoint import open_checkpoint
from wan_dist.loading.tensor_files import CheckpointError, read_component
from wan_dist.loading.weights import fill, match_weights, serve_in
from wan_dist.models.text_encoder import meta_text_encoder
from wan_dist.models.wan_transformer import meta_transformer
from wan_dist.models.wan_vae import meta_vae

CPU = torch.device("cpu")
FILE = "diffusion_pytorch_model.safetensors"
NAME = "blocks.0.attn1.to_q.weight"


def transformer(folder) -> WanTransformer3DModel:
    return meta_transformer(open_checkpoint(folder).configs["transformer"])


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    expected = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    found = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def component(tmp_path):
    return shutil.copytree(WAN_SHAPES / "transformer", tmp_path / "transformer")


def rewrite(component, change) -> None:
    tensors = load_file(component / FILE)
    change(tensors)
    save_file(tensors, component / FILE)


def refusal(component) -> str:
    with pytest.raises(CheckpointError) as caught:
        match_weights(transformer(WAN_SHAPES), component)
    return str(caught.value)


def test_a_missing_tensor(component):
    rewrite(component, lambda tensors: tensors.pop(NAME))
    assert refusal(component) == f"{component} ({FILE}): tensor '{NAME}' is missing; WanTransformer3DModel needs it"


def test_an_unknown_tensor_unless_the_model_says_it_may_be_there(component):
    rewrite(component, lambda tensors: tensors.update({"blocks.9.extra": torch.ones(1)}))
    assert refusal(component) == f"{component / FILE}: tensor 'blocks.9.extra' is unknown to WanTransformer3DModel"
    match_weights(transformer(WAN_SHAPES), component, [r"blocks\.\d+\.extra"])


def test_a_tensor_of_another_shape_also_of_the_same_size(component):
    rewrite(component, lambda tensors: tensors.update({NAME: tensors[NAME].reshape(-1)}))
    message = refusal(component)
    assert message.startswith(f"{component / FILE}: tensor '{NAME}' has shape ({192 * 192},)")
    assert message.endswith("needs (192, 192)")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_transformer_equals_diffusers_own_with_its_fp32_islands(tiny, dtype):
    ours = transformer(tiny)
    serve_in(ours, dtype, ours._keep_in_fp32_modules)
    fill(match_weights(ours, tiny / "transformer"), device=CPU)
    same(ours, WanTransformer3DModel.from_pretrained(tiny / "transformer", torch_dtype=dtype))
    kinds = {parameter.dtype for parameter in ours.parameters()}
    assert kinds == {torch.float32, dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_vae_equals_diffusers_own(tiny, dtype):
    ours = meta_vae(open_checkpoint(tiny).configs["vae"])
    serve_in(ours, dtype)
    fill(match_weights(ours, tiny / "vae"), device=CPU)
    same(ours, AutoencoderKLWan.from_pretrained(tiny / "vae", torch_dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("source", ["tiny", "wan_shapes"])
def test_the_text_encoder_equals_transformers_own(tiny, source, dtype):
    folder = (tiny if source == "tiny" else WAN_SHAPES) / "text_encoder"
    ours = meta_text_encoder(folder, "UMT5EncoderModel")
    ignored = ours._keys_to_ignore_on_load_unexpected or ()
    serve_in(ours, dtype)
    fill(match_weights(ours, folder, ignored), device=CPU)
    same(ours, UMT5EncoderModel.from_pretrained(folder, dtype=dtype))


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight", "both"])
def test_tied_tensors_under_any_of_their_names_are_one_parameter(tiny, tmp_path, kept):
    tensors = {}
    for file in (tiny / "text_encoder").glob("*.safetensors"):
        tensors.update(load_file(file))
    embedding = tensors.pop("shared.weight", None)
    embedding = tensors.pop("encoder.embed_tokens.weight", embedding)
    names = ["shared.weight", "encoder.embed_tokens.weight"] if kept == "both" else [kept]
    save_file({**tensors, **{name: embedding.clone() for name in names}}, tmp_path / "model.safetensors")
    model = meta_text_encoder(TINY / "text_encoder", "UMT5EncoderModel")
    fill(match_weights(model, tmp_path), device=CPU)
    assert model.shared.weight is model.encoder.embed_tokens.weight
    assert torch.equal(model.shared.weight, embedding)


def test_storages_are_fresh_and_aligned(tiny):
    model = transformer(tiny)
    fill(match_weights(model, tiny / "transformer"), device=CPU)
    for name, parameter in model.named_parameters():
        storage = parameter.untyped_storage()
        assert storage.data_ptr() % 64 == 0, name
        assert parameter.storage_offset() == 0, name
        assert storage.nbytes() == parameter.nbytes, name
        assert not parameter.requires_grad, name


def test_nothing_is_left_on_meta_and_the_rotary_table_is_diffusers(tiny):
    model = fill(match_weights(transformer(tiny), tiny / "transformer"), device=CPU)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    theirs = WanTransformer3DModel.from_pretrained(tiny / "transformer").rope
    assert torch.equal(model.rope.freqs_cos, theirs.freqs_cos)
    assert torch.equal(model.rope.freqs_sin, theirs.freqs_sin)


def test_bytes_read_are_those_of_the_files(tiny):
    counted: Counter[str] = Counter()
    weights = match_weights(transformer(tiny), tiny / "transformer")
    for _ in range(2):
        fill(weights, device=CPU, bytes_read=counted, component="transformer")
    on_disk = sum(entry.nbytes for entry in read_component(tiny / "transformer").values())
    assert counted == {"transformer": 2 * on_disk}


def test_ranks_meet_again_and_again_while_they_read(tiny, monkeypatch):
    """So that the failure of one ends all soon: every so many elements, in the same places on every rank."""
    meetings = []
    real = weights_module.on_every_rank
    monkeypatch.setattr(weights_module, "on_every_rank", lambda axis, act: meetings.append(axis) or real(axis, act))
    monkeypatch.setattr(weights_module, "_MEET_EVERY_ELEMENTS", 100_000)
    model = transformer(tiny)
    elements = sum(parameter.numel() for parameter in model.parameters())
    fill(match_weights(model, tiny / "transformer"), device=CPU)
    assert elements // 200_000 < len(meetings) <= elements // 100_000 + 1
