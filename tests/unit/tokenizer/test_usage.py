from __future__ import annotations

import torch

from fqgan_dist.tokenizer.usage import CodeUsageWindow


def test_empty_window_counts_no_code() -> None:
    assert CodeUsageWindow(2, 8, num_tokens=16).compute_usage().tolist() == [0.0, 0.0]


def test_usage_is_the_fraction_of_codes_seen_per_codebook() -> None:
    window = CodeUsageWindow(2, 8, num_tokens=16)
    window.update(torch.tensor([[0, 1, 1, 7], [3, 3, 3, 3]]))
    assert window.compute_usage().tolist() == [3 / 8, 1 / 8]


def test_oldest_codes_leave_the_window_first() -> None:
    window = CodeUsageWindow(1, 8, num_tokens=4)
    window.update(torch.tensor([[0, 1, 2, 3]]))
    window.update(torch.tensor([[4, 4]]))
    assert window.codes.tolist() == [[2, 3, 4, 4]]
    assert window.compute_usage().tolist() == [3 / 8]


def test_window_does_not_depend_on_how_the_codes_are_split() -> None:
    codes = torch.randint(0, 8, (3, 40), generator=torch.Generator().manual_seed(0))
    whole, split = (CodeUsageWindow(3, 8, num_tokens=16) for _ in range(2))
    whole.update(codes)
    for part in codes.split(7, dim=1):
        split.update(part)
    assert torch.equal(whole.codes, split.codes)
