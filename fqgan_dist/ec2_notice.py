"""The two minutes' notice that EC2 gives a spot instance, asked of its metadata service (IMDSv2).

A token comes first (a PUT), then `latest/meta-data/spot/instance-action`, which is 404 until the
instance is taken back. A recommendation to rebalance is not asked for: it has no time, stays for
hours, and acting on it would give up a node that may live on.
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
"""

from __future__ import annotations

import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fqgan_dist.notice import Notice

ENDPOINT_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
"""As in Amazon's own programs: another address of the service. That it is set counts as EC2."""
DISABLED_VARIABLE = "AWS_EC2_METADATA_DISABLED"
"""As in Amazon's own programs: `true`, and nothing is asked."""

_ENDPOINT = "http://169.254.169.254"
_TOKEN_LIFE_S = 21600
_TIMEOUT_S = 2.0
_ACTIONS = ("terminate", "stop", "hibernate")
# Of one that is away this many times in turn it is said, once.
_FAILURES_WORTH_A_WORD = 3
_LONGEST_ANSWER = 4096
# What the firmware of Nitro and of Xen instances says; no network is touched elsewhere.
_SIGNS = (
    (Path("/sys/devices/virtual/dmi/id/sys_vendor"), "amazon ec2"),
    (Path("/sys/devices/virtual/dmi/id/product_uuid"), "ec2"),
    (Path("/sys/hypervisor/uuid"), "ec2"),
)

logger = logging.getLogger(__name__)


def is_on_ec2(
    environment: Mapping[str, str] = os.environ,
    signs: tuple[tuple[Path, str], ...] = _SIGNS,
) -> bool:
    """Whether this machine is an instance of EC2; reads two small files at most."""
    if environment.get(DISABLED_VARIABLE, "").lower() == "true":
        return False
    return bool(environment.get(ENDPOINT_VARIABLE)) or any(
        _read(path).startswith(sign) for path, sign in signs
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip().lower()
    except OSError:
        return ""


class Ec2Notice:
    """Asks the metadata service of this instance; see `notice.NoticeSource`."""

    interval_s = 5.0
    """As Amazon recommends."""

    def __init__(self, endpoint: str | None = None) -> None:
        """Name the service; None takes the environment's, then Amazon's."""
        address = endpoint or os.environ.get(ENDPOINT_VARIABLE) or _ENDPOINT
        self._endpoint = address.rstrip("/")
        self._token: str | None = None
        self._num_failures = 0
        # A proxy of the environment does not lead to this machine's own service.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def look(self) -> Notice | None:
        """Ask once; an answer that is none counts as no notice."""
        try:
            text = self._ask()
            notice = None if text is None else _read_notice(text)
        # ValueError: an answer, or an address, that is none.
        except (OSError, ValueError) as error:
            self._note_failure(error)
            return None
        self._num_failures = 0
        return notice

    def _ask(self) -> str | None:
        """Give the text of the notice, None if there is none."""
        for has_fresh_token in (self._token is None, True):
            if self._token is None:
                self._token = self._request(
                    "latest/api/token",
                    "PUT",
                    {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_LIFE_S)},
                )
            try:
                return self._request(
                    "latest/meta-data/spot/instance-action",
                    "GET",
                    {"X-aws-ec2-metadata-token": self._token},
                )
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                if error.code != 401 or has_fresh_token:
                    raise
                self._token = None  # it has expired
        raise AssertionError("a fresh token is the last")

    def _request(self, path: str, method: str, headers: dict[str, str]) -> str:
        request = urllib.request.Request(f"{self._endpoint}/{path}", method=method, headers=headers)
        try:
            with self._opener.open(request, timeout=_TIMEOUT_S) as answer:
                return answer.read(_LONGEST_ANSWER).decode("utf-8", errors="replace")
        except urllib.error.HTTPError as error:
            error.close()
            raise

    def _note_failure(self, error: Exception) -> None:
        self._token = None
        self._num_failures += 1
        if self._num_failures == _FAILURES_WORTH_A_WORD:
            logger.warning(
                "the metadata service of EC2 does not answer (%s): a spot instance that is taken "
                "back will give no notice; in a container it takes HttpPutResponseHopLimit: 2",
                error,
            )


def _read_notice(text: str) -> Notice:
    content: Any = json.loads(text)
    action = content.get("action") if isinstance(content, dict) else None
    if action not in _ACTIONS:
        raise ValueError(f"instance-action: {text[:100]!r}")
    return Notice(f"EC2 takes the instance back ({action})", _read_time(content.get("time")))


def _read_time(value: object) -> float | None:
    """Read `2026-09-18T08:22:00Z`; None where it is no time."""
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
