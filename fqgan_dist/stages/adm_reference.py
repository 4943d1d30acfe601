"""ADM's reference file: published statistics that gFID may be measured against."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.evaluation.config import FEATURE_DIM
from fqgan_dist.evaluation.moments import load_adm_statistics
from fqgan_dist.evaluation.reference import ReferenceStatistics
from fqgan_dist.storage.hashing import HashedStream
from fqgan_dist.storage.storage import locate_file

FIELD = "evaluation.adm_reference"


# Once per process: every summary asks, and at the end of a training the file may be out of reach.
@functools.cache
def hash_adm_reference(source: str) -> str:
    """Hash the bytes of a reference file, which holds 2 GB of images too, block by block.

    Raises:
        ConfigError: there is no such file.
    """
    with _open(source) as file:
        return HashedStream(file).finish()[0]


def load_adm_reference(source: str, *, sha256: str, evaluator_id: str) -> ReferenceStatistics:
    """Read the statistics of a reference file of this sha256 as what gFID compares samples with.

    The network here is the one that made the file: `EvaluationConfig` refuses any other
    architecture, resolution, or random weights.

    Raises:
        ConfigError: there is no such file.
        DataError: it has no such statistics, or other content by now.
    """
    # The hash names the record, so what is read is hashed again.
    with _open(source) as file:
        if HashedStream(file).finish()[0] != sha256:
            raise DataError(
                f"{FIELD}: {source!r}: another file than when this process began; put the former "
                "one back, or start again"
            )
    with _open(source) as file:
        moments, count = load_adm_statistics(file, name=f"{FIELD}: {source!r}")
    if moments.mean.size != FEATURE_DIM:
        raise DataError(
            f"{FIELD}: {source!r}: statistics of {moments.mean.size} features; expected the "
            f"{FEATURE_DIM} of Inception's last pooling; use an ADM reference file"
        )
    return ReferenceStatistics(
        kind="gfid",
        reference_id=f"adm:{sha256}",
        evaluator_id=evaluator_id,
        moments=moments,
        is_count_known=count is not None,
    )


def describe_missing(source: str) -> str:
    """Say that there is no such file, and what to name instead."""
    return (
        f"{FIELD}: {source!r}: no such file; expected an .npz file (a path or s3:// URI) with 'mu' "
        "and 'sigma', or null for the training images' statistics"
    )


@contextmanager
def _open(source: str) -> Iterator[BinaryIO]:
    folder, name = locate_file(source)
    try:
        file = folder.open_read(name)
    except FileNotFoundError as error:
        raise ConfigError(describe_missing(source)) from error
    with file:
        yield file
