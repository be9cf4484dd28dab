# SPDX-License-Identifier: Apache-2.0
"""What every ROS process of this package needs: its start, and ways around what rclpy does not do."""

from __future__ import annotations

import logging
import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

import rclpy
from lifecycle_msgs.msg import Transition, TransitionDescription
from lifecycle_msgs.srv import ChangeState, GetAvailableTransitions
from rclpy.exceptions import ParameterException
from rclpy.executors import Executor, ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rclpy.task import Future
from rclpy.utilities import remove_ros_args

from deq_flow_ros.command_line import CommandLine
from deq_flow_ros.host import StopRequest, keep_freed_memory


def start(args: Sequence[str] | None) -> StopRequest:
    """Initialise ROS, and take over the signals.

    ROS's own handlers would close the context at once, and with it whatever is still to be published.

    :param args: the command line, ROS arguments included.
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


def parse_no_options(name: str, usage: str, args: Sequence[str] | None) -> None:
    """Take a command line that may hold nothing but ROS arguments and a request for help.

    :param usage: what that prints.
    :raises SystemExit: with status 0 after the help, 2 for anything else.
    """
    line = CommandLine(name, usage)
    line.usage = f"{name} [--ros-args ...]"
    words = list(sys.argv if args is None else [name, *args])
    # What stands between --ros-args and -- is ROS's, which may be malformed: rclpy.init says how.
    own, within = [], False
    for word in words[1:]:
        within = (within or word == "--ros-args") and word != "--"
        own += [] if within or word == "--" else [word]
    line.parse_args(own)


def words_of(error: Exception) -> str:
    """An error as the user should read it: what we raise says all; of anything else, the place matters."""
    return str(error) if isinstance(error, (OSError, ValueError, RuntimeError)) else traceback.format_exc()


class ClosableNode(Protocol):
    """A node that frees what it holds in ``close``, which may be called more than once."""

    def close(self) -> None: ...

    def destroy_node(self) -> None: ...


AnyNode = TypeVar("AnyNode", bound=ClosableNode)


def run(
    make: Callable[[], AnyNode],
    name: str,
    usage: str,
    args: Sequence[str] | None = None,
    begin: Callable[[AnyNode, StopRequest], bool] | None = None,
) -> int:
    """Run a node as the process until SIGINT or SIGTERM.

    :param usage: what ``--help`` prints.
    :param begin: what the node does first; where it returns False, the process ends.
    :returns: the exit status: 0; 1 where ``begin`` returned False; 2 for a parameter that cannot be.
    :raises SystemExit: for a command line that is wrong (2), or asks for help (0).
    """
    parse_no_options(name, usage, args)
    node = None
    try:
        stop = start(args)
        node = make()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        if begin is not None and not begin(node, stop):
            return 1
        while not stop.requested:
            spin_once(executor, node)
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

    def run() -> None:
        try:
            future.set_result(job())
        except Exception as error:
            future.set_exception(error)
        if executor is not None:
            executor.wake()

    threading.Thread(target=run, name=name).start()
    return future


_TRANSITIONS = {
    getattr(Transition, name): name.removeprefix("TRANSITION_").lower()
    for name in dir(Transition)
    if name.startswith("TRANSITION_")
}
"""Names of the transitions by their numbers."""


def _possible(node: LifecycleNode) -> list[TransitionDescription]:
    """What may be asked of a node in its state."""
    service = next(service for service in node.services if service.srv_name.endswith("/get_available_transitions"))
    answer = service.callback(GetAvailableTransitions.Request(), GetAvailableTransitions.Response())
    return list(answer.available_transitions)


def _state_words(possible: Sequence[TransitionDescription]) -> str:
    """In which state a node is, and what may be asked of it there."""
    if not possible:
        return "the node is finalized, and nothing is possible from there"
    labels = ", ".join(sorted({each.transition.label for each in possible}))
    return f"the node is {possible[0].start_state.label}, and possible from there are {labels}"


def refuse_impossible_transitions(node: LifecycleNode) -> None:
    """Let a node answer the request of a transition that its state does not have with "no", and say why in the log.

    Up to Jazzy, rclpy raises an error in the executor instead, and the caller waits for ever. Since Kilted it answers,
    and the log has the number of the transition alone.
    """
    service = next(service for service in node.services if service.srv_type is ChangeState)
    change = service.callback

    def callback(request: ChangeState.Request, response: ChangeState.Response) -> ChangeState.Response:
        asked, possible = request.transition, _possible(node)
        known = [each.transition.label if asked.label else each.transition.id for each in possible]
        if (asked.label or asked.id) in known:
            return change(request, response)
        response.success = False
        wanted = asked.label or _TRANSITIONS.get(asked.id, f"with id {asked.id}")
        node.get_logger().warning(f"the transition {wanted} was refused: {_state_words(possible)}")
        return response

    service.callback = callback
