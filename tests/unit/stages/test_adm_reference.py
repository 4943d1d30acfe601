from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from fqgan_dist.config import load_config
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.stages.adm_reference import hash_adm_reference, load_adm_reference
from fqgan_dist.stages.config import RunConfig

TINY = Path(__file__).parents[2] / "support" / "tiny.yaml"
PUBLISHED = "evaluation.inception={resolution: 299, weights: {source: hub}}"


def write_reference(path: Path, width: int = 2048) -> None:
    np.savez(path, mu=np.arange(float(width)), sigma=np.eye(width))


def test_reference_is_named_by_its_bytes_and_its_count_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    write_reference(path)
    sha256 = hash_adm_reference(str(path))
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    reference = load_adm_reference(str(path), sha256=sha256, evaluator_id="inception")
    assert (reference.kind, reference.reference_id) == ("gfid", f"adm:{sha256}")
    assert not reference.is_count_known
    assert reference.moments.mean[7] == 7


def test_statistics_of_another_network_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "clip.npz")
    write_reference(tmp_path / "clip.npz", width=8)
    with pytest.raises(DataError, match="statistics of 8 features; expected the 2048"):
        load_adm_reference(path, sha256=hash_adm_reference(path), evaluator_id="")


def test_a_file_that_was_replaced_since_it_was_hashed_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "reference.npz")
    write_reference(tmp_path / "reference.npz")
    sha256 = hash_adm_reference(path)
    (tmp_path / "reference.npz").write_bytes(b"other statistics")
    assert hash_adm_reference(path) == sha256  # a summary asks nobody again
    with pytest.raises(DataError, match="another file than when this process began"):
        load_adm_reference(path, sha256=sha256, evaluator_id="")


def test_missing_file_is_named_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.adm_reference: .* no such file"):
        hash_adm_reference(str(tmp_path / "absent.npz"))


@pytest.mark.parametrize(
    "inception",
    ["{resolution: 299, weights: {source: random}}", "{resolution: 75, weights: {source: hub}}"],
)
def test_another_evaluator_than_the_one_that_made_it_is_refused(inception: str) -> None:
    overrides = ["evaluation.adm_reference=a.npz", f"evaluation.inception={inception}"]
    with pytest.raises(ConfigError, match="was made by the published Inception network"):
        load_config(TINY, overrides, RunConfig)
    assert load_config(TINY, [overrides[0], PUBLISHED], RunConfig).evaluation.adm_reference
