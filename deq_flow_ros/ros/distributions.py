# SPDX-License-Identifier: Apache-2.0
"""What ROS 2 Humble has under other names or not at all, in one place; docs/install.md lists it.

Everything else that this package takes from rclpy, launch and the messages is the same from Humble to Lyrical.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.subscription import Subscription

try:
    from rclpy.event_handler import QoSRequestedIncompatibleQoSInfo, SubscriptionEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import QoSRequestedIncompatibleQoSInfo, SubscriptionEventCallbacks
from rcl_interfaces.msg import SetParametersResult

__all__ = [
    "QoSRequestedIncompatibleQoSInfo",
    "SubscriptionEventCallbacks",
    "after_parameters_set",
    "before_parameters_set",
    "with_info",
]

UNKNOWN = {"received_timestamp": 0, "publication_sequence_number": 0}
"""What is told of a message where rclpy tells nothing: when it was received (ns), and its number."""


def with_info(callback: Callable[[Any, dict[str, int]], None]) -> Callable[..., None]:
    """A callback for a subscription that takes a message and what the middleware knows of it.

    Humble gives the message alone, so ``UNKNOWN`` stands for the rest: messages count as just arrived, none as lost.
    """
    if hasattr(Subscription, "CallbackType"):
        return callback
    return lambda message: callback(message, UNKNOWN)


def before_parameters_set(node: Node, change: Callable[[list[Parameter]], list[Parameter]]) -> None:
    """Have the parameters of a request changed before they are checked.

    Humble cannot: there, a request is taken word for word.
    """
    if hasattr(node, "add_pre_set_parameters_callback"):
        node.add_pre_set_parameters_callback(change)


def after_parameters_set(node: Node, callback: Callable[[Sequence[Parameter]], None]) -> None:
    """Have a callback called when parameters have new values; it may be called without that.

    Humble calls it before, and knows no later point: so it becomes a task, which the executor does next.
    """
    if hasattr(node, "add_post_set_parameters_callback"):
        node.add_post_set_parameters_callback(callback)
        return

    def soon(parameters: Sequence[Parameter]) -> SetParametersResult:
        if node.executor is not None:
            node.executor.create_task(callback, parameters)
        return SetParametersResult(successful=True)

    node.add_on_set_parameters_callback(soon)
