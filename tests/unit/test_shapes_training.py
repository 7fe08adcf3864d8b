"""The training of `wan_shapes`: its parts are the shipped ones, its shortcuts change nothing, a stop loses nothing."""

import io
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from support.checkpoints import WAN_SHAPES
from support.commands import REPO, load_script
from support.tiers import all_only
from wan_dist.shapes.architecture import build_autoencoder, build_text_encoder, build_tokenizer, build_transformer
from wan_dist.shapes.autoencoder_training import AutoencoderRecipe, AutoencoderTraining, decode_unclamped
from wan_dist.shapes.checkpoint import Parts, load_checkpoint, save_checkpoint
from wan_dist.shapes.clips import DRAWN
from wan_dist.shapes.denoiser_training import DenoiserRecipe, DenoiserTraining
from wan_dist.shapes.latents import LatentRing
from wan_dist.shapes.optimizer import Rates, Trained, cosine, orthogonal, warm_up
from wan_dist.shapes.pad_token import encode_text, install_one_pad_token
from wan_dist.shapes.training_run import Settings, TrainingRun
from wan_dist.stop import StoppedError

CPU = torch.device("cpu")


def go_on() -> None:
    """A run that nobody asks to stop."""


def stored(state):
    """As it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(one, other) -> bool:
    """Of two nested states, bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return one == other


def test_checkpoints_are_of_the_shipped_architecture(tmp_path):
    vae = build_autoencoder([0.5] * 16, [2.0] * 16)
    parts = Parts(build_tokenizer(), build_text_encoder(), build_transformer(), vae)
    save_checkpoint(parts, tmp_path / "checkpoint")
    save_checkpoint(parts, tmp_path / "checkpoint")  # in place of the first
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    statistics = {"latents_mean": [0.5] * 16, "latents_std": [2.0] * 16}
    made, shipped = sorted((tmp_path / "checkpoint").rglob("*.json")), sorted(WAN_SHAPES.rglob("*.json"))
    assert [path.relative_to(tmp_path / "checkpoint") for path in made] == [p.relative_to(WAN_SHAPES) for p in shipped]
    for one, other in zip(made, shipped, strict=True):
        found, expected = (json.loads(path.read_text()) for path in (one, other))
        for what_may_differ in ("_diffusers_version", "transformers_version", "padding"):
            expected.pop(what_may_differ, None)
        expected |= statistics if one.parent.name == "vae" else {}
        assert {key: found[key] for key in expected} == expected, one.name
    loaded = WanPipeline.from_pretrained(tmp_path / "checkpoint")
    old = WanPipeline.from_pretrained(WAN_SHAPES)
    for name in ("transformer", "vae", "text_encoder"):
        shapes = [
            {key: value.shape for key, value in getattr(pipe, name).state_dict().items()} for pipe in (loaded, old)
        ]
        assert shapes[0] == shapes[1]
    assert loaded.vae.config.latents_std == [2.0] * 16
    weight = parts.transformer.proj_out.weight
    assert weight.dtype == torch.float32 and torch.equal(loaded.transformer.proj_out.weight, weight.half().float())


@torch.no_grad()
def test_one_pad_token_stands_for_hundreds():
    torch.manual_seed(0)
    plain, short, encoder, tokenizer = build_transformer(), build_transformer(), build_text_encoder(), build_tokenizer()
    for weight in plain.parameters():
        weight.add_(0.05 * torch.randn_like(weight))
    short.load_state_dict(plain.state_dict())
    pads = install_one_pad_token(short)
    prompts = ["a red circle moving right on a black background", "a star"]
    pipeline = WanPipeline(tokenizer=tokenizer, text_encoder=encoder, transformer=None, vae=None, scheduler=None)
    padded, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
    words = tokenizer(prompts, padding=True, return_tensors="pt")
    text = encode_text(encoder, words.input_ids, words.attention_mask)
    assert padded.shape[1] == 512 and text.shape[1] == words.input_ids.shape[1] + 1 < 20
    latents, timestep = torch.randn(2, 16, 3, 8, 12), torch.tensor([900.0, 200.0])
    expected = plain(latents, timestep, padded, return_dict=False)[0]
    pads.stands_for = 512 - words.input_ids.shape[1]
    assert (short(latents, timestep, text, return_dict=False)[0] - expected).abs().max() < 1e-4
    pads.stands_for = 1
    assert (short(latents, timestep, text, return_dict=False)[0] - expected).abs().max() > 1e-3


@torch.no_grad()
def test_decoding_without_the_limit_is_the_vae_s_own():
    torch.manual_seed(1)
    vae, latents = build_autoencoder(), 5 * torch.randn(1, 16, 2, 2, 2)
    vae.decoder.conv_out.weight.mul_(10)
    free = decode_unclamped(vae, latents)
    assert free.abs().max() > 1 and torch.equal(free.clamp(-1, 1), vae.decode(latents).sample)


