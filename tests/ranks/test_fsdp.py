"""FSDP's manners: it says what it manages, nothing else moves or recasts that, loaders are found behind it, and an
expert that is not running holds nothing but its own rows."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from support.ranks import frozen, run_cases, run_generation, run_ranks
from support.sharded import load, match, mesh_of, save_transformer
from wan_dist.distributed.fsdp import is_fsdp_managed_module
from wan_dist.layers.weight_loader import weight_loader
from wan_dist.pipeline import experts as loading
from wan_dist.pipeline import generate as screen

MOVES = {
    "to dtype": lambda module: module.to(torch.bfloat16),
    "to device": lambda module: module.to("meta"),
    "half": lambda module: module.half(),
    "float": lambda module: module.float(),
    "cpu": lambda module: module.cpu(),
    "cuda": lambda module: module.cuda(),
    "to_empty": lambda module: module.to_empty(device="cpu"),
}


def state(model) -> list[tuple]:
    return [(name, p.dtype, p.device, p.to_local().clone()) for name, p in model.named_parameters()]


def same(before: list[tuple], after: list[tuple]) -> bool:
    return all(a[:-1] == b[:-1] and torch.equal(a[-1], b[-1]) for a, b in zip(before, after, strict=True))


def manners(env, folder) -> None:
    with mesh_of(env, ring=env.world_size) as mesh:
        plain = load(mesh, match(mesh, folder), fsdp=False)
        assert not is_fsdp_managed_module(plain) and not is_fsdp_managed_module(torch.nn.Linear(1, 1))
        plain.to(torch.float32)
        model = load(mesh, match(mesh, folder))
        parent = torch.nn.ModuleDict({"model": model})
        for managed in (model, model.blocks[0], model.blocks, parent):
            assert is_fsdp_managed_module(managed)
        assert not is_fsdp_managed_module(model.rope)
        before = state(model)
        for what, move in MOVES.items():
            for name, managed in {"model": model, "block": model.blocks[0], "parent": parent}.items():
                with pytest.raises(RuntimeError, match="FSDP manages this module"):
                    move(managed)
                assert same(before, state(model)), f"{what} of the {name} changed it"
        for name, _ in plain.named_parameters():
            assert weight_loader(model, name) == weight_loader(plain, name)
        with pytest.raises(KeyError):
            weight_loader(model, "blocks.9.extra")


def test_nothing_else_moves_or_recasts_what_it_manages(tmp_path):
    run_ranks(2, manners, save_transformer(tmp_path / "transformer"))


def parts(env, folder) -> None:
    """A module inside a unit: its parameters are FSDP's, though it is no unit itself."""
    with mesh_of(env, ring=env.world_size) as mesh:
        model = load(mesh, match(mesh, folder))
        before = state(model)
        for part in (model.patch_embedding, model.blocks[0].attn1, model.blocks[0].ffn.net[2]):
            assert is_fsdp_managed_module(part)
            for move in MOVES.values():
                with pytest.raises(RuntimeError, match="FSDP manages this module"):
                    move(part)
        assert same(before, state(model))


def test_nor_a_part_of_it(tmp_path):
    run_ranks(2, parts, save_transformer(tmp_path / "transformer"))


def held_after_each_step(env, config) -> list[tuple[str, dict[str, bool], dict[str, bool]]]:
    """`(the expert that ran, {expert: whether any of its parameters is gathered}, {expert: whether it remembers a
    prompt's keys})`, after every step."""
    models, seen = {}, []
    fill, denoise = loading.fill, screen.denoise

    def remembering_fill(weights, **how):
        models[how["component"]] = fill(weights, **how)
        return models[how["component"]]

    def watched_denoise(latents, schedule, scheduler, predict, axis, on_step):
        def watch(step, made):
            on_step(step, made)
            experts = {name: model for name, model in models.items() if name.startswith("transformer")}
            gathered = {
                name: not all(isinstance(parameter, DTensor) for parameter in model.parameters())
                for name, model in experts.items()
            }
            remembers = {
                name: bool(model.blocks[0].attn2.processor.text_kv._entries) for name, model in experts.items()
            }
            seen.append((step.expert, gathered, remembers))

        return denoise(latents, schedule, scheduler, predict, axis, watch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "fill", remembering_fill)
        patch.setattr(screen, "denoise", watched_denoise)
        run_generation(env, config)
    return seen


def test_an_idle_expert_holds_nothing_gathered_and_no_text(tmp_path, checkpoints):
    path = checkpoints(experts=2, boundary_ratio=0.9, seed=2)
    mesh = {"parallelism.cfg": 1, "parallelism.ring": 2, "parallelism.fsdp.enabled": "on"}
    configs = [
        frozen(tmp_path, path, **{**mesh, "parallelism.fsdp.reshard_after_forward": reshard, "sampler.steps": 4})
        for reshard in (True, False)
    ]
    freed, kept = run_cases(2, held_after_each_step, [(config,) for config in configs])
    for steps, running_is_gathered in ((freed, False), (kept, True)):
        for seen in steps:
            assert {expert for expert, _, _ in seen} == {"transformer", "transformer_2"}
            for running, gathered, remembers in seen:
                assert remembers == {name: name == running for name in gathered}
                assert gathered == {name: running_is_gathered and name == running for name in gathered}
