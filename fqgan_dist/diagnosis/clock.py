"""This node's clock against the S3 server's."""

from __future__ import annotations

import os
import ssl
import time
import urllib.error
import urllib.request
from email.message import Message
from email.utils import parsedate_to_datetime

from fqgan_dist.diagnosis.verdict import Verdict, judge, warning
from fqgan_dist.storage.endpoint import endpoint_variable, find_endpoint

SERVER_CLOCK = "clock"
_REQUEST_TIMEOUT_S = 10.0
_AWS_ENDPOINT = "https://s3.amazonaws.com"
# Resolution of an HTTP Date.
_DATE_STEP_S = 1.0
# S3 refuses requests whose time differs by more (RequestTimeTooSkewed).
_REFUSED_SKEW_S = 900.0
_LARGE_SKEW_S = 5.0


def check_server_clock() -> Verdict:
    """Compare this node's clock with the Date of the S3 server's answers."""
    _, endpoint = find_endpoint() or ("", _AWS_ENDPOINT)
    before = time.time()
    try:
        date = _read_headers(endpoint)["Date"]
    except OSError as error:
        return warning(
            SERVER_CLOCK,
            f"not compared: {endpoint} does not answer ({error})",
            f"correct {endpoint_variable()}, or the network",
        )
    after = time.time()
    if date is None:
        return warning(
            SERVER_CLOCK, f"not compared: {endpoint} sends no Date", "compare it by hand (date -u)"
        )
    # The server cut off the fraction of its second: on average half a step.
    server = parsedate_to_datetime(date).timestamp() + _DATE_STEP_S / 2
    uncertainty_s = (after - before + _DATE_STEP_S) / 2
    return judge_skew(
        SERVER_CLOCK,
        (before + after) / 2 - server,
        uncertainty_s=uncertainty_s,
        other="the S3 server",
        refused_s=_REFUSED_SKEW_S,
        large_s=_LARGE_SKEW_S,
    )


def judge_skew(
    check: str,
    skew_s: float,
    *,
    uncertainty_s: float,
    other: str,
    refused_s: float,
    large_s: float,
) -> Verdict:
    """Judge this clock minus another one, `skew_s`, which may be wrong by `uncertainty_s`.

    From `large_s` on it is worth a warning, from `refused_s` on a run fails.
    """
    least_s = max(0.0, abs(skew_s) - uncertainty_s)
    direction = "ahead of" if skew_s > 0 else "behind"
    if least_s == 0:
        finding = f"agrees with {other} (to {uncertainty_s:.1f} s)"
    else:
        finding = f"{abs(skew_s):.1f} s {direction} {other} (+- {uncertainty_s:.1f} s)"
    advice = ["set the clock: switch NTP on (timedatectl set-ntp true, or chrony)"]
    return judge(
        check,
        finding,
        failures=advice if least_s > refused_s else [],
        warnings=advice if large_s < least_s <= refused_s else [],
    )


def _read_headers(endpoint: str) -> Message:
    # Without credentials: a refusal has a Date too.
    context = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE"))
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        with urllib.request.urlopen(
            request, timeout=_REQUEST_TIMEOUT_S, context=context
        ) as response:
            return response.headers
    except urllib.error.HTTPError as error:
        error.close()
        return error.headers
