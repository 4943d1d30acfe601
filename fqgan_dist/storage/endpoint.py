"""The address of the S3 server, where the environment names one."""

from __future__ import annotations

import os

ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
"""Variables that name it; the first that is set counts, as in AWS's tools."""


def find_endpoint() -> tuple[str, str] | None:
    """Return the variable that names the server, and its value; None: AWS itself."""
    for name in ENDPOINT_VARIABLES:
        if value := os.environ.get(name):
            return name, value
    return None


def endpoint_variable() -> str:
    """The variable to correct where a server does not answer."""
    found = find_endpoint()
    return found[0] if found else ENDPOINT_VARIABLES[-1]
