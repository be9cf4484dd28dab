# SPDX-License-Identifier: Apache-2.0
"""What every ROS process of this package needs: its start, and ways around what rclpy does not do."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import rclpy
from lifecycle_msgs.srv import ChangeState
from rclpy.executors import Executor, ExternalShutdownException
from rclpy.lifecycle import LifecycleNode
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rclpy.task import Future

from deq_flow_ros.host import StopRequest, keep_freed_memory


def start(args: Sequence[str] | None) -> StopRequest:
    """Initialise ROS, and take over the signals.

    ROS's own handlers would close the context at once, and with it whatever is still to be published.

    :param args: the command line, ROS arguments included.
    """
    stop = StopRequest().__enter__()  # for as long as the process lives
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="[%(levelname)s] [%(name)s]: %(message)s")
    rclpy.init(args=None if args is None else list(args), signal_handler_options=SignalHandlerOptions.NO)
    return stop


def words_of(error: Exception) -> str:
    """An error as the user should read it: what we raise says all; of anything else, the place matters."""
    return str(error) if isinstance(error, (OSError, ValueError, RuntimeError)) else traceback.format_exc()


def spin_once(executor: Executor, node: Node) -> None:
    """Do what is next; rclpy raises for requests that are malformed, and one client's must not end the node."""
    try:
        executor.spin_once(timeout_sec=0.2)
    except ExternalShutdownException:
        raise
    except Exception:
        node.get_logger().error(f"a callback failed:\n{traceback.format_exc()}", throttle_duration_sec=1.0)


def in_a_thread(job: Callable[[], Any], executor: Executor | None, name: str) -> Future:
    """What a callback may await while the executor takes up other work. The process does not end before it."""
    future = Future(executor=executor)

    def run() -> None:
        try:
            future.set_result(job())
        except Exception as error:
            future.set_exception(error)
        if executor is not None:
            executor.wake()

    threading.Thread(target=run, name=name).start()
    return future


def refuse_impossible_transitions(node: LifecycleNode) -> None:
    """Let a node answer the request of a transition that its state does not have with "no".

    rclpy raises an error in the executor instead, and the caller waits for ever.
    """
    service = next(service for service in node.services if service.srv_type is ChangeState)
    change = service.callback

    def callback(request: ChangeState.Request, response: ChangeState.Response) -> ChangeState.Response:
        try:
            return change(request, response)
        except RuntimeError as error:
            node.get_logger().warning(f"cannot do the transition that was asked for: {error}")
            response.success = False
            return response

    service.callback = callback
