"""Submit a run to a Ray cluster and bring it to its end, whatever happens to the head.

    cluster/submit run=NAME [address=http://HOST:8265] [working_dir=DIR] [env=NAME,NAME]
                   [max_losses=20] [head_wait_s=3600] [patience_s=86400] [poll_s=15]
                   -- fqgan run CONFIG key=value ...

Ray does not retry jobs. A run does not need more than the same command again (its state is in its
storage root), so this submits it again when the job was lost: its head went away, or its driver was
killed. A job whose command says that what it waited for may come yet (exit code 75: the storage,
the capacity) is submitted again later. One that failed by itself (any other code from 1 to 127) is
not retried. While the head is away, this waits for it. Submissions are numbered under the run's
name and its command, so a second call of this program joins the job of the first instead of
starting another.

    run           names the submissions, NAME-xxxxxxxx-1, -2 ...; letters, digits, `.`, `_`, `-`
    address       of the head's dashboard; default RAY_API_SERVER_ADDRESS, then Ray's own default
    working_dir   folder to send along, less what .gitignore and .rayignore name; default: none, the
                  image's own code and configs are used
    env           variables of this shell to set for the job, for example AWS_ENDPOINT_URL; all who
                  may look at the dashboard can read them, so names of credentials are refused
    max_losses    lost jobs, none of which lasted an hour, after which to give up
    head_wait_s   seconds to wait for a head that does not answer
    patience_s    seconds for which one job after another may end with code 75 or not reach the head
    poll_s        seconds between looks at the job

Exit codes: 0 done; the command's own if it failed; 1 stopped by somebody or given up; 2 wrong usage
or token; 130 interrupted here, while the job goes on.

It needs a Python with `ray`, of the cluster's version, and for a cluster with token authentication
(the default: RAY_AUTH_MODE=token) the token in RAY_AUTH_TOKEN, in the file RAY_AUTH_TOKEN_PATH or
in ~/.ray/auth_token. RAY_JOB_HEADERS may hold more headers for its requests, as JSON.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from cluster.options import DONE, FAILED, INTERRUPTED, WRONG_USAGE, Settings, parse_arguments
from fqgan_dist.errors import ClusterError, ConfigError

logger = logging.getLogger(__name__)


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
