# SPDX-License-Identifier: Apache-2.0
"""ROS 2 Humble: the node with an rclpy that lacks what Humble's lacks, because no wheels of Humble exist."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
from node_client import CAMERA_TOPIC, running_node

LIKE_HUMBLE = """
import sys, types
import rclpy.event_handler, rclpy.executors, rclpy.lifecycle, rclpy.node
sys.modules["rclpy.qos_event"] = sys.modules["rclpy.event_handler"]
sys.modules["rclpy.event_handler"] = None  # so that importing it fails
del rclpy.node.Node.add_post_set_parameters_callback
# That of Humble tells callbacks the message alone.
sys.modules["rclpy.subscription"] = types.SimpleNamespace(Subscription=type("Subscription", (), {}))
"""


def test_the_node_runs_with_what_humble_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: what later distributions have slips in unnoticed, as developers do not have Humble."""
    (tmp_path / "sitecustomize.py").write_text(LIKE_HUMBLE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with running_node(tmp_path, f"~/image:={CAMERA_TOPIC}") as (node, _):
        node.connect()
        node.send(node.image(), node.image())
        node.until(lambda: node.flow, "a field")
        assert node.set_parameters(max_iterations=1) == ""
        node.forget()
        node.send(node.image())
        assert node.accounts[-1]["iterations"] == "1"
