"""Mesh degrees: what `auto` picks, that orders are obeyed, and that a world of another size is refused."""

from math import prod

import pytest

from wan_dist.config.schema import ParallelismConfig
from wan_dist.planning.degrees import AXES, balanced_ulysses, choose_degrees, given_degrees, wanted_ranks

SINGLE = dict.fromkeys(AXES, 1)


def choose(ranks: int, *, guided: bool = True, heads: int = 0, **given: int):
    return choose_degrees(ParallelismConfig(**given), ranks, guided=guided, source="runtime.ranks", heads=heads)


@pytest.mark.parametrize("ranks", range(1, 17))
def test_auto_takes_the_guidance_halves_first_then_the_sequence(ranks):
    degrees, refusals = choose(ranks)
    cfg = 2 if ranks % 2 == 0 else 1
    assert not refusals
    assert degrees == {**SINGLE, "cfg": cfg, "ulysses": ranks // cfg}


@pytest.mark.parametrize("ranks", range(1, 17))
def test_auto_without_guidance_is_all_sequence(ranks):
    degrees, refusals = choose(ranks, guided=False)
    assert not refusals
    assert degrees == {**SINGLE, "ulysses": ranks}


@pytest.mark.parametrize(
    ("ranks", "given", "wanted"),
    [
        (8, {"ulysses": 4}, {"cfg": 2, "ulysses": 4}),
        (4, {"ulysses": 4}, {"ulysses": 4}),
        (8, {"cfg": 1}, {"ulysses": 8}),
        (8, {"cfg": 2}, {"cfg": 2, "ulysses": 4}),
        (6, {"ulysses": 3}, {"cfg": 2, "ulysses": 3}),
        (8, {"ring": 2}, {"ring": 2, "cfg": 2, "ulysses": 2}),
        (2, {"cfg": 2, "ulysses": 1}, {"cfg": 2}),
        (8, {"ulysses": 2, "cfg": 1}, {"ulysses": 2, "ring": 4}),
        (12, {"ulysses": 4}, {"ulysses": 4, "ring": 3}),
        (16, {"ulysses": 4}, {"cfg": 2, "ulysses": 4, "ring": 2}),
        (8, {"tp": 2}, {"cfg": 2, "ulysses": 2, "tp": 2}),
        (8, {"tp": 2, "cfg": 1, "ulysses": 1}, {"ring": 4, "tp": 2}),
        (8, {"dp": 2, "ring": 1}, {"dp": 2, "cfg": 2, "ulysses": 2}),
    ],
)
def test_a_given_degree_is_an_order(ranks, given, wanted):
    degrees, refusals = choose(ranks, **given)
    assert not refusals
    assert degrees == {**SINGLE, **wanted}


@pytest.mark.parametrize("preset", [(1, 1), (2, 1), (1, 4), (2, 4), (2, 8)])
def test_presets_fill_exactly_their_own_world(preset):
    given = {**SINGLE, "cfg": preset[0], "ulysses": preset[1]}
    ranks = prod(preset)
    assert choose(ranks, guided=False, **given) == (given, [])
    for other in (ranks + 1, 2 * ranks, 3):
        if other != ranks:
            assert choose(other, **given)[1]


@pytest.mark.parametrize(
    ("ranks", "given"),
    [
        (3, {"cfg": 2}),
        (8, {"ulysses": 3}),
        (1, {"ulysses": 2}),
        (8, {"ulysses": 2, "cfg": 1, "ring": 1}),
        (8, {"tp": 16}),
        (2, SINGLE),
    ],
)
def test_a_world_of_another_size_is_refused_with_both_numbers(ranks, given):
    _, (refusal,) = choose(ranks, **given)
    assert refusal.key == "parallelism"
    assert f"a mesh of {prod(given.values())}" in refusal.why
    assert f"runtime.ranks is {ranks}" in refusal.why
    assert f"make the product of the degrees {ranks}" in refusal.remedy


def test_unguided_auto_fills_an_ordered_sequence_with_the_ring_not_with_guidance():
    assert choose(8, guided=False, ulysses=4) == ({**SINGLE, "ulysses": 4, "ring": 2}, [])


@pytest.mark.parametrize(
    ("ranks", "heads", "ulysses"),
    [
        (1, 12, 1), (2, 12, 2), (3, 12, 3), (4, 12, 4), (6, 12, 6), (8, 12, 4), (12, 12, 12), (24, 12, 12), (16, 12, 4),
        (5, 12, 1), (3, 40, 3), (6, 40, 6), (7, 40, 7), (8, 40, 8), (9, 40, 3), (16, 40, 8), (64, 40, 8), (20, 40, 20),
        (13, 40, 1), (3, 8, 1), (32, 8, 8), (5, 24, 5), (7, 24, 1), (9, 24, 3), (4, 1, 1), (97, 40, 1),
        (11, 40, 11), (5, 9, 5),  # 0.909 and exactly 0.9 of the work
    ],
)  # fmt: skip
def test_ulysses_goes_as_far_as_the_heads_divide_well(ranks, heads, ulysses):
    assert balanced_ulysses(ranks, heads) == ulysses
    degrees, refusals = choose(ranks, guided=False, heads=heads)
    assert not refusals
    assert degrees == {**SINGLE, "ulysses": ulysses, "ring": ranks // ulysses}


@pytest.mark.parametrize("heads", [1, 5, 8, 12, 24, 40])
def test_no_tenth_of_the_heads_work_is_idle(heads):
    for ranks in range(1, 65):
        ulysses = balanced_ulysses(ranks, heads)
        assert ranks % ulysses == 0
        assert 1 <= ulysses <= heads
        assert heads >= 0.9 * ulysses * -(-heads // ulysses)  # the busiest rank has that many heads


@pytest.mark.parametrize(
    ("ranks", "heads", "given", "wanted"),
    [
        (16, 12, {}, {"cfg": 2, "ulysses": 4, "ring": 2}),
        (8, 12, {"cfg": 1}, {"ulysses": 4, "ring": 2}),
        (8, 12, {"tp": 2, "cfg": 1}, {"ulysses": 2, "ring": 2, "tp": 2}),
        (8, 12, {"tp": 4, "cfg": 1}, {"ring": 2, "tp": 4}),
        (16, 40, {"tp": 8}, {"cfg": 2, "tp": 8}),
        (8, 12, {"ring": 1, "cfg": 1}, {"ulysses": 8}),
        (8, 12, {"ring": 2, "cfg": 1}, {"ring": 2, "ulysses": 4}),
        (8, 12, {"ulysses": 8}, {"ulysses": 8}),
    ],
)
def test_heads_decide_how_much_of_the_sequence_is_ulysses_and_orders_stay_orders(ranks, heads, given, wanted):
    assert choose(ranks, heads=heads, **given) == ({**SINGLE, **wanted}, [])


def test_given_degrees_are_those_that_are_not_null():
    assert given_degrees(ParallelismConfig()) == {}
    assert given_degrees(ParallelismConfig(cfg=2, tp=1)) == {"cfg": 2, "tp": 1}


@pytest.mark.parametrize(
    ("given", "world", "asked", "ranks"),
    [
        ({}, None, None, 5),
        ({}, None, 3, 3),
        ({}, 4, 3, 4),
        ({"cfg": 2, "ulysses": 4}, None, None, 8),
        ({"cfg": 2}, None, 4, 4),
        ({"cfg": 2}, 8, None, 8),
        (SINGLE, None, None, 1),
    ],
)
def test_wanted_ranks(given, world, asked, ranks):
    assert wanted_ranks(ParallelismConfig(**given), world=world, asked=asked, found=5) == ranks
