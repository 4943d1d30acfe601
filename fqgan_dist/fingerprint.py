"""One name for everything that decides a result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Hash JSON-able values to 32 hexadecimal digits, the same for equal values in any order."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
