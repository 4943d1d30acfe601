from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fqgan_dist.errors import DataError
from fqgan_dist.evaluation.fid import frechet_distance
from fqgan_dist.evaluation.moments import Moments, compute_moments
from fqgan_dist.evaluation.reference import FidKind, ReferenceStatistics, compute_fid


def draw_moments(seed: int) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    return compute_moments(torch.randn(50 + seed, 4, generator=generator))


def make_reference(kind: FidKind = "rfid") -> ReferenceStatistics:
    return ReferenceStatistics(
        kind=kind,
        reference_id="0a1b/center",
        evaluator_id="inception/75px",
        moments=draw_moments(0),
    )


def test_score_carries_what_it_depends_on():
    score = compute_fid(
        draw_moments(1), make_reference(), kind="rfid", evaluator_id="inception/75px"
    )
    assert score.value == frechet_distance(draw_moments(1), draw_moments(0))
    assert (score.num_samples, score.num_reference_samples) == (51, 50)
    assert (score.reference_id, score.evaluator_id) == ("0a1b/center", "inception/75px")


def test_reference_of_the_other_fid_is_refused():
    with pytest.raises(DataError, match="is for rfid - expected one for gfid"):
        compute_fid(draw_moments(1), make_reference(), kind="gfid", evaluator_id="inception/75px")


def test_reference_of_another_evaluator_is_refused():
    with pytest.raises(DataError, match="computed by 'inception/75px'"):
        compute_fid(draw_moments(1), make_reference(), kind="rfid", evaluator_id="inception/299px")


def test_count_of_a_reference_that_does_not_tell_it_is_unknown():
    reference = dataclasses.replace(make_reference("gfid"), is_count_known=False)
    stored = ReferenceStatistics.from_bytes(reference.to_bytes())
    score = compute_fid(draw_moments(1), stored, kind="gfid", evaluator_id="inception/75px")
    assert score.num_reference_samples is None
    assert score.value == frechet_distance(draw_moments(1), draw_moments(0))


def test_bytes_round_trip():
    reference = make_reference("gfid")
    loaded = ReferenceStatistics.from_bytes(reference.to_bytes())
    assert (loaded.kind, loaded.reference_id) == ("gfid", "0a1b/center")
    assert loaded.evaluator_id == "inception/75px"
    np.testing.assert_array_equal(loaded.moments.m2, reference.moments.m2)


@pytest.mark.parametrize("data", [b"", b"{}\n", b"[]\n", b'{"kind": "fid"}\n', b"\xff\n"])
def test_damaged_bytes_are_refused(data: bytes):
    with pytest.raises(DataError, match="reference statistics: cannot be read"):
        ReferenceStatistics.from_bytes(data)
