from __future__ import annotations

import pytest
import torch

from fqgan_dist.errors import CheckpointError
from fqgan_dist.training.named_tensors import copy_named_tensors


def test_every_target_gets_the_value_of_its_name() -> None:
    target = {"a": torch.zeros(2), "b": torch.zeros(3, dtype=torch.int64)}
    copy_named_tensors({"b": torch.arange(3), "a": torch.ones(2)}, target, what="test")
    assert target["a"].tolist() == [1, 1]
    assert target["b"].tolist() == [0, 1, 2]


def test_many_differences_are_named_up_to_five_and_counted() -> None:
    target = {f"t{index}": torch.zeros(1) for index in range(9)}
    with pytest.raises(CheckpointError, match=r"missing t4 and 4 more"):
        copy_named_tensors({}, target, what="test")


def test_nothing_is_copied_when_one_shape_differs() -> None:
    target = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"b is float32 \(1,\), expected float32 \(3,\)"):
        copy_named_tensors({"a": torch.ones(2), "b": torch.ones(1)}, target, what="test")
    assert target["a"].tolist() == [0, 0]
