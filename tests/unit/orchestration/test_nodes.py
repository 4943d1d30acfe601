"""Nodes that Ray counts as alive, and what of them answers."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from fqgan_dist.orchestration import nodes
from fqgan_dist.orchestration.nodes import wait_for_lost_nodes


def raylet(port: int, *, is_alive: bool = True) -> dict[str, Any]:
    return {
        "NodeID": f"{port:056d}",
        "NodeManagerAddress": "127.0.0.1",
        "NodeManagerPort": port,
        "Alive": is_alive,
    }


def test_a_node_that_takes_no_connection_is_waited_for_until_ray_gives_it_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as living:
        port = living.getsockname()[1]
        with socket.create_server(("127.0.0.1", 0)) as closed:
            gone = closed.getsockname()[1]
        answers = [[raylet(port), raylet(gone)]] * 3 + [
            [raylet(port), raylet(gone, is_alive=False)]
        ]
        asked: list[int] = []

        def ask() -> list[dict[str, Any]]:
            asked.append(1)
            return answers[len(asked) - 1]

        monkeypatch.setattr(nodes, "ray", SimpleNamespace(nodes=ask))
        monkeypatch.setattr(nodes, "_LOOK_INTERVAL_S", 0.001)
        wait_for_lost_nodes()
        assert len(asked) == 4


def test_waiting_for_ray_to_notice_has_an_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        gone = closed.getsockname()[1]
    monkeypatch.setattr(nodes, "ray", SimpleNamespace(nodes=lambda: [raylet(gone)]))
    wait_for_lost_nodes(limit_s=0.0)
    assert "counts as alive what takes no connection" in caplog.text
