"""Shard conditions: which qualified names are units, which rule decides, and that no match is an error."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from wan_dist.distributed.shard_conditions import (
    COMMON_CONTAINERS,
    CONDITIONS,
    REFINER_CONTAINERS,
    has_class_in,
    is_block,
    is_common_numbered_block,
    is_module_list_entry,
    is_module_list_entry_in,
    is_refiner_block,
    shard_units,
)

ENTRIES = ["blocks.0", "blocks.12", "blocks.007", "transformer.blocks.3", "a.b.c.blocks.0", "refiner.blocks.0"]
NO_ENTRIES = [
    "", "blocks", "0", "blocks.", ".0", "blocks.a", "blocks.0a", "blocks.-1", "blocks.+1", "blocks.0.", "blocks. 0",
    "blocks.1_0", "blocks.0x1", "blocks.0.attn1", "blocks.0.attn1.to_q", "blocks.0.0", "xblocks.0", "blocksx.0",
    "Blocks.0", "my_blocks.0", "block.0", "blocks0", "blocks.²", "blocks.١", "blocks.½", "blocks.0\n", "blocks.x.0",
]  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES)
def test_numbered_entries_of_a_list_at_any_depth(name):
    assert is_module_list_entry(name, "blocks")
    assert is_block(name)
    assert is_common_numbered_block(name)


@pytest.mark.parametrize("name", NO_ENTRIES)
def test_what_is_no_entry_of_that_list(name):
    assert not is_module_list_entry(name, "blocks")
    assert not is_block(name)


@pytest.mark.parametrize("container", ["refiner.blocks", "", "blocks.0", "lock", ".blocks"])
def test_a_container_is_one_whole_part_of_the_name(container):
    for name in ("refiner.blocks.0", "blocks.0", "blocks.0.0"):
        assert not is_module_list_entry(name, container)


def test_several_containers():
    assert is_module_list_entry_in("encoder.block.3", ("layers", "block"))
    assert not is_module_list_entry_in("encoder.block.3", ("layers", "blocks"))
    assert not is_module_list_entry_in("encoder.block.3", ())


MATCHES = {
    "is_layer": {"layers"},
    "is_block": {"blocks"},
    "is_double_block": {"double_blocks"},
    "is_single_block": {"single_blocks"},
    "is_refiner_block": {"refiner_blocks", "noise_refiner", "context_refiner"},
    "is_common_numbered_block": {
        "blocks", "layers", "double_blocks", "single_blocks", "refiner_blocks", "noise_refiner", "context_refiner",
        "transformer_blocks", "single_transformer_blocks", "block",
    },
}  # fmt: skip


def test_the_named_conditions_are_all_known_here():
    assert set(CONDITIONS) == set(MATCHES)
    assert set(COMMON_CONTAINERS) == MATCHES["is_common_numbered_block"]
    assert set(REFINER_CONTAINERS) == MATCHES["is_refiner_block"]


@pytest.mark.parametrize("condition", MATCHES)
@pytest.mark.parametrize("container", [*sorted(MATCHES["is_common_numbered_block"]), "experts", "token_refiner"])
def test_each_condition_matches_its_containers_and_no_other(condition, container):
    expected = container in MATCHES[condition]
    for name in (f"{container}.0", f"model.{container}.11"):
        assert CONDITIONS[condition](name, torch.nn.Identity()) is expected
    for name in (container, f"{container}.0.mlp", f"x{container}.0", f"{container}.first"):
        assert not CONDITIONS[condition](name, torch.nn.Identity())


def test_a_transformers_block_is_common_but_no_diffusers_block():
    assert is_common_numbered_block("encoder.block.3")
    assert not is_block("encoder.block.3")
    assert not is_common_numbered_block("encoder.block.3.layer.0")
    assert not is_refiner_block("token_refiner.blocks.0")


class Part(torch.nn.Module):
    pass


class SpecialPart(Part):
    pass


class Other(torch.nn.Module):
    pass


class Model(torch.nn.Module):
    """`head` (SpecialPart), `blocks` of Part with a nested Other, `layers` of Other."""

    def __init__(self, **declared):
        super().__init__()
        self.head = SpecialPart()
        self.blocks = torch.nn.ModuleList(Part() for _ in range(2))
        self.layers = torch.nn.ModuleList([Other()])
        for name, value in declared.items():
            setattr(self, name, value)


def test_a_class_condition_goes_by_name_also_through_inheritance():
    condition = has_class_in(["Part"])
    assert condition("anything", Part())
    assert condition("anything", SpecialPart())
    assert not condition("blocks.0", Other())
    assert not has_class_in([])("blocks.0", Part())


NUMBERED = ("blocks.0", "blocks.1", "layers.0")


@pytest.mark.parametrize(
    ("declared", "explicit", "names", "rule"),
    [
        ({}, (), NUMBERED, "common numbered block"),
        ({"_repeated_blocks": None, "_no_split_modules": None}, (), NUMBERED, "common numbered block"),
        ({"_repeated_blocks": [], "_no_split_modules": ["Other"]}, (), ("layers.0",), "block class Other"),
        ({"_repeated_blocks": ["Other"]}, (), ("layers.0",), "block class Other"),
        ({"_no_split_modules": ["Part"]}, (), ("head", "blocks.0", "blocks.1"), "block class Part"),
        ({"_repeated_blocks": ["SpecialPart"], "_no_split_modules": ["Other"]}, (), ("head",), "SpecialPart"),
        ({"_repeated_blocks": ["SpecialPart", "Other"]}, (), ("head", "layers.0"), "SpecialPart, Other"),
        ({"_repeated_blocks": ["Renamed"]}, (), NUMBERED, "common numbered block"),
        ({"_no_split_modules": ["Renamed"]}, (), NUMBERED, "common numbered block"),
        ({"_repeated_blocks": ["SpecialPart"]}, ("is_layer",), ("layers.0",), "is_layer"),
        ({"_repeated_blocks": ["SpecialPart"]}, ("is_layer", "is_block"), NUMBERED, "is_layer, is_block"),
    ],
)
def test_explicit_beats_declared_classes_beat_numbered_entries(declared, explicit, names, rule):
    units = shard_units(Model(**declared), explicit)
    assert units.names == names
    assert rule in units.rule


def test_the_conditions_may_come_as_any_iterable():
    assert shard_units(Model(), iter(["is_block"])).names == ("blocks.0", "blocks.1")


def test_nested_units_come_outermost_first():
    model = Model()
    model.blocks[0].layers = torch.nn.ModuleList([Other()])
    assert shard_units(model).names == ("blocks.0", "blocks.0.layers.0", "blocks.1", "layers.0")


@pytest.mark.parametrize("explicit", [("is_double_block",), ("is_refiner_block", "is_single_block")])
def test_an_explicit_condition_that_matches_nothing_is_not_replaced_by_another(explicit):
    with pytest.raises(ValueError, match=f"^Model: no module matches.*{', '.join(explicit)}"):
        shard_units(Model(_repeated_blocks=["Part"]), explicit)


def test_a_model_without_units_is_an_error_that_names_its_class_and_what_was_tried():
    with pytest.raises(ValueError, match=r"^Part: no module matches .*common numbered block"):
        shard_units(Part())
    with pytest.raises(ValueError, match=r"^Linear: "):
        shard_units(torch.nn.Linear(1, 1))
    root = Part()
    root._repeated_blocks = ["Part", "Absent"]
    with pytest.raises(ValueError, match=r"^Part: .*block class Part, Absent"):
        shard_units(root)  # the model itself is never a unit


@pytest.mark.parametrize("explicit", [(), ("is_block",), ("is_common_numbered_block",)])
def test_the_wan_transformers_blocks(explicit):
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, num_layers=3, ffn_dim=8, text_dim=8, added_kv_proj_dim=48
        )
    units = shard_units(model, explicit)
    assert units.names == ("blocks.0", "blocks.1", "blocks.2")
    assert ("WanTransformerBlock" in units.rule) is not bool(explicit)


@pytest.mark.parametrize("explicit", [(), ("is_common_numbered_block",)])
def test_the_text_encoders_blocks(explicit):
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=3, vocab_size=32))
    units = shard_units(model, explicit)
    assert units.names == ("encoder.block.0", "encoder.block.1", "encoder.block.2")
    assert ("UMT5Block" in units.rule) is not bool(explicit)
