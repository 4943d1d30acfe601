"""A run on a cluster, from its first job to its end: joined, followed, submitted again if lost."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import time
from contextlib import closing
from typing import Any

from cluster.job_log import LogCopier
from cluster.options import DONE, FAILED, Settings
from cluster.ray_jobs import Phase, RayJobs, Status
from fqgan_dist.errors import ClusterError

logger = logging.getLogger(__name__)

_LONGEST_WAIT_S = 300.0
# A run saves more often: a job that lasted so long got somewhere, and losses are counted anew.
_WORKED_S = 3600.0


class Submission:
    """A run, its settings and the number of its current job."""

    def __init__(self, settings: Settings, command: list[str], jobs: RayJobs) -> None:
        self._settings = settings
        self._command = command
        self._jobs = jobs
        text = json.dumps([command, settings.working_dir, settings.env])
        self._prefix = f"{settings.run}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        self._number = 1
        self._num_losses = 0
        self._num_tries = 0
        self._waiting_since: float | None = None
        self._has_arrived = False
        self._began = time.monotonic()

    @property
    def job_id(self) -> str:
        return f"{self._prefix}-{self._number}"

    def bring_to_end(self) -> int:
        """Submit or join, follow, and submit again what was lost; return the exit code.

        Raises:
            ConfigError: the cluster refuses the token.
            ClusterError: too many losses, or the head stayed away.
        """
        self._find_number()
        while True:
            end = self._follow() if self._is_there() else self._start()
            match end.phase:
                case Phase.SUCCEEDED:
                    logger.info("%s is done", self.job_id)
                    return DONE
                case Phase.STOPPED:
                    logger.error("%s was stopped; not submitted again", self.job_id)
                    return FAILED
                case Phase.FAILED:
                    logger.error(
                        "%s failed, which a retry does not mend: %s", self.job_id, end.reason
                    )
                    return end.exit_code or FAILED
                case Phase.TRY_AGAIN:
                    self._wait_and_try_again(end)
                case _:
                    self._note_loss(end)

    def _find_number(self) -> None:
        # Jobs of earlier calls that have ended are stepped over.
        while self._wait_for_head().phase not in (Phase.UNKNOWN, Phase.ACTIVE):
            self._number += 1

    def _is_there(self) -> bool:
        if self._wait_for_head().phase is Phase.UNKNOWN:
            return False
        logger.info("joining %s", self.job_id)
        return True

    def _start(self) -> Status:
        logger.info("submitting %s: %s", self.job_id, shlex.join(self._command))
        self._began = time.monotonic()
        self._has_arrived = self._jobs.submit(self.job_id, self._command, self._runtime_env())
        return self._follow()

    def _runtime_env(self) -> dict[str, Any]:
        environment: dict[str, Any] = {}
        if self._settings.working_dir is not None:
            environment["working_dir"] = self._settings.working_dir
        if self._settings.env:
            environment["env_vars"] = {name: os.environ[name] for name in self._settings.env}
        return environment

    def _follow(self) -> Status:
        with closing(LogCopier(self._jobs, self.job_id)) as copier:
            while (status := self._wait_for_head(copier)).phase is Phase.ACTIVE:
                copier.copy(self._settings.poll_s)
            if status.phase is not Phase.UNKNOWN:
                copier.finish()
            return status

    def _wait_and_try_again(self, end: Status) -> None:
        """Wait before the next job of a run that waited in vain; not a loss."""
        now = time.monotonic()
        # One that ran for longer than that has got somewhere: its own patience is shorter.
        if self._waiting_since is None or now - self._began > self._settings.patience_s:
            self._waiting_since, self._num_tries = now, 0
        self._check_patience(now - self._waiting_since, end.reason)
        wait_s = min(self._settings.poll_s * 2 ** min(self._num_tries, 20), _LONGEST_WAIT_S)
        self._num_tries += 1
        logger.warning(
            "%s: what it waits for may come yet (%s); submitting the run again in %.0f s",
            self.job_id,
            end.reason,
            wait_s,
        )
        time.sleep(wait_s)
        self._number += 1

    def _check_patience(self, waited_s: float, reason: str) -> None:
        if waited_s > self._settings.patience_s:
            raise ClusterError(
                f"{self.job_id}: no progress for {waited_s:.0f} s, and patience_s="
                f"{self._settings.patience_s:g} ({reason}); the same command goes on later"
            )

    def _note_loss(self, end: Status) -> None:
        if end.phase is Phase.UNKNOWN and not self._has_arrived:
            # The head was away when it was submitted: there is nothing that could be lost.
            now = time.monotonic()
            self._waiting_since = self._waiting_since or now
            self._check_patience(now - self._waiting_since, "the head does not take it")
            logger.warning("%s did not reach the head; submitting it again", self.job_id)
            time.sleep(self._settings.poll_s)
            return
        if time.monotonic() - self._began > _WORKED_S:
            self._num_losses = 0
        self._num_losses += 1
        reason = end.reason or "the cluster does not know it"
        if self._num_losses > self._settings.max_losses:
            raise ClusterError(
                f"{self.job_id} was lost ({reason}); that is loss {self._num_losses}, and "
                f"max_losses={self._settings.max_losses}"
            )
        logger.warning("%s was lost (%s); submitting the run again", self.job_id, reason)
        time.sleep(self._settings.poll_s)
        if end.phase is not Phase.UNKNOWN:
            self._number += 1

    def _wait_for_head(self, copier: LogCopier | None = None) -> Status:
        deadline = time.monotonic() + self._settings.head_wait_s
        is_waiting = False
        while (status := self._jobs.status(self.job_id)).phase is Phase.UNREACHABLE:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the head did not answer for {self._settings.head_wait_s:g} s "
                    f"({status.reason}); start it, then run the same command again"
                )
            if not is_waiting:
                logger.warning("the head does not answer (%s); waiting for it", status.reason)
                is_waiting = True
            if copier is not None:
                copier.disconnect()
            time.sleep(self._settings.poll_s)
        if is_waiting:
            logger.info("the head answers again")
        return status
