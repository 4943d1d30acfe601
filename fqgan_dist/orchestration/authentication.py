"""What Ray reads from the environment, and a token for a Ray that is started for one run.

Must not import ray, which reads its authentication mode when it is imported.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys

ADDRESS_VARIABLE = "RAY_ADDRESS"
MODE_VARIABLE = "RAY_AUTH_MODE"
TOKEN_VARIABLE = "RAY_AUTH_TOKEN"
TOKEN_PATH_VARIABLE = "RAY_AUTH_TOKEN_PATH"

logger = logging.getLogger(__name__)


def require_token() -> None:
    """Let the Ray that this process starts answer only to who has a token.

    Whoever reaches Ray's ports can run code, and they are open on all interfaces. An authentication
    mode that the user has set stays. Ray reads the mode once, when it is imported.
    """
    if MODE_VARIABLE in os.environ:
        return
    if "ray" in sys.modules:
        logger.warning(
            "ray was imported before this run: its ports here take requests without a token; "
            "set %s=token before",
            MODE_VARIABLE,
        )
        return
    os.environ[MODE_VARIABLE] = "token"
    if not {TOKEN_VARIABLE, TOKEN_PATH_VARIABLE} & os.environ.keys():
        os.environ[TOKEN_VARIABLE] = secrets.token_hex(32)
