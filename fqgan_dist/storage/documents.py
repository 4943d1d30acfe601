"""JSON that somebody else may have written, read with bounds of its size and depth.

Every document of a dataset, a checkpoint or a run is read through here (models by pydantic's own
parser, which is bounded alike): Python's reader recurses as deep as the brackets go.
"""

from __future__ import annotations

import json
from typing import Any

from fqgan_dist.storage.storage import Storage

MAX_DOCUMENT_BYTES = 2**28
"""Largest JSON file; the index of 100,000 shards has 30 MB."""

_MAX_DEPTH = 100


def read_document(storage: Storage, path: str) -> bytes:
    """Read the bytes of a JSON document.

    Raises:
        FileNotFoundError: there is none.
        RefusedObjectError: it is longer than any document of ours, or not to be read, see `links`.
    """
    return storage.read_limited(path, MAX_DOCUMENT_BYTES)


def parse_json(data: bytes | str) -> Any:
    """Parse a JSON text of bounded depth; NaN is taken, as tables write it for a missing label.

    Raises:
        ValueError: it is not JSON, nested too deeply, or holds half of a surrogate pair.
    """
    text = data if isinstance(data, str) else data.decode()
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if _is_deeper(value, _MAX_DEPTH):
        raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
    if "\\u" in text:
        # Nothing of ours could write it again, neither to a file nor to a terminal.
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth + 1):
        inner = [each for each in level if isinstance(each, dict | list)]
        if not inner:
            return False
        level = [
            part for each in inner for part in (each.values() if isinstance(each, dict) else each)
        ]
    return True
