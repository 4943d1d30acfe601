"""Who gives notice to the train workers of a Ray cluster.

Every rank asks whether Ray drains its node (`ray drain-node`, an autoscaler, the termination of a
KubeRay pod). On EC2 one rank of each node asks whether the instance is taken back; in that case it
has Ray drain the node, so that nothing is started there again. The main rank asks the driver. That
one rank was given notice is enough: the ranks agree at every step.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from typing import Any, cast

import ray
from ray._private import worker as ray_worker  # its client of the GCS has no other name
from ray._private.state import state as ray_state  # nor has its list of draining nodes
from ray.core.generated import autoscaler_pb2
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import WorkerCallback

from fqgan_dist.ec2_notice import Ec2Notice, is_on_ec2
from fqgan_dist.notice import Notice, NoticeSource
from fqgan_dist.orchestration.progress_board import RayObserver
from fqgan_dist.termination import SignalNotice
from fqgan_dist.world import World

NOTICE_KEY = "notice"
"""Under which the driver tells the board of its notice: reason and deadline."""

_DRAIN_TIMEOUT_S = 5.0
# EC2 says when; where that cannot be read, what it promises. A moment that has passed, by a clock
# that is wrong, must not let Ray end the node before the save.
_EC2_NOTICE_S = 120.0
_LEAST_NOTICE_S = 30.0

logger = logging.getLogger(__name__)


def sources_for(world: World, observer: RayObserver) -> list[NoticeSource]:
    """Choose whom a rank asks."""
    # Ray Train counts local ranks by address, and several Ray nodes may share one.
    sources: list[NoticeSource] = [DrainNotice()]
    if world.local_rank == 0 and is_on_ec2():
        sources.append(DrainingEc2Notice())
    if world.is_main:
        sources.append(DriverNotice(observer))
    return sources


class DrainNotice:
    """Whether Ray drains the node of this process; see `notice.NoticeSource`.

    Ray Train's own watcher asks the same, but its controller then keeps a failure of the ranks to
    itself until the node's deadline has passed.
    """

    interval_s = 2.0
    """The head answers in a quarter of a millisecond."""

    def __init__(self) -> None:
        """Find out which node this is; Ray is connected."""
        self._node_id = ray.get_runtime_context().get_node_id()

    def look(self) -> Notice | None:
        """Ask the GCS."""
        if not ray.is_initialized():
            return None  # asked for without a connection, Ray would start a cluster of its own
        try:
            draining = ray_state.get_draining_nodes()
        except (RayError, RuntimeError, ValueError, OSError):
            return None  # the head is away: others say so
        if self._node_id not in draining:
            return None
        # In milliseconds; 0: nobody said when.
        deadline = draining[self._node_id] / 1000 or None
        return Notice(f"Ray drains node {ray.util.get_node_ip_address()}", deadline)


class DrainingEc2Notice(Ec2Notice):
    """EC2's notice, which lets Ray drain the node of this process."""

    def look(self) -> Notice | None:
        """Ask, and drain the node with the answer's deadline."""
        notice = super().look()
        if notice is not None:
            _drain_own_node(notice)
        return notice


class DriverNotice:
    """What the driver was given; see `notice.NoticeSource`."""

    interval_s = 1.0

    def __init__(self, observer: RayObserver) -> None:
        self._observer = observer

    def look(self) -> Notice | None:
        """Ask the board."""
        told = self._observer.ask(NOTICE_KEY)
        return None if told is None else Notice(f"the driver: {told[0]}", told[1])


def tell_notice(observer: RayObserver, notice: Notice | None) -> None:
    """Give the main rank the driver's notice; None takes a former one back."""
    observer.tell(NOTICE_KEY, None if notice is None else (notice.reason, notice.deadline_s))


class NoticeOnSignal(WorkerCallback):
    """Lets SIGTERM to a train worker give it notice, where Ray would end it at once.

    Training runs in a thread, where no handler can be installed; Ray calls this in the main one,
    which looks at signals whenever the worker is polled, every 2 s.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s

    def after_init_train_context(self) -> None:
        """Install the handler before the training begins."""
        former = signal.getsignal(signal.SIGTERM)

        def end(number: int) -> None:
            if callable(former):
                cast("Any", former)(number, None)
            sys.exit(128 + number)

        signal.signal(signal.SIGTERM, SignalNotice(end, grace_s=self._grace_s).handle)


def _drain_own_node(notice: Notice) -> None:
    """Let Ray start nothing on this node any more; it goes on for what runs there."""
    now = time.time()
    deadline = max(notice.deadline_s or now + _EC2_NOTICE_S, now + _LEAST_NOTICE_S)
    # Neither is known to a type checker.
    reasons: Any = autoscaler_pb2
    worker: Any = ray_worker.global_worker
    try:
        is_accepted, why_not = worker.gcs_client.drain_node(
            ray.get_runtime_context().get_node_id(),
            reasons.DRAIN_NODE_REASON_PREEMPTION,
            notice.reason,
            int(deadline * 1000),
            timeout=_DRAIN_TIMEOUT_S,
        )
    except (RayError, RuntimeError, OSError) as error:
        is_accepted, why_not = False, str(error)
    if not is_accepted:
        logger.warning(
            "%s, but Ray does not drain the node (%s): it may start workers on it again",
            notice.reason,
            why_not,
        )
