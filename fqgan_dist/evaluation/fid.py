"""Frechet distance of two sets of features, without a matrix square root."""

from __future__ import annotations

import numpy as np

from fqgan_dist.evaluation.moments import Array, Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """Compute |mean_a - mean_b|^2 + tr(A + B - 2 sqrt(A B)) with A, B the covariances.

    Also for fewer samples than dimensions (singular covariances).

    Raises:
        ValueError: the widths differ, or a side has fewer than two samples.
    Source: Heusel et al., arXiv 1706.08500, equation 6.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"moments: widths {a.mean.size} and {b.mean.size} - expected equal ones - use one "
            "evaluator for both sides"
        )
    # The side of smaller rank is factored: fewer eigenvalues, and none that are rounding noise.
    low, high = sorted((a, b), key=lambda moments: moments.count)
    difference = a.mean - b.mean
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    distance = difference @ difference + trace - 2 * _trace_root(low, high.covariance)
    # Rounding can leave equal sets at -1e-12; a distance is not negative.
    return max(0.0, float(distance))


def _trace_root(low: Moments, covariance: Array) -> float:
    # tr sqrt(A B) is the sum of the roots of the eigenvalues of A B. With A = R R^T these are the
    # eigenvalues of the symmetric R^T B R: no complex arithmetic, no `sqrtm` (which gives imaginary
    # parts and stalls on singular matrices), and a symmetric solve of the smaller rank.
    root = _factor(low)
    eigenvalues = np.linalg.eigvalsh(root.T @ covariance @ root)
    return float(np.sqrt(_drop_noise(eigenvalues)).sum())


def _factor(moments: Moments) -> Array:
    """Find R (d, rank) with R R^T = covariance."""
    covariance = moments.covariance
    if moments.count > moments.mean.size:
        try:
            # Half the time of the eigendecomposition below at d = 2048.
            return np.linalg.cholesky(covariance)
        except np.linalg.LinAlgError:
            pass  # Features that are constant (dead ReLUs): singular in spite of the count.
    eigenvalues, vectors = np.linalg.eigh(covariance)
    eigenvalues = _drop_noise(eigenvalues)
    kept = eigenvalues > 0
    return vectors[:, kept] * np.sqrt(eigenvalues[kept])


def _drop_noise(eigenvalues: Array) -> Array:
    # The root would magnify rounding noise of size eps to sqrt(eps), once for every null direction.
    if eigenvalues.size == 0:
        return eigenvalues
    noise = eigenvalues.size * np.finfo(np.float64).eps * np.abs(eigenvalues).max()
    return np.where(eigenvalues > noise, eigenvalues, 0.0)
