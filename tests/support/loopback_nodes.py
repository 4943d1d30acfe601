"""Ray's fake multi-node provider with an address for each node, for tests of autoscaling.

Ray's own gives all nodes the address of the machine, but the autoscaler knows by their addresses
which nodes are idle, and so it never takes one away. All of 127.0.0.0/8 is this machine. Ray's
monitor process imports this module by name.
"""

from __future__ import annotations

import json
from typing import Any

from ray._private import ray_constants
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)


class LoopbackNodeProvider(FakeMultiNodeProvider):
    """Starts and ends worker nodes as processes of the monitor."""

    def _get_ip(self, node_id: str) -> str:
        if node_id == self._head_node_id:
            return str(self.provider_config["head_address"])
        return f"127.0.1.{int(node_id[-5:], 16)}"

    def _create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        reserved = dict(resources)
        node_id = self._next_hex_node_id()
        memory = reserved.pop("object_store_memory", None)
        parameters = RayParams(
            node_ip_address=self._get_ip(node_id),
            min_worker_port=0,
            max_worker_port=0,
            dashboard_agent_listen_port=0,
            num_cpus=reserved.pop("CPU", 0),
            num_gpus=reserved.pop("GPU", 0),
            object_store_memory=memory,
            resources=reserved,
            labels=labels,
            gcs_address=self._gcs_address,
            env_vars={
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_id,
                "RAY_CLOUD_INSTANCE_ID": node_id,
                "RAY_NODE_TYPE_NAME": tags[TAG_RAY_USER_NODE_TYPE],
                ray_constants.RESOURCES_ENVIRONMENT_VARIABLE: json.dumps(reserved),
                ray_constants.LABELS_ENVIRONMENT_VARIABLE: json.dumps(labels),
            },
        )
        node = Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
        known = {
            TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
            TAG_RAY_NODE_NAME: node_id,
            TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
        }
        with self.lock:
            self._nodes[node_id] = {"tags": known | tags, "node": node}
