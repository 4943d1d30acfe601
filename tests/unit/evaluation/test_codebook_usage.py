from __future__ import annotations

import numpy as np
import pytest
import torch

from fqgan_dist.evaluation.codebook_usage import CodeHistogram


def draw_codes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 30, (count, 2, 4, 4), generator=generator)


def test_equals_numpy():
    codes = draw_codes(20)
    codes[:, 1] //= 3
    histogram = CodeHistogram(2, 50)
    histogram.update(codes)
    for k in range(2):
        values, counts = np.unique(codes[:, k].numpy(), return_counts=True)
        frequencies = counts / counts.sum()
        entropy = -(frequencies * np.log(frequencies)).sum()
        np.testing.assert_array_equal(histogram.counts[k].numpy()[values], counts)
        assert histogram.usage[k].item() == len(values) / 50
        assert histogram.unigram_entropy[k].item() == pytest.approx(entropy, rel=1e-12)
        assert histogram.perplexity[k].item() == pytest.approx(np.exp(entropy), rel=1e-12)


def test_parts_in_any_order_equal_one_pass():
    codes = draw_codes(20)
    whole, parts = CodeHistogram(2, 30), CodeHistogram(2, 30)
    whole.update(codes)
    for part in reversed(codes.split(7)):
        parts.update(part)
    assert torch.equal(parts.counts, whole.counts)


def test_one_code_has_perplexity_one_and_all_codes_have_v():
    histogram = CodeHistogram(2, 16)
    codes = torch.stack([torch.zeros(4, 4), torch.arange(16).reshape(4, 4)])[None].long()
    histogram.update(codes)
    np.testing.assert_allclose(histogram.perplexity.numpy(), [1.0, 16.0], rtol=1e-12)
    assert histogram.usage.tolist() == [1 / 16, 1.0]


def test_an_empty_batch_counts_nothing():
    histogram = CodeHistogram(2, 16)
    histogram.update(torch.zeros(0, 2, 4, 4, dtype=torch.int64))
    assert histogram.counts.sum() == 0
    with pytest.raises(ValueError, match="no code was counted"):
        _ = histogram.perplexity


def test_bad_codes_are_refused_and_change_nothing():
    histogram = CodeHistogram(2, 16)
    for codes, message in (
        (draw_codes(3), r"expected \[0, 16\)"),
        (torch.full((1, 2, 2, 2), -1), r"range \[-1, -1\]"),
        (torch.zeros(1, 3, 2, 2), r"expected \(B, 2, h, w\)"),
    ):
        with pytest.raises(ValueError, match=message):
            histogram.update(codes)
    assert histogram.counts.sum() == 0
