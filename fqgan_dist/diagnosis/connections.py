"""Whether anybody answers at an address, found out quickly.

Clients try again for a minute or more before they say so, and then not always clearly.
"""

from __future__ import annotations

import socket
import urllib.request
from urllib.parse import urlsplit

_TIMEOUT_S = 10.0
_DEFAULT_PORTS = {"http": 80, "https": 443}


def explain_silence(host: str, port: int) -> str | None:
    """Say why nobody answers at a port; None where somebody does."""
    try:
        socket.create_connection((host, port), timeout=_TIMEOUT_S).close()
    except OSError as error:
        return f"{host}:{port} does not answer ({error})"
    return None


def explain_silent_url(url: str) -> str | None:
    """Say why nobody answers at a URL's host; None where somebody does, or a proxy lies between."""
    parts = urlsplit(url)
    if parts.scheme in urllib.request.getproxies() or parts.hostname is None:
        return None
    return explain_silence(parts.hostname, parts.port or _DEFAULT_PORTS.get(parts.scheme, 443))
