from __future__ import annotations

import pytest
import torch
from torch import nn

from fqgan_dist.errors import DataError
from fqgan_dist.weights.tensors import draw_normal, hash_tensors, load_into


def test_load_into_names_every_difference():
    network = nn.Linear(3, 2)
    tensors = {"weight": torch.zeros(3, 2), "extra": torch.zeros(1)}
    with pytest.raises(
        DataError,
        match=r"x\.safetensors: .*missing \(bias\).*unknown \(extra\).*weight is \(3, 2\)",
    ):
        load_into(network, tensors, source="x.safetensors")


def test_load_into_copies():
    network = nn.Linear(3, 2)
    load_into(network, {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, source="x")
    assert torch.equal(network.weight, torch.ones(2, 3))


def test_hash_covers_names_values_shapes_and_types():
    base = {"a": torch.arange(4.0)}
    others = [
        {"b": torch.arange(4.0)},
        {"a": torch.arange(4.0) + 1e-6},
        {"a": torch.arange(4.0).reshape(2, 2)},
        {"a": torch.arange(4.0).double()},
    ]
    hashes = {hash_tensors(tensors) for tensors in [base, *others]}
    assert len(hashes) == 5
    assert hash_tensors({"a": torch.arange(8.0)[::2] / 2}) == hash_tensors(base)


def test_drawn_numbers_are_normal_and_keyed():
    numbers = draw_normal((100, 200), 0, "a")
    assert torch.equal(numbers, draw_normal((100, 200), 0, "a"))
    assert not torch.equal(numbers, draw_normal((100, 200), 1, "a"))
    assert abs(numbers.mean().item()) < 0.03
    assert abs(numbers.std().item() - 1) < 0.03


def test_an_only_element_of_any_stride_has_the_same_hash() -> None:
    odd = torch.arange(9).as_strided((1,), (7,), 3)
    assert hash_tensors({"a": odd}) == hash_tensors({"a": torch.tensor([3])})
