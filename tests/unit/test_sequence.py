"""Splitting is torch's `tensor_split` in arithmetic; what is remembered goes by identity and version."""

import pytest
import torch

from wan_dist.layers.remember import Remembered
from wan_dist.layers.sequence import split_range, split_sizes


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7, 8, 16])
def test_split_equals_tensor_split(parts):
    for length in (0, 1, 2, 5, 7, 12, 40, 105, 32760, 33390):
        pieces = torch.arange(length).tensor_split(parts)
        assert split_sizes(length, parts) == [len(piece) for piece in pieces]
        for part, piece in enumerate(pieces):
            begin, end = split_range(length, parts, part)
            assert torch.equal(torch.arange(begin, end), piece)


@pytest.fixture
def counted():
    calls: list[torch.Tensor] = []

    def double(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor)
        return tensor * 2

    return double, calls


def test_the_same_tensor_is_computed_once(counted):
    double, calls = counted
    memory, x = Remembered(), torch.ones(3)
    assert memory(double, x) is memory(double, x)
    assert len(calls) == 1


def test_an_equal_tensor_is_another_one(counted):
    double, calls = counted
    memory, x = Remembered(), torch.ones(3)
    assert memory(double, x) is not memory(double, x.clone())
    assert memory(double, x) is not memory(double, x.view(3))
    assert len(calls) == 3


def test_several_are_remembered_at_once(counted):
    double, calls = counted
    memory, tensors = Remembered(), [torch.full((2,), float(n)) for n in range(3)]
    for _ in range(2):
        for n, tensor in enumerate(tensors):
            assert memory(double, tensor).tolist() == [2.0 * n] * 2
    assert len(calls) == 3


def test_a_change_in_place_is_seen(counted):
    double, calls = counted
    memory, x = Remembered(), torch.ones(3)
    memory(double, x)
    x.add_(1)
    assert memory(double, x).tolist() == [4.0] * 3
    assert len(calls) == 2


def test_clear_forgets_and_frees(counted):
    import weakref

    double, calls = counted
    memory, x = Remembered(), torch.ones(3)
    kept = weakref.ref(memory(double, x))
    calls.clear()
    assert kept() is not None
    memory.clear()
    assert kept() is None
    memory(double, x)
    assert len(calls) == 1


def test_a_dropped_argument_cannot_be_mistaken_for_a_new_tensor(counted):
    double, _ = counted
    memory = Remembered()
    for n in range(50):
        assert memory(double, torch.full((4,), float(n))).tolist() == [2.0 * n] * 4
