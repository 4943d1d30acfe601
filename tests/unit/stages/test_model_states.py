"""ZeRO's arithmetic (arXiv 1910.02054, figure 1), all in fp32: 16 bytes per parameter."""

from __future__ import annotations

import pytest

from fqgan_dist.stages.model_states import compute_state_sizes

NUM = 1000


@pytest.mark.parametrize(
    ("zero_stage", "expected"),
    [
        (None, 16 * NUM),
        (0, 16 * NUM),
        # With N ranks: 12/N of the 16 bytes and of a copy, then also the gradients' 4 ...
        (1, (8 + 12 // 4) * NUM),
        (2, (4 + 16 // 4) * NUM),
        # ... then the parameters', which are gathered for passes.
        (3, (20 // 4 + 4) * NUM),
    ],
)
def test_what_a_stage_shares_is_divided_by_the_ranks(zero_stage: int | None, expected: int) -> None:
    assert compute_state_sizes(NUM, zero_stage=zero_stage, ranks=4).total == expected


@pytest.mark.parametrize(("zero_stage", "expected"), [(None, 4), (2, 4), (3, 1)])
def test_averages_are_shared_where_parameters_are(zero_stage: int | None, expected: int) -> None:
    sizes = compute_state_sizes(NUM, zero_stage=zero_stage, ranks=4, averaged=NUM)
    assert sizes.ema == expected * NUM


def test_zero_3_gathers_a_billion_parameters_at_most() -> None:
    large = compute_state_sizes(3 * 10**9, zero_stage=3, ranks=64)
    assert large.gathered_parameters == 4 * 10**9
