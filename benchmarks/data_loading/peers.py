"""What belongs to the peers: whether they are installed, and datasets in their own formats."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

PEER_PACKAGES = ("webdataset", "mosaicml-streaming", "litdata")
MODULES = {"webdataset": "webdataset", "streaming": "streaming", "litdata": "litdata"}
HOW_TO_INSTALL = (
    "not installed: pip install --no-deps --target DIR -r benchmarks/peers.txt, and run with "
    "PYTHONPATH=DIR"
)
_CHUNK_BYTES = 2**26
"""Size of a peer's shards, the default of both."""


def is_installed(peer: str) -> bool:
    """Tell whether a peer can be imported."""
    return importlib.util.find_spec(MODULES[peer]) is not None


def write_mds(files: Sequence[tuple[Path, int]], folder: Path) -> None:
    """Write a dataset of MosaicML streaming.

    Args:
        files: images and their labels.
        folder: new folder.
    """
    streaming = importlib.import_module("streaming")
    columns = {"image": "bytes", "label": "int"}
    with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=_CHUNK_BYTES) as writer:
        for path, label in files:
            writer.write({"image": path.read_bytes(), "label": label})


def write_litdata(files: Sequence[tuple[Path, int]], folder: Path) -> None:
    """Write a dataset of litData.

    Args:
        files: images and their labels.
        folder: new folder.
    """
    litdata = importlib.import_module("litdata")
    # Otherwise it works, whoever else does, in /tmp/chunks and /tmp/data.
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = f"{folder}-chunks"
    os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = f"{folder}-data"
    litdata.optimize(
        _read_sample,
        list(files),
        str(folder),
        chunk_bytes=_CHUNK_BYTES,
        num_workers=1,
        verbose=False,
    )


def _read_sample(file: tuple[Path, int]) -> dict[str, object]:
    path, label = file
    return {"image": path.read_bytes(), "label": label}
