# SPDX-License-Identifier: Apache-2.0
"""What every ROS process of this package needs: its start, ``/diagnostics``, and ways around what rclpy does not do."""

from __future__ import annotations

import logging
import re
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetAvailableTransitions
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import ParameterException
from rclpy.executors import Executor, ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.signals import SignalHandlerOptions
from rclpy.task import Future
from rclpy.timer import Timer
from rclpy.utilities import remove_ros_args
from std_msgs.msg import Header

from deq_flow_ros.command_line import CommandLine
from deq_flow_ros.host import StopRequest, keep_freed_memory

AnyNode = TypeVar("AnyNode", bound=Node)

TRANSITIONS = ("CONFIGURE", "CLEANUP", "ACTIVATE", "DEACTIVATE")
STEADY_CLOCK = Clock(clock_type=ClockType.STEADY_TIME)
"""For timers that must run on while simulated time stands still, as before a bag is played."""


def start(args: Sequence[str] | None) -> StopRequest:
    """Initialise ROS, and take over the signals.

    ROS's own handlers would close the context at once, and with it whatever is still to be published.

    :raises SystemExit: with status 2 for ROS arguments that cannot be.
    """
    stop = StopRequest().__enter__()  # for as long as the process lives
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="[%(levelname)s] [%(name)s]: %(message)s")
    try:
        rclpy.init(args=None if args is None else list(args), signal_handler_options=SignalHandlerOptions.NO)
    except RuntimeError as error:
        _end_for_ros_arguments(error)
    return stop


def own_arguments(args: Sequence[str]) -> list[str]:
    """What a command line has beside the arguments of ROS, without the name of the program.

    :raises SystemExit: with status 2 for ROS arguments that cannot be.
    """
    try:
        return list(remove_ros_args(args))[1:]
    except RuntimeError as error:
        _end_for_ros_arguments(error)


