from __future__ import annotations

import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

from fqgan_dist.errors import DataError, NumericsError
from fqgan_dist.evaluation.moments import (
    Moments,
    compute_moments,
    fold,
    fold_ordered,
    load_adm_statistics,
)


def draw_features(count: int = 500, width: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Far from zero, as ReLU features are: where raw second moments would lose digits.
    return torch.randn(count, width, generator=generator) * 2 + 30


def split(features: torch.Tensor, size: int = 64) -> list[tuple[int, Moments]]:
    return [(number, compute_moments(part)) for number, part in enumerate(features.split(size))]


def test_fold_equals_numpy_mean_and_covariance():
    features = draw_features()
    total = fold(split(features))
    values = features.double().numpy()
    assert total.count == 500
    np.testing.assert_allclose(total.mean, values.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(total.covariance, np.cov(values, rowvar=False), rtol=1e-10)


@given(seed=st.integers(0, 10**6), num_repeats=st.integers(0, 5))
def test_any_order_and_repeats_give_the_same_bits(seed: int, num_repeats: int):
    chunks = split(draw_features())
    expected = fold(chunks).to_bytes()
    shuffled = chunks + chunks[:num_repeats]
    random.Random(seed).shuffle(shuffled)
    assert fold(shuffled).to_bytes() == expected


def test_a_repeat_that_differs_in_its_last_bits_gives_the_same_bits_in_any_order():
    chunks = split(draw_features())
    kept = chunks[2][1]
    other = Moments(kept.count, kept.mean * (1 + 1e-12), kept.m2)
    first = fold([*chunks, (2, other)]).to_bytes()
    assert fold([(2, other), *reversed(chunks)]).to_bytes() == first


def test_streaming_fold_gives_the_same_bits():
    chunks = split(draw_features())
    streamed = fold_ordered(moments for _, moments in chunks)
    assert streamed.to_bytes() == fold(reversed(chunks)).to_bytes()


def test_a_missing_chunk_changes_the_result():
    chunks = split(draw_features())
    assert fold(chunks[1:]).to_bytes() != fold(chunks).to_bytes()


def test_second_moment_is_exactly_symmetric():
    moments = compute_moments(draw_features())
    np.testing.assert_array_equal(moments.m2, moments.m2.T)


def test_a_chunk_computed_twice_with_different_results_is_an_error():
    chunks = split(draw_features())
    with pytest.raises(NumericsError, match="chunk 1: computed twice"):
        fold([*chunks, (1, chunks[2][1])])
    with pytest.raises(NumericsError, match="chunk 0: computed twice"):
        fold([*chunks, (0, compute_moments(draw_features(63)))])


def test_bytes_round_trip():
    moments = compute_moments(draw_features())
    loaded = Moments.from_bytes(moments.to_bytes())
    assert loaded.count == moments.count
    np.testing.assert_array_equal(loaded.mean, moments.mean)
    np.testing.assert_array_equal(loaded.m2, moments.m2)


def test_damaged_bytes_are_refused():
    data = compute_moments(draw_features()).to_bytes()
    with pytest.raises(DataError, match="cannot be read"):
        Moments.from_bytes(data[:-8])
    with pytest.raises(DataError, match="cannot be read"):
        Moments.from_bytes(b"not moments")


def test_features_that_are_not_finite_are_refused():
    features = draw_features()
    features[3, 4] = float("nan")
    with pytest.raises(NumericsError, match="finite"):
        compute_moments(features)


def test_empty_input_is_refused():
    with pytest.raises(ValueError, match="n > 0"):
        compute_moments(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="no chunk"):
        fold([])
    with pytest.raises(ValueError, match="at least 2"):
        _ = compute_moments(torch.zeros(1, 4)).covariance


def test_chunks_of_different_width_are_refused():
    with pytest.raises(ValueError, match="widths 4 and 5"):
        fold([(0, compute_moments(torch.rand(3, 4))), (1, compute_moments(torch.rand(3, 5)))])


def load_reference(path: Path) -> tuple[Moments, int | None]:
    with path.open("rb") as file:
        return load_adm_statistics(file, name=path.name)


def test_adm_reference_gives_its_mean_and_covariance(tmp_path: Path):
    mean, covariance = np.arange(3.0), np.diag([1.0, 2.0, 3.0])
    np.savez(tmp_path / "reference.npz", mu=mean, sigma=covariance, arr_0=np.zeros((2, 4, 4, 3)))
    moments, count = load_reference(tmp_path / "reference.npz")
    assert count is None
    np.testing.assert_array_equal(moments.mean, mean)
    np.testing.assert_allclose(moments.covariance, covariance, rtol=1e-14)


def test_adm_reference_that_tells_its_count_keeps_it(tmp_path: Path):
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2), sigma=np.eye(2), count=50)
    moments, count = load_reference(tmp_path / "reference.npz")
    assert (moments.count, count) == (50, 50)
    np.testing.assert_allclose(moments.covariance, np.eye(2), rtol=1e-14)


@pytest.mark.parametrize("kind", ["text", "broken zip", "empty", "one array", "nan"])
def test_file_that_is_no_adm_reference_is_refused(tmp_path: Path, kind: str):
    path = tmp_path / "reference.npz"
    match kind:
        case "one array":
            with path.open("wb") as file:
                np.save(file, np.eye(2))
        case "nan":
            np.savez(path, mu=np.full(2, np.nan), sigma=np.eye(2))
        case _:
            path.write_bytes({"text": b"mu", "broken zip": b"PK\x03\x04", "empty": b""}[kind])
    with pytest.raises(DataError, match=r"reference\.npz: no ADM reference statistics"):
        load_reference(path)


def test_adm_reference_never_unpickles(tmp_path: Path):
    path = tmp_path / "hostile.npz"
    np.savez(path, mu=np.array([print], dtype=object), sigma=np.eye(1))
    with pytest.raises(DataError, match="no ADM reference statistics"):
        load_reference(path)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999999,), }", "cannot reshape"),
        ("{'descr': '<c16', 'fortran_order': False, 'shape': (4,), }", "complex128"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (", "EOF"),
        ("(" * 3000, ""),
    ],
)
def test_an_array_of_adm_that_lies_of_itself_is_refused(
    tmp_path: Path, header: str, reason: str
) -> None:
    text = header.encode() + b"\n"
    array = b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text + bytes(64)
    path = tmp_path / "reference.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mu.npy", array)
    with pytest.raises(DataError, match=f"no ADM reference statistics.*{reason}"):
        load_reference(path)


def test_moments_of_another_form_are_refused() -> None:
    data = safetensors.numpy.save(
        {"count": np.ones((1, 2), np.int64), "mean": np.zeros(2), "m2": np.eye(2)}
    )
    with pytest.raises(DataError, match="moments: cannot be read"):
        Moments.from_bytes(data)
