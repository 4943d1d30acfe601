from __future__ import annotations

import pytest
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full

from fqgan_dist.evaluation import precision_recall
from fqgan_dist.evaluation.precision_recall import PrecisionRecall, compute_precision_recall


def draw(count: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 16, generator=generator, dtype=torch.float64) * scale + shift


def compare_slowly(
    reference: torch.Tensor, samples: torch.Tensor, num_neighbours: int
) -> PrecisionRecall:
    def covered(points: torch.Tensor, centres: torch.Tensor) -> float:
        radii = [
            sorted((centre - other).norm().item() for other in centres)[num_neighbours]
            for centre in centres
        ]
        inside = [
            any(
                (point - centre).norm().item() <= radius
                for centre, radius in zip(centres, radii, strict=True)
            )
            for point in points
        ]
        return sum(inside) / len(inside)

    return PrecisionRecall(covered(samples, reference), covered(reference, samples))


@pytest.mark.parametrize("num_neighbours", [1, 2, 3])
def test_equals_the_slow_definition(num_neighbours: int):
    reference, samples = draw(40, 0), draw(50, 1, scale=0.9, shift=0.3)
    expected = compare_slowly(reference, samples, num_neighbours)
    assert compute_precision_recall(reference, samples, num_neighbours=num_neighbours) == expected
    assert 0 < expected.precision < 1
    assert 0 < expected.recall < 1


def test_equals_torch_fidelity():
    reference, samples = draw(300, 0), draw(200, 1, scale=0.9, shift=0.2)
    # The library takes the samples first.
    expected = calculate_precision_recall_full(samples, reference)
    score = compute_precision_recall(reference, samples)
    assert (score.precision, score.recall) == pytest.approx(expected)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch):
    reference, samples = draw(70, 0), draw(90, 1, shift=0.3)
    whole = compute_precision_recall(reference, samples)
    monkeypatch.setattr(precision_recall, "_BLOCK_BYTES", 7 * 8 * 90)
    assert compute_precision_recall(reference, samples) == whole


def test_a_far_origin_does_not_change_the_result():
    reference, samples = draw(70, 0), draw(90, 1, shift=0.3)
    assert compute_precision_recall(reference + 1e6, samples + 1e6) == compute_precision_recall(
        reference, samples
    )


def test_samples_of_one_mode_have_precision_without_recall():
    reference = torch.cat([draw(60, 0), draw(60, 1, shift=100.0)])
    score = compute_precision_recall(reference, draw(60, 2, scale=0.1))
    assert score.precision == 1.0
    assert score.recall < 0.5


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="more than"):
        compute_precision_recall(draw(3, 0), draw(50, 1))
    with pytest.raises(ValueError, match="expected \\(n, d\\)"):
        compute_precision_recall(draw(9, 0), draw(9, 1)[:, :4])