def _end_for_ros_arguments(error: RuntimeError) -> NoReturn:
    told = re.sub(r", at /\S+:\d+", "", str(error))
    form = "expected --ros-args -r FROM:=TO -p NAME:=VALUE --params-file FILE ..."
    print(f"ROS cannot use these arguments: {told}; {form}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None


def words_of(error: Exception) -> str:
    """An error as the user should read it: what we raise says all; of anything else, the place matters."""
    return str(error) if isinstance(error, (OSError, ValueError, RuntimeError)) else traceback.format_exc()


def run(
    make: Callable[[], AnyNode], name: str, usage: str, args: Sequence[str] | None = None,
    begin: Callable[[AnyNode, StopRequest], bool] | None = None, step: Callable[[AnyNode], None] | None = None,
    errors: Sequence[type[Exception]] = (),
) -> int:  # fmt: skip
    """Run a node, which has a method ``close``, as the process until SIGINT or SIGTERM.

    :param usage: what ``--help`` prints; the command line takes nothing else beside the arguments of ROS.
    :param begin: what the node does first; where it returns False, the process ends with status 1.
    :param step: what it does again and again; None is to spin.
    :param errors: what the user can mend, beside a parameter that cannot be: the process ends with status 2.
    :returns: the exit status.
    :raises SystemExit: for a command line that is wrong (2), or asks for help (0).
    """
    line = CommandLine(name, usage)
    line.usage = f"{name} [--ros-args ...]"
    line.parse_args(own_arguments(sys.argv if args is None else [name, *args]))
    node = None
    try:
        stop = start(args)
        node = make()
        if step is None:
            executor = SingleThreadedExecutor()
            executor.add_node(node)
        if begin is not None and not begin(node, stop):
            return 1
        while not stop.requested:
            if step is None:
                spin_once(executor, node)
            else:
                step(node)
    except (ParameterException, *errors) as error:
        print(f"{name}: {str(error).removesuffix(': ')}", file=sys.stderr, flush=True)
        return 2
    except ExternalShutdownException:
        pass
    finally:
        if node is not None:
            node.close()
            end_node(node)
        rclpy.try_shutdown()
    return 0


def end_node(node: Node) -> None:
    """End a node, and its executor before it: Kilted's, left to the end of the process, may print an error there."""
    if node.executor is not None:
        node.executor.shutdown(timeout_sec=1.0)
    node.destroy_node()


def spin_once(executor: Executor, node: Node, timeout_s: float = 0.2) -> None:
    """Do what is next; rclpy raises for requests that are malformed, and one client's must not end the node."""
    try:
        executor.spin_once(timeout_sec=timeout_s)
    except ExternalShutdownException:
        raise
    except Exception:
        node.get_logger().error(f"a callback failed:\n{traceback.format_exc()}", throttle_duration_sec=1.0)


def in_a_thread(job: Callable[[], Any], executor: Executor | None, name: str) -> Future:
    """What a callback may await while the executor takes up other work. The process does not end before it."""
    future = Future(executor=executor)

    def work() -> None:
        try:
            future.set_result(job())
        except Exception as error:
            future.set_exception(error)
        if executor is not None:
            executor.wake()

    threading.Thread(target=work, name=name).start()
    return future


class Diagnostics:
    """Publishes what a node says of itself, the ``statuses`` of the time."""

    def __init__(self, node: Node, statuses: Callable[[], Sequence[DiagnosticStatus]]) -> None:
        self._node, self._statuses = node, statuses
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._timer: Timer | None = None

    def publish_every(self, period_s: float) -> None:
        """From now on in this period, also while simulated time stands still."""
        if self._timer is not None:
            self._node.destroy_timer(self._timer)
        self._timer = self._node.create_timer(period_s, self._publish, clock=STEADY_CLOCK)

    def _publish(self) -> None:
        header = Header(stamp=self._node.get_clock().now().to_msg())
        self._publisher.publish(DiagnosticArray(header=header, status=self._statuses()))


def status_of(level: bytes, name: str, message: str, hardware_id: str, values: Mapping[str, str]) -> DiagnosticStatus:
    """A ``diagnostic_msgs/DiagnosticStatus`` with these values."""
    status = DiagnosticStatus(level=level, name=name, message=message, hardware_id=hardware_id)
    status.values = [KeyValue(key=key, value=value) for key, value in values.items()]
    return status


def refuse_impossible_transitions(node: LifecycleNode) -> None:
    """Let a node answer the request of a transition that its state does not have with "no", and say why in the log.

    Up to Jazzy, rclpy raises an error in the executor instead, and the caller waits for ever. Since Kilted it answers,
    and the log has the number of the transition alone.
    """
    service = next(service for service in node.services if service.srv_type is ChangeState)
    available = next(each for each in node.services if each.srv_name.endswith("/get_available_transitions"))
    change = service.callback

    def callback(request: ChangeState.Request, response: ChangeState.Response) -> ChangeState.Response:
        empty = GetAvailableTransitions.Request(), GetAvailableTransitions.Response()
        asked, possible = request.transition, available.callback(*empty).available_transitions
        known = [each.transition.label if asked.label else each.transition.id for each in possible]
        if (asked.label or asked.id) in known:
            return change(request, response)
        words = "the node is finalized, and nothing is possible from there"
        if possible:
            labels = ", ".join(sorted({each.transition.label for each in possible}))
            words = f"the node is {possible[0].start_state.label}, and possible from there are {labels}"
        names = {getattr(Transition, f"TRANSITION_{name}"): name.lower() for name in TRANSITIONS}
        wanted = asked.label or names.get(asked.id, f"with id {asked.id}")
        node.get_logger().warning(f"the transition {wanted} was refused: {words}")
        response.success = False
        return response

    service.callback = callback


class ManagerBond:
    """The heartbeat by which a lifecycle manager knows that a node lives, as messages of the ROS package ``bond``.

    As nav2's own nodes do (``nav2_util::LifecycleNode``), the node sends it while it is active, with its name as id,
    and never takes the manager for dead. It comes from the executor, so that it ends where that hangs; ``bondpy`` has a
    thread for it, and leaves the node entities that are destroyed, at which the executor fails.
    """

    def __init__(self, node: LifecycleNode) -> None:
        self._node = node
        self._status: Any = None
        self._publisher: Publisher | None = None
        self._timer: Timer | None = None

    def form(self) -> None:
        """Begin it, unless the node starts by itself: then there is no manager, and heartbeats would be for nobody."""
        if self._node.get_parameter("autostart").value:
            return
        try:
            from bond.msg import Status
        except ImportError:
            self._node.get_logger().info(
                "no bond is offered, as the ROS package bond is not installed: give nav2's manager the bond_timeout 0.0"
            )
            return
        self._status = Status(id=self._node.get_name(), instance_id=str(uuid.uuid4()), active=True)
        self._status.heartbeat_period, self._status.heartbeat_timeout = 0.1, 4.0  # s, nav2's
        if self._publisher is None:  # kept, because what goes out just before a publisher is destroyed may be lost
            self._publisher = self._node.create_publisher(Status, "bond", 5)
        self._timer = self._node.create_timer(self._status.heartbeat_period, self._send, clock=STEADY_CLOCK)

    def end(self) -> None:
        """Tell the manager that the node leaves on purpose."""
        if self._timer is not None:
            self._node.destroy_timer(self._timer)
            self._timer, self._status.active = None, False
            self._send()

    def _send(self) -> None:
        assert self._publisher is not None
        self._status.header.stamp = self._node.get_clock().now().to_msg()
        self._publisher.publish(self._status)
