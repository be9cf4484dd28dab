# SPDX-License-Identifier: Apache-2.0
"""The base of the nodes that make something of the flow of ``flow_node``: all but the computation itself.

It subscribes while somebody subscribes to an output, computes in a thread of its own, names what it drops, and says on
``/diagnostics`` how it has been doing.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from diagnostic_msgs.msg import DiagnosticStatus
from rcl_interfaces.msg import SetParametersResult
from rclpy.exceptions import ParameterException
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from sensor_msgs.msg import CameraInfo

from deq_flow_ros.imaging import stamp_to_ns
from deq_flow_ros.imaging.camera import CameraModel
from deq_flow_ros.ros import qos
from deq_flow_ros.ros.camera_info import camera_model, image_size, remember
from deq_flow_ros.ros.messages import field_of
from deq_flow_ros.ros.parameter_table import ParameterTable
from deq_flow_ros.ros.perception import OK, PARTS, WARN, FlowField, Pairing, Verdict, check_account, stamps_of
from deq_flow_ros.ros.process import STEADY_CLOCK, Diagnostics, run, status_of
from deq_flow_ros.settings import at_start, live, number, one_of

WATCH_PERIOD_S = 0.2
"""How often the node looks whether somebody subscribes."""
UPSTREAM = "flow_node"
"""The inputs are below this name, as ``flow_node`` publishes them without remapping."""
MORE = 10
"""Messages of further inputs, such as images, that the middleware may hold at least: not each one has a flow field."""
USAGE = """{about}

  ros2 run deq_flow_ros {name} --ros-args -r flow_node/flow:=FLOW -r flow_node/uncertainty:=UNCERTAINTY \\
      -r flow_node/statistics:=STATISTICS -r INPUT:=TOPIC

docs/{name}.md describes its parameters and topics, such as further inputs."""
SUPERSEDED, UNUSABLE = "superseded by a newer field", "could not be used"
"""What drops are counted as. The first is no fault: the node is slower than the flow."""


@dataclass(frozen=True)
class ConsumerSettings(ParameterTable):
    """The parameters that all these nodes have; a node's own table adds the settings of its computation."""

    rectified: bool = live(
        False,
        "whether the images of the flow are rectified ones (image_proc), which P of camera_info describes instead of "
        "K and D",
    )
    qos_reliability: str = at_start(
        one_of("best_effort", "reliable"),
        "reliability that is requested from flow_node. best_effort receives from any publisher",
    )
    qos_depth: int = at_start(number(5, 1, 1000, "messages"), "messages that the middleware may hold")
    silence_warning_s: float = live(
        number(5.0, 0.0, 3600.0, "s"), "time without a flow field after which the node warns. 0 = never"
    )
    diagnostics_period_s: float = at_start(number(1.0, 0.1, 3600.0, "s"), "time between two messages on /diagnostics")


Settings = TypeVar("Settings", bound=ConsumerSettings)


