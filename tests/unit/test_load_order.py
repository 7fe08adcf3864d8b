"""What is loaded first: the largest on a device, and what decides where sizes are equal or unknown."""

from itertools import permutations

import pytest

from wan_dist.distributed.mesh import Axis
from wan_dist.loading.order import ComponentLoadSpec, agreed_order, device_bytes, order_component_load_specs

GB = 1_000_000_000


def order(sizes: dict[str, float | None]) -> list[str]:
    """The names in load order; sizes in GB, index by place."""
    specs = [
        ComponentLoadSpec(name, index, None if size is None else int(size * GB))
        for index, (name, size) in enumerate(sizes.items())
    ]
    return [spec.name for spec in order_component_load_specs(specs)]


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        (
            {"transformer": 57, "transformer_2": 57, "text_encoder": 23, "vae": 0.5},
            ["transformer_2", "transformer", "text_encoder", "vae"],
        ),
        ({"transformer": 3, "text_encoder": 12, "vae": 0.5}, ["text_encoder", "transformer", "vae"]),
        ({"text_encoder": 23, "vae": 0.5, "transformer": None}, ["transformer", "text_encoder", "vae"]),
        ({"text_encoder": 23, "transformer": 57, "vae": None}, ["vae", "transformer", "text_encoder"]),
        ({"vae": None, "text_encoder": None, "transformer": None}, ["transformer", "text_encoder", "vae"]),
        ({"transformer": None, "transformer_2": None, "vae": 9}, ["transformer_2", "transformer", "vae"]),
        ({"vae": 1, "image_encoder": 1, "text_encoder": 1, "transformer": 1},
         ["transformer", "text_encoder", "image_encoder", "vae"]),
        ({"transformer": 1, "transformer_2": 1.5}, ["transformer_2", "transformer"]),
        ({"transformer": 1.5, "transformer_2": 1}, ["transformer", "transformer_2"]),
        ({"transformer_2": 1, "transformer_10": 1, "transformer": 1},
         ["transformer_10", "transformer_2", "transformer"]),
        ({"image_encoder": 1, "text_encoder_2": 1, "text_encoder": 1},
         ["text_encoder_2", "text_encoder", "image_encoder"]),
        ({"text_encoder_2": 1, "transformer": 1}, ["transformer", "text_encoder_2"]),
        ({"prior": 1, "safety_checker_2": 1, "vae": 1}, ["vae", "safety_checker_2", "prior"]),
        ({"prior": 2, "transformer": 1}, ["prior", "transformer"]),
        ({"b": 1, "a": 1}, ["b", "a"]),
        ({"vae": 0, "transformer": 0}, ["transformer", "vae"]),
        ({}, []),
    ],
)  # fmt: skip
def test_order(sizes, wanted):
    assert order(sizes) == wanted


def test_the_order_does_not_depend_on_the_order_of_the_list():
    specs = [
        ComponentLoadSpec("transformer", 0, 57),
        ComponentLoadSpec("transformer_2", 1, 57),
        ComponentLoadSpec("text_encoder", 2, None),
        ComponentLoadSpec("vae", 3, 57),
    ]
    for shuffled in permutations(specs):
        names = [spec.name for spec in order_component_load_specs(iter(shuffled))]
        assert names == ["text_encoder", "transformer_2", "transformer", "vae"]


def test_one_byte_decides_before_risk():
    specs = [ComponentLoadSpec("transformer", 0, GB), ComponentLoadSpec("vae", 1, GB + 1)]
    assert [spec.name for spec in order_component_load_specs(specs)] == ["vae", "transformer"]


@pytest.mark.parametrize(
    ("name", "base", "variant"),
    [
        ("transformer", "transformer", 1),
        ("transformer_2", "transformer", 2),
        ("text_encoder", "text_encoder", 1),
        ("text_encoder_2", "text_encoder", 2),
        ("transformer_2_3", "transformer_2", 3),
        ("transformer2", "transformer2", 1),
        ("_2", "_2", 1),
    ],
)
def test_names_with_numbers(name, base, variant):
    spec = ComponentLoadSpec(name, 0, 1)
    assert (spec.base_name, spec.variant) == (base, variant)


@pytest.mark.parametrize(
    ("served", "tp", "shards", "wanted"),
    [
        (100, 1, 1, 100), (100, 4, 1, 25), (100, 1, 8, 13), (100, 2, 4, 13), (101, 2, 1, 51), (1, 8, 8, 1),
        (57_151_488_000, 2, 4, 7_143_936_000), ((1 << 60) + 1, 2, 1, (1 << 59) + 1), (None, 2, 4, None), (0, 2, 2, 0),
    ],
)  # fmt: skip
def test_device_bytes_are_divided_by_both_axes_and_rounded_up(served, tp, shards, wanted):
    assert device_bytes(served, tp=tp, fsdp_shards=shards) == wanted


def test_division_decides_the_order():
    """An FSDP-sharded 57 GB expert takes less of one device than the whole 12 GB encoder."""
    specs = [
        ComponentLoadSpec("transformer", 0, device_bytes(57 * GB, fsdp_shards=8)),
        ComponentLoadSpec("text_encoder", 1, device_bytes(12 * GB)),
    ]
    assert [spec.name for spec in order_component_load_specs(specs)] == ["text_encoder", "transformer"]


def test_alone_the_agreed_order_is_ones_own():
    specs = [ComponentLoadSpec("vae", 0, 1), ComponentLoadSpec("transformer", 1, 2)]
    assert agreed_order(Axis("world"), specs) == ["transformer", "vae"]
