"""The size of each start of a stage's train workers, where `ray.train.num_workers` is a range.

A start is of one size that this module chooses; Ray resizes nothing. A group shrinks by starting
again after a loss or notice, as any does, and grows by a notice of its own: the ranks finish their
step, save, and leave.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from fqgan_dist.notice import Notice
from fqgan_dist.orchestration.cluster import is_attached
from fqgan_dist.orchestration.config import TrainWorkersConfig
from fqgan_dist.orchestration.free_room import list_groups, look_for_room
from fqgan_dist.orchestration.group_size import GrowthWatch, largest_fitting
from fqgan_dist.telemetry.summary import format_seconds
from fqgan_dist.waiting import WAITS

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_GROWTH_POLL_S = 10.0
# Of a group for which there is room; the room may be gone again, with a node or to somebody else.
_SURE_START_S = 30.0


class Elasticity:
    """Chooses the size of each start, and notices that a start could be larger.

    Without a range it chooses what is configured, and notices nothing.
    """

    def __init__(
        self,
        stage: str,
        workers: TrainWorkersConfig,
        sizes: Sequence[int],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin before the first start.

        Args:
            stage: for messages.
            workers: as configured.
            sizes: the valid ones of the range, ascending.
            clock: in seconds.
        """
        self.is_on = workers.is_elastic
        self._stage = stage
        self._workers = workers
        self._watch = GrowthWatch(sizes, workers.grow_after_s, clock)
        self._clock = clock
        self._sizes = sizes
        self._why = ""
        self._looked_at = 0.0
        self._former_groups: set[str] = set()
        self.notice: Notice | None = None
        """That the present start shall make way for a larger one."""

    def choose(self, *, sleep: Callable[[float], None]) -> TrainWorkersConfig:
        """Give the train workers of the next start, after a wait for room if it is worth one.

        Where there is not even room for the smallest size, that is what is asked for, and waited
        for as a group of fixed size is.
        """
        if not self.is_on:
            return self._workers
        former = self._watch.size
        with WAITS.during("room for the train workers"):
            size = self._wait_for_room(sleep)
        chosen = self._workers.of_size(size or self._sizes[0])
        if size is not None and self._workers.start_timeout_s > _SURE_START_S:
            chosen = chosen.model_copy(update={"start_timeout_s": _SURE_START_S})
        self._log(former, size)
        self._watch.begin(chosen.max_workers)
        self._former_groups = list_groups(chosen, "CREATED")
        self.notice, self._why = None, ""
        self._looked_at = self._clock()
        return chosen

    def _wait_for_room(self, sleep: Callable[[float], None]) -> int | None:
        """Wait for what may still come, and give the largest size that fits, None if none does."""
        deadline = self._clock() + self._workers.size_wait_s
        while True:
            room = look_for_room(self._workers)
            size = hoped = None
            if room is not None:
                size = largest_fitting(self._sizes, room.free)
                hoped = largest_fitting(self._sizes, room.whole)
            if self._watch.size is None and is_attached():
                # Nodes of a cluster that has just been started come one after another; later a
                # node that comes costs a resize, and waiting for it the whole group.
                hoped = self._sizes[-1]
            is_best = size is not None and hoped is not None and size >= hoped
            if is_best or self._clock() >= deadline:
                return size
            sleep(_POLL_S)

    def _log(self, former: int | None, size: int | None) -> None:
        text = f"{self._stage}: starting {size or self._sizes[0]} train worker(s) of {self._range}"
        if size is None:
            text += ", for which there is no room yet"
        if former is not None and former != (size or self._sizes[0]):
            text += f", before it {former}: {self._why}"
        logger.info("%s", text)

    @property
    def _range(self) -> str:
        least, most = self._workers.min_workers, self._workers.max_workers
        return f"{least} to {most} (valid sizes: {', '.join(map(str, self._sizes))})"

    def note_end(self, why: str) -> None:
        """Note why the present start has ended."""
        self._why = why

    def look(self) -> Notice | None:
        """Look now and then, while the group trains, whether it shall make way for a larger one."""
        if not self.is_on or self.notice is not None or not self._watch.could_grow:
            return self.notice
        now = self._clock()
        if now - self._looked_at < min(_GROWTH_POLL_S, self._workers.grow_after_s / 2):
            return None
        self._looked_at = now
        former = self._watch.size
        assert former is not None, "a start begins first"
        present = self._workers.of_size(former)
        own = list_groups(present, "CREATED") - self._former_groups
        room = look_for_room(self._workers, own)
        size = None if room is None else self._watch.look(room.free)
        if size is not None:
            waited = format_seconds(self._watch.wait_s)
            reason = f"resize from {former} to {size} train workers, room for which lasts {waited}"
            logger.info(
                "%s: %s: they finish their step, save, and start again", self._stage, reason
            )
            self.notice = Notice(reason)
        return self.notice