def test_an_optimizer_step_goes_downhill():
    torch.manual_seed(2)
    module = nn.Sequential(nn.Conv3d(3, 8, 3), nn.Flatten(), nn.Linear(8, 40))
    rates = Rates(muon=0.02, adamw=0.02, muon_decay=0.0, adamw_decay=0.0, mean_decay=0.9, mean_delay=1)
    trained = Trained(module, rates, lambda _name, weight: weight.ndim > 1)
    inputs, target = torch.randn(4, 3, 3, 3, 3), torch.randn(4, 40)
    losses = [trained.step((module(inputs) - target).square().mean(), 1.0) for _ in range(30)]
    assert losses[-1] < 0.2 * losses[0] and trained.steps_done == 30
    mean = (trained.mean(inputs) - target).square().mean().item()
    assert losses[-1] * 0.5 < mean < 0.5 * losses[0]


def test_what_is_made_orthogonal_has_equal_singular_values():
    torch.manual_seed(3)
    for shape in ((2, 12, 30), (2, 30, 12)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.min() > 0.6 and values.max() < 1.3


def test_rates_rise_hold_and_fall():
    assert warm_up(0, 5200) == 0.01 and warm_up(99, 5200) == 1 and warm_up(0, 1) == 1 and warm_up(9, 40) == 1
    assert cosine(0.29, last=0.02, hold=0.3) == 1 and math.isclose(cosine(1, last=0.02, hold=0.3), 0.02)
    assert math.isclose(cosine(0.5, last=0.0), 0.5)


def test_the_whole_recipe_and_a_part_of_it():
    assert AutoencoderRecipe().scaled(1, 1) == AutoencoderRecipe(3400, 1400, 16, 8)
    assert DenoiserRecipe().scaled(1, 1) == DenoiserRecipe(5200, 64, 2048)
    assert AutoencoderRecipe().scaled(0.1, 0.5) == AutoencoderRecipe(340, 140, 8, 4)
    assert DenoiserRecipe().scaled(1e-6, 1e-6) == DenoiserRecipe(1, 1, 16)


def test_a_ring_keeps_the_latest_clips():
    vae = build_autoencoder().eval()
    ring = LatentRing(vae, 0, 64, 64, capacity=2)
    ring.fill(go_on)
    first = ring.draw(4, _Slots(0, 1, 0, 1))
    ring.add(3)
    later = ring.draw(4, _Slots(0, 1, 0, 1))
    assert ring.made == 4 and first[0] == [ring._clip(n) for n in (0, 1, 0, 1)]
    assert later[0] == [ring._clip(n) for n in (2, 3, 2, 3)]
    assert not torch.equal(first[1], later[1]) and torch.equal(later[1][0], later[1][2])


class _Slots:
    """Draws these, one after the other."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def randrange(self, _count):
        return self.numbers.pop(0)


def autoencoder() -> AutoencoderTraining:
    return AutoencoderTraining(AutoencoderRecipe(crop_steps=3, clip_steps=1, crops=1, clips=1), seed=0, device=CPU)


def denoiser() -> DenoiserTraining:
    torch.manual_seed(4)
    weights = build_autoencoder().state_dict()
    return DenoiserTraining(DenoiserRecipe(steps=3, clips=2, kept=2), 0, CPU, weights)


@pytest.mark.parametrize("stage", [autoencoder, denoiser])
def test_going_on_is_as_if_never_stopped(stage):
    def begun():
        training = stage()
        if isinstance(training, DenoiserTraining):
            training.prepare(go_on)
        return training

    whole = begun()
    losses = [whole.train_step() for _ in range(2)]
    state = stored(whole.state_dict())
    losses.append(whole.train_step())
    torch.manual_seed(99)  # what others draw changes nothing
    resumed = stage()
    resumed.load_state_dict(state)
    if isinstance(resumed, DenoiserTraining):
        resumed.prepare(go_on)
    assert resumed.train_step() == losses[2] and all(map(math.isfinite, losses))
    assert same(resumed.state_dict(), whole.state_dict())
    assert not same(state, whole.state_dict())


def test_what_is_trained_on_begins_as_it_was_and_keeps_its_vae(tmp_path):
    shipped, recipe = load_checkpoint(WAN_SHAPES), DenoiserRecipe(steps=3, clips=4, kept=4)
    new, finetuned = (
        DenoiserTraining(recipe, 0, CPU, shipped.vae.state_dict(), finetune) for finetune in (False, True)
    )
    finetuned.begin_with(shipped)
    for training in (new, finetuned):
        training.prepare(go_on)
    for name in ("transformer", "text_encoder"):
        assert same(getattr(finetuned.parts(), name).state_dict(), getattr(shipped, name).state_dict())
    assert finetuned.trained.rates.muon < new.trained.rates.muon
    assert finetuned.train_step() < 0.75 * new.train_step()
    assert finetuned.parts().vae.config.latents_mean == shipped.vae.config.latents_mean
    assert new.parts().vae.config.latents_mean != shipped.vae.config.latents_mean
    assert not same(finetuned.trained.module["transformer"].state_dict(), shipped.transformer.state_dict())


@all_only
def test_a_stopped_run_goes_on_without_the_checkpoint_that_it_began_with(tmp_path):
    base, begun = shutil.copytree(WAN_SHAPES, tmp_path / "base"), settings(tmp_path / "out", fraction=1e-6, batch=0.01)
    begun.output.mkdir()
    begun = replace(begun, finetune=base)

    def stop() -> None:
        raise StoppedError("SIGTERM")

    with pytest.raises(StoppedError):
        TrainingRun(begun, stop).train()
    shutil.rmtree(base)
    resumed = TrainingRun(begun, go_on).train()
    assert same(load_checkpoint(resumed).vae.state_dict(), load_checkpoint(WAN_SHAPES).vae.state_dict())
    drawn = [load_checkpoint(folder).transformer for folder in (resumed, WAN_SHAPES)]
    distances = [(one - other).abs().max() for one, other in zip(*(model.parameters() for model in drawn), strict=True)]
    assert 0 < max(distances) < 0.1  # one step from where it began
    with pytest.raises(ValueError, match=r"state of a run with .* --finetune \S+base: type these"):
        TrainingRun(replace(begun, finetune=WAN_SHAPES), go_on)


def settings(folder, **changes) -> Settings:
    typed = {"output": folder, "fraction": 0.1, "batch": 1.0, "seed": 0, "device": CPU, "evaluate": 1}
    return Settings(**{**typed, **changes})


def test_states_of_other_arguments_or_clips_and_damaged_ones_are_refused(tmp_path):
    content = {"arguments": settings(tmp_path).identity, "clips": DRAWN, "stage": "autoencoder", "state": {}}
    torch.save(content, tmp_path / "state.pt")
    TrainingRun(settings(tmp_path, evaluate=5), go_on)
    with pytest.raises(ValueError, match=r"state of a run with --fraction 0.1 --batch 1.0 --seed 0: type these"):
        TrainingRun(settings(tmp_path, seed=1), go_on)
    with pytest.raises(ValueError, match=r"--seed 0 and no --finetune: type these"):
        TrainingRun(settings(tmp_path, finetune=WAN_SHAPES), go_on)
    torch.save({**content, "clips": DRAWN - 1}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="another version, in which seeds draw other clips"):
        TrainingRun(settings(tmp_path), go_on)
    (tmp_path / "state.pt").write_bytes(b"no state")
    with pytest.raises(ValueError, match=r"state.pt is no state .*: remove it to begin anew"):
        TrainingRun(settings(tmp_path), go_on)


def cut(folder):
    weights = folder / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def forget(folder):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("proj_out.bias")
    save_file(weights, file)


def behead(folder):
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_attention_heads": 4, "attention_head_dim": 48}))


def deform(folder):
    (folder / "vae" / "config.json").write_text("[]")


def rename_word(folder):
    file = folder / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"red"', '"crimson"'))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (cut, "SafetensorError|incomplete|Error while"),
        (forget, "transformer has other weights: proj_out.bias"),
        (behead, "transformer is of another architecture"),
        (deform, "its JSON files are of another form"),
        (rename_word, "its tokenizer knows other words"),
        (shutil.rmtree, "No such file"),
    ],
)
def test_a_checkpoint_that_cannot_be_trained_on_is_refused(tmp_path, harm, told):
    folder = shutil.copytree(WAN_SHAPES, tmp_path / "base")
    harm(folder)
    with pytest.raises(ValueError, match=f"base: not a checkpoint of wan_shapes: .*({told})"):
        TrainingRun(settings(tmp_path, finetune=folder), go_on)


def test_other_models_and_the_run_s_own_checkpoint_are_not_trained_on(tmp_path, tiny):
    with pytest.raises(ValueError, match="not a checkpoint of wan_shapes: text_encoder has other weights: ") as refused:
        TrainingRun(settings(tmp_path, finetune=tiny), go_on)
    assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(ValueError, match="is what this run would replace: type another --output"):
        TrainingRun(settings(tmp_path, finetune=tmp_path / "checkpoint"), go_on)


def test_devices_are_found_or_refused(monkeypatch):
    script = load_script(REPO / "launch" / "train_wan_shapes.py")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert script.chosen_device("auto") == script.chosen_device("cpu") == CPU
    for name in ("gpu", "meta", "cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"--device {name}: "):
            script.chosen_device(name)
