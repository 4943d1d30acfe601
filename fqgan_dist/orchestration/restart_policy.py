"""Whether a training that ended early is started again, and when.

What is passing is waited for, with growing waits, until patience ends; what nobody knows is
counted. A newer checkpoint is progress, and all begins anew with it: a run of a week may lose a
node a day. The first restart after progress waits for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from fqgan_dist.errors import (
    ClusterError,
    LossError,
    NoCapacityError,
    PassingError,
    StorageOutageError,
)
from fqgan_dist.telemetry.summary import format_seconds
from fqgan_dist.waiting import PatienceConfig

PassingCause = Literal["storage", "capacity", "loss"]
Cause = Literal[PassingCause, "notice", "unknown", "permanent"]
"""Why a training ended: storage out of reach, no resources, a process or node lost; notice of an
end, before which it saved; a mistake in settings, data, code or numbers; or none of these for all
we know."""

_FIRST_WAIT_S = 5.0
_LONGEST_WAIT_S = 300.0
_ADVICE = "the same command continues from the newest checkpoint"
_ERRORS: dict[PassingCause, tuple[str, type[PassingError]]] = {
    "storage": ("patience.storage_s", StorageOutageError),
    "capacity": ("patience.capacity_s", NoCapacityError),
    "loss": ("patience.losses_s", LossError),
}


class RestartPolicy:
    """Of one stage, for as long as its driver lives."""

    def __init__(
        self,
        stage: str,
        *,
        max_failures: int,
        patience: PatienceConfig,
        newest_commit: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with the commits that there are.

        Args:
            stage: for messages.
            max_failures: restarts without progress after failures of unknown cause.
            patience: how long the others may last without progress.
            newest_commit: gives the number of the newest commit in the log, 0 if there is none.
            clock: in seconds.
        """
        self._stage = stage
        self._max_failures = max_failures
        self._patience = patience
        self._newest_commit = newest_commit
        self._clock = clock
        self._commit = newest_commit()
        self._forget()

    def _forget(self) -> None:
        self._num_failures = self._num_restarts = 0
        self._since: dict[str, float] = {}

    def wait_after(self, cause: Cause, text: str, *, began: float) -> float:
        """Give the seconds to wait before the next start.

        Args:
            cause: why the training ended; not `permanent`, which no start mends.
            text: what happened.
            began: when it was started, by the clock.

        Raises:
            PassingError: patience has ended; exit code 75.
            ClusterError: failures of unknown cause were too many.
        """
        assert cause != "permanent", "what would come again is not started again"
        now = self._clock()
        commit = self._newest_commit()
        if commit > self._commit:
            self._commit = commit
            self._forget()
        self._num_restarts += 1
        if cause == "notice":
            # A planned restart, with the progress that it saved; again and again without any, it
            # is a loss like others.
            if self._num_restarts == 1:
                return 0.0
            cause = "loss"
        if cause == "unknown":
            self._count(text)
        else:
            # A start that waits for resources has waited from its beginning.
            since = self._since.setdefault(cause, began if cause == "capacity" else now)
            self._check_patience(cause, now - since, text)
        if self._num_restarts == 1:
            return 0.0
        return min(_FIRST_WAIT_S * 2 ** min(self._num_restarts - 2, 20), _LONGEST_WAIT_S)

    def _count(self, text: str) -> None:
        self._num_failures += 1
        if self._num_failures > self._max_failures:
            raise ClusterError(
                f"{self._stage}: the training failed {self._num_failures} times without a new "
                f"checkpoint (ray.train.max_failures: {self._max_failures}); the last time: {text} "
                f"- {_ADVICE}"
            )

    def _check_patience(self, cause: PassingCause, waited_s: float, text: str) -> None:
        setting, error = _ERRORS[cause]
        patience_s = getattr(self._patience, setting.partition(".")[2])
        if waited_s >= patience_s:
            raise error(
                f"{self._stage}: no progress for {format_seconds(waited_s)} "
                f"({setting}: {patience_s:g}); the last time: {text} - {_ADVICE}"
            )

    def describe(self, cause: Cause) -> str:
        """Say what is left of the budget or the patience, for the log."""
        if cause == "unknown":
            return f"failure {self._num_failures} of {self._max_failures} without a new checkpoint"
        if cause == "permanent":
            return "it would come again"
        if cause == "notice":
            is_first = self._num_restarts == 1
            return "progress was saved" if is_first else "again without a new checkpoint"
        setting, _ = _ERRORS[cause]
        limit = getattr(self._patience, setting.partition(".")[2])
        waited_s = self._clock() - self._since.get(cause, self._clock())
        return (
            f"{setting}: {format_seconds(waited_s)} of {format_seconds(limit)} without a new "
            "checkpoint"
        )
