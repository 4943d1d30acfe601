"""Mean and covariance of features, in float64, summed over fixed chunks of samples.

A chunk is a fixed range of sample ids. Chunks are folded in chunk-id order and each counts once, so
the result has the same bits for any number of actors, any order of arrival and any restart.
"""

from __future__ import annotations

import io
import operator
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from tokenize import TokenError
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from fqgan_dist.errors import DataError, NumericsError

Array = NDArray[np.floating[Any]]

LEAST_FID_IMAGES = 2
"""Images that a covariance, and so each side of a FID, needs at least."""
REPEAT_TOLERANCE = 1e-3
"""Relative difference of means up to which a chunk computed twice counts as the same."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and centred second moment of feature vectors."""

    count: int
    """Number of vectors."""
    mean: Array
    """(d,)"""
    m2: Array
    """Sum of the outer products of deviations from the mean, (d, d)."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.m2.shape != (self.mean.size, self.mean.size):
            raise ValueError(
                f"moments: count {self.count}, mean {self.mean.shape}, m2 {self.m2.shape} - "
                "expected a positive count, (d,) and (d, d)"
            )

    @property
    def covariance(self) -> Array:
        """Unbiased covariance (d, d), as `np.cov`.

        Raises:
            ValueError: there are fewer than two samples.
        """
        if self.count < LEAST_FID_IMAGES:
            raise ValueError(
                f"covariance: 1 sample - expected at least {LEAST_FID_IMAGES} - evaluate more "
                "samples"
            )
        return self.m2 / (self.count - 1)

    def to_bytes(self) -> bytes:
        """Serialise; equal moments give equal bytes."""
        return safetensors.numpy.save(
            {"count": np.array([self.count], np.int64), "mean": self.mean, "m2": self.m2}
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Moments:
        """Read what `to_bytes` wrote.

        Raises:
            DataError: the bytes are something else.
        """
        try:
            parts = safetensors.numpy.load(data)
            moments = cls(int(parts["count"][0]), parts["mean"], parts["m2"])
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            raise DataError(f"moments: cannot be read ({error}) - compute them again") from error
        if not moments.mean.dtype == moments.m2.dtype == np.float64:
            raise DataError(f"moments: stored as {moments.m2.dtype} - expected float64")
        return moments


def compute_moments(features: Tensor) -> Moments:
    """Compute the moments of one chunk of features, (n, d).

    Raises:
        ValueError: there is no sample, or the shape is not (n, d).
        NumericsError: a feature is not finite.
    """
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"features: shape {tuple(features.shape)} - expected (n, d) with n > 0")
    # In float64: a covariance summed in float32 is wrong in its small eigenvalues, whose roots the
    # distance adds up. On the CPU: a GPU's sums differ by its kind.
    values = features.detach().cpu().double().numpy()
    if not np.isfinite(values).all():
        raise NumericsError(
            "features: not all are finite - expected finite Inception features - look at the images"
        )
    mean = values.mean(axis=0)
    # Centred first: a mean of squares less a squared mean would lose the digits that they share.
    deviations = values - mean
    return Moments(len(values), mean, deviations.T @ deviations)


def fold(chunks: Iterable[tuple[int, Moments]]) -> Moments:
    """Sum chunks in chunk-id order, each id once; any order of arrival gives the same bits.

    Raises:
        ValueError: there is no chunk.
        NumericsError: a chunk was computed twice with different results.
    """
    by_id: dict[int, Moments] = {}
    for chunk_id, moments in chunks:
        kept = by_id.get(chunk_id)
        by_id[chunk_id] = moments if kept is None else _choose(chunk_id, kept, moments)
    # Floating-point sums depend on their order: only this one is the same whoever finished first.
    return fold_ordered(by_id[chunk_id] for chunk_id in sorted(by_id))


def fold_ordered(chunks: Iterable[Moments]) -> Moments:
    """Sum distinct chunks that come in chunk-id order.

    Holds two at a time (33.6 MB each at d = 2048), so that chunks can be read one by one.

    Raises:
        ValueError: there is no chunk, or their widths differ.
    """
    total: Moments | None = None
    for moments in chunks:
        total = moments if total is None else _merge(total, moments)
    if total is None:
        raise ValueError("fold: no chunk - expected at least one - was nothing evaluated?")
    return total


def load_adm_statistics(file: BinaryIO, *, name: str) -> tuple[Moments, int | None]:
    """Read the statistics `mu` and `sigma` of an ADM reference file (.npz).

    ADM's own files do not say how many images these are of (`arr_0` is a part of them only); one of
    another maker may, as an integer `count`.

    Args:
        file: can seek; only the statistics are read of it.
        name: what messages call it.

    Returns:
        The moments, and the number of images. Where this is None the moments have the count of
        ImageNet's training set, which cancels out of every FID.

    Raises:
        DataError: the file holds pickled objects, or has no such statistics.
    Source: openai/guided-diffusion, evaluations; VIRTUAL_imagenet256_labeled.npz.
    """
    try:
        with ZipFile(file) as archive:
            mean = _read_array(archive, "mu").astype(np.float64)
            covariance = _read_array(archive, "sigma").astype(np.float64)
            has_count = _member_name("count") in archive.namelist()
            known = operator.index(_read_array(archive, "count")[()]) if has_count else None
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("not all values are finite")
        count = _IMAGENET_TRAIN_IMAGES if known is None else known
        return Moments(count, mean, covariance * (count - 1)), known
    except _ARCHIVE_ERRORS as error:
        raise DataError(
            f"{name}: no ADM reference statistics ({error}) - expected arrays 'mu' (d,) and "
            "'sigma' (d, d) - use an ADM reference file such as VIRTUAL_imagenet256_labeled.npz"
        ) from error


_IMAGENET_TRAIN_IMAGES = 1_281_167
_MAX_ARRAY_BYTES = 2**28  # `sigma` of Inception's 2048 features has 33 MB
# What Python's reader of zips (encrypted, compressed otherwise, damaged) and NumPy's of headers,
# which are literals of Python, raise.
_ARCHIVE_ERRORS = (
    OSError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    SyntaxError,
    RuntimeError,
    MemoryError,
    OverflowError,
    BadZipFile,
    TokenError,
    struct.error,
    zlib.error,
)


def _member_name(array: str) -> str:
    return f"{array}.npy"


def _read_array(archive: ZipFile, name: str) -> NDArray[Any]:
    """Read an array of numbers of an `.npz`, whose header may claim to be of any size.

    Raises:
        ValueError: it holds something else, or has not the bytes that its header says.
    """
    member = archive.getinfo(_member_name(name))
    if member.file_size > _MAX_ARRAY_BYTES:
        raise ValueError(f"{name}: {member.file_size} bytes; at most {_MAX_ARRAY_BYTES} are read")
    stream = io.BytesIO(archive.read(member))
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    if dtype.kind not in "iuf":
        raise ValueError(f"{name}: {dtype}; expected numbers")
    values = np.frombuffer(stream.read(), dtype)
    return values.reshape(shape, order="F" if is_fortran else "C")


def _merge(a: Moments, b: Moments) -> Moments:
    """Chan, Golub and LeVeque's pairwise update."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"fold: widths {a.mean.size} and {b.mean.size} - expected equal ones")
    count = a.count + b.count
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    m2 = a.m2 + b.m2 + np.outer(delta, delta) * (a.count * b.count / count)
    return Moments(count, mean, m2)


def _choose(chunk_id: int, a: Moments, b: Moments) -> Moments:
    # A repeated chunk may differ in its last bits when another kind of GPU computed it: the choice
    # must not depend on which came first.
    scale = max(np.abs(a.mean).max(), np.abs(b.mean).max())
    same = a.count == b.count and a.mean.shape == b.mean.shape
    if not same or np.abs(a.mean - b.mean).max() > REPEAT_TOLERANCE * scale:
        raise NumericsError(
            f"chunk {chunk_id}: computed twice with different results ({a.count} and {b.count} "
            "samples) - expected equal ones - were weights or samples changed between attempts?"
        )
    return min(a, b, key=Moments.to_bytes)
