from __future__ import annotations

import json

import pytest
import torch

from fqgan_dist.diagnosis.collectives import (
    SIZE_BYTES,
    check_collectives,
    judge_all_reduce,
    run_ranks,
)
from fqgan_dist.diagnosis.programs import Finished


def answer(seconds: float, library: str = "nccl 2.30.7") -> Finished:
    text = json.dumps({"seconds": seconds, "library": library})
    return Finished(0, f"a library's greeting\n{text}\n", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_two_processes_add_their_numbers() -> None:
    verdict = check_collectives()
    assert verdict.status == "ok", verdict
    assert verdict.finding.startswith("gloo: all-reduce of 2 ranks is right, ")


def test_a_rank_that_fails_is_named_with_its_reason() -> None:
    (finished,) = run_ranks("gloo", [0], 1, "nonsense://")
    verdict = judge_all_reduce("x", "gloo", [answer(1.0), finished])
    assert verdict.status == "failed"
    assert "gloo all-reduce of 2 ranks: rank 1: " in verdict.finding
    assert "nonsense" in verdict.finding
    assert "GLOO_SOCKET_IFNAME" in verdict.advice


def test_bandwidth_counts_what_each_rank_sends() -> None:
    verdict = judge_all_reduce("x", "nccl", [answer(0.002)] * 8)
    expected = 2 * 7 / 8 * SIZE_BYTES["nccl"] / 0.002 / 1e9
    assert verdict.status == "ok"
    assert verdict.finding == (f"nccl 2.30.7: all-reduce of 8 ranks is right, {expected:.1f} GB/s")


def test_a_slow_nccl_is_a_warning() -> None:
    verdict = judge_all_reduce("x", "nccl", [answer(0.5)] * 2)
    assert verdict.status == "warning"
    assert "NCCL_DEBUG" in verdict.advice


def test_a_single_gpu_has_no_speed() -> None:
    verdict = judge_all_reduce("x", "nccl", [answer(0.00001)])
    assert verdict.status == "ok"
    assert "nothing moved" in verdict.finding
