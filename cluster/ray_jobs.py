"""Jobs of a Ray cluster, asked through its dashboard; every question has an end."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, TypeVar

import requests
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from fqgan_dist.errors import TRY_AGAIN, ClusterError, ConfigError

logger = logging.getLogger(__name__)

# For one answer, and for sending a folder; a dead tunnel never answers.
REQUEST_TIMEOUT_S = 120.0

T = TypeVar("T")


class Phase(Enum):
    """Where a submission stands."""

    UNKNOWN = auto()
    """The cluster has no such job."""
    ACTIVE = auto()
    SUCCEEDED = auto()
    STOPPED = auto()
    FAILED = auto()
    TRY_AGAIN = auto()
    """Its command says that what it waited for may come yet: exit code 75."""
    LOST = auto()
    """It ended without the command's own exit code: killed, or its node is gone."""
    UNREACHABLE = auto()
    """The head does not answer."""


@dataclass(frozen=True)
class Status:
    """A submission's phase; the command's exit code if it failed; what was said about it."""

    phase: Phase
    exit_code: int | None = None
    reason: str = ""


class RayJobs:
    """The jobs of one cluster; its address comes from Ray's environment variables."""

    def __init__(self, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._client: _BoundedClient | None = None
        # It tells of every connection to a log that ends.
        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)

    def submit(self, job_id: str, command: Sequence[str], runtime_env: dict[str, Any]) -> bool:
        """Submit under an id; whether it arrived is for `status` to find out.

        Returns:
            Whether the head said so; it may have arrived all the same.

        Raises:
            ConfigError: the cluster refuses the token.
        """
        entrypoint = shlex.join(command)
        try:
            self._ask(
                lambda client: client.submit_job(
                    entrypoint=entrypoint, submission_id=job_id, runtime_env=runtime_env
                )
            )
        except ClusterError as error:
            logger.warning("submitting %s: %s", job_id, error)
            return False
        return True

    def status(self, job_id: str) -> Status:
        """Ask how a submission stands.

        Raises:
            ConfigError: as `submit`.
        """
        try:
            # Not `get_job_info`, which tells an unknown job from other failures only by its words.
            jobs = self._ask(lambda client: client.list_jobs())
        except ClusterError as error:
            return Status(Phase.UNREACHABLE, reason=str(error))
        found = [job for job in jobs if job.submission_id == job_id]
        return _find_status(found[0]) if found else Status(Phase.UNKNOWN)

    def read_log(self, job_id: str) -> str:
        """Give the log of a job so far.

        Raises:
            ClusterError: it cannot be read.
            ConfigError: as `submit`.
        """
        return self._ask(lambda client: client.get_job_logs(job_id))

    def follow_log(self, job_id: str) -> AsyncIterator[str]:
        """Give the pieces of a job's log from its beginning, until the job ends.

        Raises (when iterated):
            OSError, RuntimeError, aiohttp.ClientError: the connection broke.
        """
        assert self._client is not None, "a job is followed after `status` has found it"
        return self._client.tail_job_logs(job_id)

    def _ask(self, question: Callable[[JobSubmissionClient], T]) -> T:
        try:
            if self._client is None:  # it looks for the head when it is made
                self._client = _BoundedClient(self._timeout_s)
            return question(self._client)
        except AuthenticationError as error:
            raise ConfigError(f"the cluster refuses us: {str(error).splitlines()[0]}") from error
        # From `requests`, from Ray for an answer that is not 200 or an address that leads nowhere,
        # from the answers of another program on that port: all may mend while the caller waits.
        except (OSError, RuntimeError, RayError, ValueError, LookupError) as error:
            self._client = None  # the head may come back somewhere else
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ClusterError(": ".join([type(error).__name__, *lines[-1:]])) from error


class _BoundedClient(JobSubmissionClient):
    """Ray's client, which by itself waits for an answer for ever."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        # For a proxy before the head; Ray's own program reads them too, its client does not.
        super().__init__(headers=json.loads(os.environ.get("RAY_JOB_HEADERS", "{}")))

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, timeout=self._timeout_s, **options)


def _find_status(job: JobDetails) -> Status:
    match job.status:
        case JobStatus.SUCCEEDED:
            return Status(Phase.SUCCEEDED)
        case JobStatus.STOPPED:
            return Status(Phase.STOPPED)
        case JobStatus.FAILED:
            return _find_failure(job)
        case _:
            return Status(Phase.ACTIVE)


def _find_failure(job: JobDetails) -> Status:
    code = job.driver_exit_code
    if code is None:  # the supervisor or the node of the driver died, not the command
        return Status(Phase.LOST, reason=(job.message or "no reason given").splitlines()[0])
    # A shell reports death by signal s as 128 + s, Python as -s: killed, not failed.
    if code == TRY_AGAIN:
        return Status(Phase.TRY_AGAIN, exit_code=code, reason="see its last lines")
    if 0 < code < 128:
        return Status(
            Phase.FAILED, exit_code=code, reason=f"its command failed with exit code {code}"
        )
    return Status(Phase.LOST, reason=f"its driver was killed (exit code {code})")