class FlowConsumer(Node, Generic[Settings]):
    """Inherit, and write ``process``.

    :ivar settings: the present values of the parameters.
    :param table: the parameters of the node.
    :param outputs: message types by the names of the topics, which are below ``~/``.
    :param inputs: message type and callback of what else to subscribe to while somebody subscribes, by topic.
    :param held: fields that may wait while one is processed; the oldest is dropped for a new one.
    """

    def __init__(
        self, name: str, table: type[Settings], outputs: Mapping[str, type],
        inputs: Mapping[str, tuple[type, Callable[[Any], None]]] | None = None, held: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(name)
        self._table = table
        table.declare(self)
        answer = self._on_set_parameters(self.get_parameters(table.names()))
        if not answer.successful:
            raise ParameterException(answer.reason, "")
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self._outputs = {each: self.create_publisher(kind, f"~/{each}", qos.output()) for each, kind in outputs.items()}
        self._inputs, self._open = inputs or {}, list[Subscription]()
        self._info: CameraInfo | None = None
        self._infos, self._paired = dict[int, CameraInfo](), False
        self._heard_s, self._silence = time.monotonic(), ""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._lock = threading.Lock()  # of all that follows
        self._waiting, self._held = deque[Mapping[str, Any]](), held
        self._done, self._drops = list[tuple[Verdict, float]](), list[tuple[str, str]]()
        self._told_s = time.monotonic()
        self.create_timer(WATCH_PERIOD_S, self._watch, clock=STEADY_CLOCK)
        Diagnostics(self, self._statuses).publish_every(self.settings.diagnostics_period_s)
        self.get_logger().info(f"waiting for subscribers of {self._names()}")

    def process(self, given: FlowField) -> Verdict:
        """Compute and ``publish``. Called in a thread of its own, never twice at once.

        :raises ValueError: for a field of which nothing can be made; it counts as dropped, with this reason.
        """
        raise NotImplementedError

    def publish(self, topic: str, make: Callable[[], Any]) -> None:
        """Publish what ``make`` returns on an output that somebody subscribes to."""
        if self._outputs[topic].get_subscription_count():
            self._outputs[topic].publish(make())

    def close(self) -> None:
        """Unsubscribe and finish the field in hand."""
        self._unsubscribe()
        self._thread.shutdown()

    def _names(self) -> str:
        return ", ".join(publisher.topic_name for publisher in self._outputs.values())

    def _on_set_parameters(self, parameters: Iterable[Parameter]) -> SetParametersResult:
        try:
            self.settings = self._table.read(self, parameters)
        except ValueError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _watch(self) -> None:
        wanted = any(publisher.get_subscription_count() for publisher in self._outputs.values())
        if wanted and self._open:
            self._check_silence()
        elif wanted:
            self._subscribe()
        elif self._open:
            self._unsubscribe()
            self.get_logger().info("nobody subscribes any more: nothing is computed until somebody does")

    def _subscribe(self) -> None:
        pairing = Pairing(self._on_whole, lambda part: self._drop(f"no {part} with its stamp"))
        # The calibration first: of what has come, the executor takes it before the last part of the field.
        inputs: dict[str, tuple[type, Callable]] = {f"{UPSTREAM}/camera_info": (CameraInfo, self._on_camera_info)}
        inputs |= {f"{UPSTREAM}/{name}": (kind, partial(pairing.add, name)) for name, kind in PARTS.items()}
        depth, reliability = self.settings.qos_depth, ReliabilityPolicy[self.settings.qos_reliability.upper()]
        self._profile = QoSProfile(depth=depth, reliability=reliability)
        for topic, (kind, callback) in {**inputs, **self._inputs}.items():
            profile = QoSProfile(depth=max(depth, MORE) if topic in self._inputs else depth, reliability=reliability)
            self._open.append(self.create_subscription(kind, topic, callback, profile))
        self._heard_s, self._silence = time.monotonic(), ""
        self.get_logger().info(f"waiting for flow on {self.resolve_topic_name(f'{UPSTREAM}/flow')}")

    def _unsubscribe(self) -> None:
        while self._open:
            self.destroy_subscription(self._open.pop())
        with self._lock:
            self._waiting.clear()
        self._infos.clear()
        self._paired = False  # who publishes next may give all fields one camera_info

    def _check_silence(self) -> None:
        silent_s, silence = time.monotonic() - self._heard_s, ""
        if 0.0 < self.settings.silence_warning_s < silent_s:
            topic = self.resolve_topic_name(f"{UPSTREAM}/flow")
            offers = self.get_publishers_info_by_topic(topic)
            why = f"{topic} is published, but nothing arrives: see what flow_node says on /diagnostics"
            if not offers:
                why = f"nobody publishes {topic}: start flow_node, or remap {UPSTREAM}/flow to the topic of its flow"
            elif "sensor_msgs/msg/Image" not in {offer.topic_type for offer in offers}:
                why = f"expected sensor_msgs/msg/Image on {topic}, got {offers[0].topic_type}: remap {UPSTREAM}/flow"
            silence = f"no flow for {silent_s:.0f} s: {qos.mismatch(topic, self._profile, offers) or why}"
            if not self._silence:
                self.get_logger().warning(silence)
        self._silence = silence

    def _on_camera_info(self, message: CameraInfo) -> None:
        self._info = message
        remember(self._infos, message)

    def _on_whole(self, parts: Mapping[str, Any]) -> None:
        self._heard_s = time.monotonic()
        with self._lock:
            if len(self._waiting) == self._held:
                self._waiting.popleft()
                self._drops.append((SUPERSEDED, SUPERSEDED))
            self._waiting.append(parts)
        self._thread.submit(self._work)

    def _work(self) -> None:
        with self._lock:
            if not self._waiting:  # one took the place of another, or nobody wants them any more
                return
            parts = self._waiting.popleft()
        began_s = time.monotonic()
        try:
            verdict = self.process(self._field(parts))
        except ValueError as error:
            self._drop(UNUSABLE, str(error))
        except Exception:  # the thread would go on without a word
            self._drop(UNUSABLE, traceback.format_exc())
        else:
            with self._lock:
                self._done.append((verdict, time.monotonic() - began_s))

    def _drop(self, kind: str, reason: str = "") -> None:
        with self._lock:
            self._drops.append((kind, reason or kind))
        self.get_logger().warning(f"a flow field is dropped: {reason or kind}", throttle_duration_sec=10.0)

    def _field(self, parts: Mapping[str, Any]) -> FlowField:
        header, account = parts["flow"].header, parts["statistics"]
        flow, uncertainty = field_of(parts["flow"], "32FC2"), field_of(parts["uncertainty"], "32FC1")
        if uncertainty.shape != flow.shape[:2]:
            raise ValueError(f"expected flow and uncertainty of one size, got {flow.shape[:2]} and {uncertainty.shape}")
        check_account(account)
        camera = self._camera(stamp_to_ns(header.stamp), flow.shape[:2])
        return FlowField(header, flow, uncertainty, account.get("repeated") == "true", stamps_of(account), *camera)

    def _camera(self, stamp_ns: int, shape: tuple[int, ...]) -> tuple[CameraModel | None, str]:
        info, topic = self._infos.get(stamp_ns), self.resolve_topic_name(f"{UPSTREAM}/camera_info")
        # flow_node sends one with each field, unless the camera zooms; another publisher perhaps once for all.
        self._paired |= info is not None
        if info is None and self._paired:
            return None, f"no camera_info with the stamp of the flow came on {topic}: it got lost, or the camera zooms"
        info = info or self._info
        if info is None:
            return None, f"no camera_info has come on {topic}"
        if image_size(info) != shape:
            return None, f"camera_info describes fields of {image_size(info)} px, not {shape}"
        try:
            return camera_model(info, self.settings.rectified), ""
        except ValueError as error:
            return None, f"camera_info cannot be used: {error}"

    def _statuses(self) -> list[DiagnosticStatus]:
        """What has happened since the last status; figures are those of the last field."""
        with self._lock:
            done, drops, began_s = self._done, self._drops, self._told_s
            self._done, self._drops, self._told_s = [], [], time.monotonic()
        level, words = OK, "no flow field has come"
        values = {"fields_hz": f"{len(done) / (self._told_s - began_s):.2f}"}
        if done:
            values["compute_ms"] = f"{1e3 * sum(seconds for _, seconds in done) / len(done):.1f}"
            values |= done[-1][0].values
            level = max(verdict.level for verdict, _ in done)
            worst = [verdict.words for verdict, _ in done if verdict.level == level]
            words = worst[-1] if level == OK else f"{len(worst)} of {len(done)} fields: {worst[-1]}"
        values |= {f"dropped: {kind}": str(count) for kind, count in Counter(kind for kind, _ in drops).items()}
        if self._silence:
            level, words = DiagnosticStatus.STALE, self._silence
        if faults := [reason for kind, reason in drops if kind != SUPERSEDED]:
            level, words = max(level, WARN), f"{len(faults)} fields dropped: {faults[-1]}; {words}"
        if not self._open:
            level, words = OK, f"nothing is computed: nobody subscribes to {self._names()}"
        return [status_of(level, f"{self.get_fully_qualified_name()[1:]}: flow", words, "", values)]


def main_of(node: Callable[[], FlowConsumer], name: str, about: str | None) -> Callable[..., int]:
    """The function that runs a node's process, see ``process.run``; ``about`` is what ``--help`` says first."""
    return partial(run, node, name, USAGE.format(about=(about or "").replace("``", ""), name=name))
