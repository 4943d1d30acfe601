"""Submit a run to a Ray cluster and bring it to its end, whatever happens to the head.

    cluster/submit run=NAME [address=http://HOST:8265] [working_dir=DIR] [env=NAME,NAME]
                   [max_losses=20] [head_wait_s=3600] [poll_s=15] -- fqgan run CONFIG key=value ...

Ray does not retry jobs. A run does not need more than the same command again (its state is in its
storage root), so this submits it again when the job was lost: its head went away, or its driver was
killed. A job that failed by itself (exit code 1 to 127 of the command) is not retried. While the
head is away, this waits for it. Submissions are numbered under the run's name and its command, so
a second call of this program joins the job of the first instead of starting another.

    run           names the submissions, NAME-xxxxxxxx-1, -2 ...; letters, digits, `.`, `_`, `-`
    address       of the head's dashboard; default RAY_API_SERVER_ADDRESS, then Ray's own default
    working_dir   folder to send along, less what .gitignore and .rayignore name; default: none, the
                  image's own code and configs are used
    env           variables of this shell to set for the job, for example AWS_ENDPOINT_URL; all who
                  may look at the dashboard can read them, so names of credentials are refused
    max_losses    lost jobs after which to give up
    head_wait_s   seconds to wait for a head that does not answer
    poll_s        seconds between looks at the job

Exit codes: 0 done; the command's own if it failed; 1 stopped by somebody or given up; 2 wrong usage
or token; 130 interrupted here, while the job goes on.

It needs a Python with `ray`, of the cluster's version, and for a cluster with token authentication
(the default: RAY_AUTH_MODE=token) the token in RAY_AUTH_TOKEN, in the file RAY_AUTH_TOKEN_PATH or
in ~/.ray/auth_token.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from fqgan_dist.config import Config, parse_config
from fqgan_dist.errors import ClusterError, ConfigError

logger = logging.getLogger(__name__)

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130

CREDENTIAL_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|CREDENTIAL|ACCESS_KEY|PRIVATE", re.IGNORECASE)


def _check_folder(text: str) -> str:
    if "://" not in text and not Path(text).exists():
        raise ValueError(f"there is no folder {text!r} to send along")
    return text


def _check_variable(name: str) -> str:
    if CREDENTIAL_NAME.search(name):
        raise ValueError(
            f"{name!r} looks like a credential, and a job's variables are shown on the dashboard; "
            f"give the nodes a role instead (cluster/README.md)"
        )
    if name not in os.environ:
        raise ValueError(f"{name!r} is not set in this shell; export it first")
    return name


class Settings(Config):
    """The options before `--`; the text above says what they are."""

    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    address: str | None = None
    working_dir: Annotated[str, AfterValidator(_check_folder)] | None = None
    env: Annotated[
        tuple[Annotated[str, AfterValidator(_check_variable)], ...],
        BeforeValidator(lambda text: [name for name in text.split(",") if name]),
    ] = Field(default=(), validate_default=False)
    max_losses: int = Field(default=20, ge=0)
    head_wait_s: float = Field(default=3600.0, ge=0, allow_inf_nan=True)
    poll_s: float = Field(default=15.0, ge=0)


def main(arguments: Sequence[str]) -> int:
    """Submit, follow and retry; return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(__doc__ or "")
        return DONE if arguments else WRONG_USAGE
    try:
        return _bring_to_end(*parse_arguments(arguments))
    except ConfigError as error:
        logger.error("%s", error)
        return WRONG_USAGE
    except ClusterError as error:
        logger.error("%s", error)
        return FAILED
    except KeyboardInterrupt:
        logger.error("interrupted; the job goes on, and the same command joins it again")
        return INTERRUPTED


def parse_arguments(arguments: Sequence[str]) -> tuple[Settings, list[str]]:
    """Part the options from the command.

    Raises:
        ConfigError: there is no command, or every problem of the options.
    """
    options = [*arguments[: arguments.index("--")]] if "--" in arguments else [*arguments]
    command = [*arguments[len(options) + 1 :]]
    if not command:
        raise ConfigError("no command: expected `-- fqgan run CONFIG ...` after the options")
    values = {name: value for name, _, value in (text.partition("=") for text in options)}
    return parse_config(values, Settings, source="cluster/submit"), command


def _bring_to_end(settings: Settings, command: list[str]) -> int:
    # Ray reads this when it is imported, so that must come afterwards.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if settings.address is not None:  # and this it prefers to an address that it is given
        os.environ["RAY_API_SERVER_ADDRESS"] = settings.address
    try:
        from cluster.ray_jobs import RayJobs
        from cluster.submission import Submission
    except ImportError as error:
        raise ConfigError(
            f"{sys.executable} cannot import Ray ({error}): activate the environment that has it, "
            f"or pip install fqgan-dist"
        ) from error
    return Submission(settings, command, RayJobs()).bring_to_end()
