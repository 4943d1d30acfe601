from __future__ import annotations

import torch

from fqgan_dist.autoregressive.config import SamplesConfig, SamplingConfig
from fqgan_dist.stages.samples import choose_labels

BALANCED = SamplesConfig(count=600, chunk_size=10, sampling=SamplingConfig())
RANDOM = BALANCED.model_copy(update={"labels": "random"})


def test_balanced_labels_take_every_class_in_turn() -> None:
    assert choose_labels(range(2, 8), BALANCED, 4).tolist() == [2, 3, 0, 1, 2, 3]


def test_a_random_label_depends_on_seed_and_id_alone() -> None:
    whole = choose_labels(range(600), RANDOM, 5)
    parts = [choose_labels(range(first, first + 7), RANDOM, 5) for first in range(0, 595, 7)]
    assert torch.equal(torch.cat(parts), whole[:595])
    other = RANDOM.model_copy(update={"seed": 1})
    assert not torch.equal(choose_labels(range(600), other, 5), whole)


def test_random_labels_are_uniform_but_not_balanced() -> None:
    counts = choose_labels(range(600), RANDOM, 5).bincount(minlength=5)
    # 120 each, with a standard deviation of 9.8: five of them.
    assert (counts - 120).abs().max() < 49
    assert counts.unique().numel() > 1


def test_labels_decide_the_samples() -> None:
    assert BALANCED.identity() != RANDOM.identity()
