# SPDX-License-Identifier: Apache-2.0
"""What tests of a running node share; each file has its own fixture ``running``, which starts the node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # without ROS these tests are skipped, and this file must still be read
    from pathlib import Path

    from node_client import NodeClient


@pytest.fixture
def node(running: Any) -> NodeClient:
    """A client of an active node within a stream."""
    node: NodeClient = running[0]
    node.spin_for(0.1)
    node.forget()
    node.send(node.image(), node.image())
    node.forget()
    return node


@pytest.fixture
def log(running: Any) -> Path:
    """The log of the node."""
    path: Path = running[1].log("flow_node")
    return path
