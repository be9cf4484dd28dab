# SPDX-License-Identifier: Apache-2.0
"""The bond by which a lifecycle manager, such as nav2's, notices that a node has died."""

from __future__ import annotations

from typing import Any

from rclpy.lifecycle import LifecycleNode

from deq_flow_ros.ros import process


class ManagerBond:
    """Formed while a node is active that a manager has activated, where the ROS package ``bondpy`` is installed.

    As in nav2 (``nav2_util::LifecycleNode``) its topic is ``bond`` in the node's namespace, its id the node's name.
    """

    def __init__(self, node: LifecycleNode) -> None:
        self._node = node
        self._bond: Any = None

    def form(self) -> None:
        """Offer it, unless the node starts by itself: then there is no manager, and heartbeats would be for nobody."""
        if self._node.get_parameter("autostart").value:
            return
        logger = self._node.get_logger()
        try:
            from bondpy.bondpy import Bond
        except ImportError:
            logger.info("no bond is offered, as bondpy is not installed: give nav2's manager the bond_timeout 0.0")
            return
        topic = self._node.resolve_topic_name("bond")
        try:
            self._bond = Bond(self._node, topic, self._node.get_name())
            self._bond.start()
        except Exception as error:  # the flow does not depend on it
            logger.error(f"the bond on {topic} cannot be formed: {process.words_of(error)}")

    def end(self) -> None:
        """Tell the manager that the node leaves on purpose."""
        bond, self._bond = self._bond, None
        if bond is None:
            return
        try:
            bond.shutdown()
        except Exception as error:
            self._node.get_logger().error(f"the bond cannot be ended: {process.words_of(error)}")
