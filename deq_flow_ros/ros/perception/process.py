# SPDX-License-Identifier: Apache-2.0
"""A node of this package as a process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import rclpy
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor

from deq_flow_ros.ros import process
from deq_flow_ros.ros.perception.flow_consumer import FlowConsumer


def run(make: Callable[[], FlowConsumer], name: str, usage: str, args: Sequence[str] | None = None) -> int:
    """Run a node as the process until SIGINT or SIGTERM.

    :param usage: what ``--help`` prints.
    :returns: the exit status: 0, or 2 for a parameter that cannot be.
    """
    process.parse_no_options(name, usage, args)
    node = None
    try:
        stop = process.start(args)
        node = make()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        while not stop.requested:
            process.spin_once(executor, node)
    except ParameterException as error:
        print(f"{name}: {str(error).removesuffix(': ')}", file=sys.stderr, flush=True)
        return 2
    except ExternalShutdownException:
        pass
    finally:
        if node is not None:
            node.close()
            node.destroy_node()
        rclpy.try_shutdown()
    return 0
