# SPDX-License-Identifier: Apache-2.0
"""The base of the nodes that make something of the flow of ``flow_node``: all but the computation itself.

It subscribes while somebody subscribes to an output, brings together what belongs to one flow field, computes in a
thread of its own, names what it drops, and says on ``/diagnostics`` how it has been doing.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus
from rcl_interfaces.msg import SetParametersResult
from rclpy.exceptions import ParameterException
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from sensor_msgs.msg import CameraInfo
from std_msgs.msg import Header

from deq_flow_ros.imaging import stamp_to_ns
from deq_flow_ros.imaging.camera import CameraModel
from deq_flow_ros.ros import qos
from deq_flow_ros.ros.camera_info import camera_model, image_size, remember
from deq_flow_ros.ros.messages import field_of
from deq_flow_ros.ros.parameter_table import ParameterTable
from deq_flow_ros.ros.perception.fields import PARTS, SUPERSEDED, Pairing, Tally, Verdict, check_account, stamps_of
from deq_flow_ros.ros.process import STEADY_CLOCK, Diagnostics
from deq_flow_ros.settings import at_start, live, number, one_of

WATCH_PERIOD_S = 0.2
"""How often the node looks whether somebody subscribes."""
UPSTREAM = "flow_node"
"""The inputs are below this name, as ``flow_node`` publishes them without remapping."""
UNUSABLE = "could not be used"


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
Input: TypeAlias = tuple[type, Callable[[Any], None], int]
"""Message type and callback of a subscription, and how many messages the middleware holds for it at least."""


@dataclass(frozen=True)
class FlowField:
    """A flow field and what belongs to it.

    :ivar header: stamp and frame of the image on whose pixels the flow lives.
    :ivar flow: (H, W, 2) float32 px; NaN where there is none.
    :ivar uncertainty: (H, W) float32 px, the expected error of the flow.
    :ivar repeated: whether the flow is zero because an image came twice.
    :ivar stamps_ns: of that image, and of the one that the flow points to: for backward flow, the earlier one.
    :ivar camera: of these pixels; None while none is known, which ``camera_problem`` then says why.
    :ivar camera_problem: empty where there is a camera.
    """

    header: Header
    flow: np.ndarray
    uncertainty: np.ndarray
    repeated: bool
    stamps_ns: tuple[int, int]
    camera: CameraModel | None
    camera_problem: str


class FlowConsumer(Node, Generic[Settings]):
    """Inherit, and write ``process``.

    :ivar settings: the present values of the parameters.
    :ivar tally: of the fields since the last message on ``/diagnostics``.
    :param name: of the node.
    :param table: its parameters.
    :param outputs: message types by the names of the topics, which are below ``~/``.
    :param held: fields that may wait while one is processed; the oldest is dropped for a new one.
    """

    def __init__(
        self,
        name: str,
        table: type[Settings],
        outputs: Mapping[str, type],
        held: int = 1,
    ) -> None:
        super().__init__(name)
        self._table = table
        table.declare(self)
        self.settings = table()
        answer = self._on_set_parameters(self._parameters.values())
        if not answer.successful:
            raise ParameterException(answer.reason, "")
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self._outputs = {
            topic: self.create_publisher(kind, f"~/{topic}", qos.output()) for topic, kind in outputs.items()
        }
        self._subscriptions_of_flow: list[Subscription] = []
        self._pairing = Pairing(self._on_whole, lambda part: self._drop(f"no {part} with its stamp"))
        self._info: CameraInfo | None = None
        self._infos, self._paired = dict[int, CameraInfo](), False
        self._heard_s, self._silence, self._warned = time.monotonic(), "", False
        self._lock = threading.Condition()
        self._waiting: deque[Mapping[str, Any]] = deque()
        self._held, self._stopped = held, False
        self.tally = Tally()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()
        self.create_timer(WATCH_PERIOD_S, self._watch, clock=STEADY_CLOCK)
        Diagnostics(self, self._statuses).publish_every(self.settings.diagnostics_period_s)
        self.get_logger().info(f"waiting for subscribers of {', '.join(self._names_of_outputs())}")

    def process(self, given: FlowField) -> Verdict:
        """Compute and ``publish``. Called in a thread of its own, never twice at once.

        :returns: what is to be said of it.
        :raises ValueError: for a field of which nothing can be made; it counts as dropped, with this reason.
        """
        raise NotImplementedError

    def on_restart(self) -> None:
        """The fields that come do not follow those before. Called in the executor's thread; to be overridden."""

    def more_inputs(self) -> Mapping[str, Input]:
        """What else to subscribe to while somebody subscribes to an output, by topic; to be overridden."""
        return {}

    def publish(self, topic: str, message: Any) -> None:
        """Publish on an output."""
        self._outputs[topic].publish(message)

    def wanted(self) -> set[str]:
        """The outputs that somebody subscribes to."""
        return {topic for topic, publisher in self._outputs.items() if publisher.get_subscription_count()}

    def close(self) -> None:
        """Unsubscribe and finish the field in hand."""
        self._unsubscribe()
        with self._lock:
            self._stopped = True
            self._waiting.clear()
            self._lock.notify()
        self._thread.join()

    def _names_of_outputs(self) -> list[str]:
        return [publisher.topic_name for publisher in self._outputs.values()]

    def _on_set_parameters(self, parameters: Iterable[Parameter]) -> SetParametersResult:
        try:
            self._table.check_choices(parameters)
            self.settings = self._table.read(self, parameters)
        except ValueError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _watch(self) -> None:
        if self.wanted() and not self._subscriptions_of_flow:
            self._subscribe()
        elif self._subscriptions_of_flow and not self.wanted():
            self._unsubscribe()
            self.get_logger().info("nobody subscribes any more: nothing is computed until somebody does")
        elif self._subscriptions_of_flow:
            self._check_silence()

    def _subscribe(self) -> None:
        depth, reliability = self.settings.qos_depth, ReliabilityPolicy[self.settings.qos_reliability.upper()]
        self._profile = QoSProfile(depth=depth, reliability=reliability)
        # The calibration first: of what has come, the executor takes it before the last part of the field.
        inputs: dict[str, Input] = {f"{UPSTREAM}/camera_info": (CameraInfo, self._on_camera_info, depth)}
        for name, kind in PARTS.items():
            inputs[f"{UPSTREAM}/{name}"] = kind, partial(self._pairing.add, name), depth
        for topic, (kind, callback, least_depth) in {**inputs, **self.more_inputs()}.items():
            profile = QoSProfile(depth=max(depth, least_depth), reliability=reliability)
            self._subscriptions_of_flow.append(self.create_subscription(kind, topic, callback, profile))
        self._heard_s, self._silence, self._warned = time.monotonic(), "", False
        self.get_logger().info(f"waiting for flow on {self._flow_topic()}")

    def _unsubscribe(self) -> None:
        for subscription in self._subscriptions_of_flow:
            self.destroy_subscription(subscription)
        self._subscriptions_of_flow.clear()
        self._pairing.forget()
        self._infos.clear()
        self._paired = False  # who publishes next may give all fields one camera_info
        self.on_restart()

    def _flow_topic(self) -> str:
        return self.resolve_topic_name(f"{UPSTREAM}/flow")

    def _check_silence(self) -> None:
        silent_s = time.monotonic() - self._heard_s
        if not 0.0 < self.settings.silence_warning_s < silent_s:
            self._silence, self._warned = "", False
            return
        topic = self._flow_topic()
        offers = self.get_publishers_info_by_topic(topic)
        why = f"{topic} is published, but nothing arrives: see what flow_node says on /diagnostics"
        if not offers:
            why = f"nobody publishes {topic}: start flow_node, or remap {UPSTREAM}/flow to the topic of its flow"
        elif "sensor_msgs/msg/Image" not in {offer.topic_type for offer in offers}:
            why = f"expected sensor_msgs/msg/Image on {topic}, got {offers[0].topic_type}: remap {UPSTREAM}/flow"
        self._silence = f"no flow for {silent_s:.0f} s: {qos.mismatch(topic, self._profile, offers) or why}"
        if not self._warned:
            self._warned = True
            self.get_logger().warning(self._silence)

    def _on_camera_info(self, message: CameraInfo) -> None:
        self._info = message
        remember(self._infos, message)

    def _on_whole(self, parts: Mapping[str, Any]) -> None:
        self._heard_s = time.monotonic()
        with self._lock:
            if len(self._waiting) == self._held:
                self._waiting.popleft()
                self.tally.drop(SUPERSEDED, SUPERSEDED)
            self._waiting.append(parts)
            self._lock.notify()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._stopped or self._waiting)
                if self._stopped:
                    return
                parts = self._waiting.popleft()
            started_s = time.monotonic()
            try:
                verdict = self.process(self._field(parts))
            except ValueError as error:
                self._drop(UNUSABLE, str(error))
            except Exception:  # without this thread nothing would come any more
                self._drop(UNUSABLE, traceback.format_exc())
            else:
                self.tally.add(verdict, time.monotonic() - started_s)

    def _field(self, parts: Mapping[str, Any]) -> FlowField:
        flow, uncertainty = field_of(parts["flow"], "32FC2"), field_of(parts["uncertainty"], "32FC1")
        if uncertainty.shape != flow.shape[:2]:
            raise ValueError(f"expected flow and uncertainty of one size, got {flow.shape[:2]} and {uncertainty.shape}")
        repeated, stamps_ns = check_account(parts["statistics"]), stamps_of(parts["statistics"])
        camera = self._camera(stamp_to_ns(parts["flow"].header.stamp), flow.shape[:2])
        return FlowField(parts["flow"].header, flow, uncertainty, repeated, stamps_ns, *camera)

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

    def _drop(self, kind: str, reason: str = "") -> None:
        self.tally.drop(kind, reason or kind)
        self.get_logger().warning(f"a flow field is dropped: {reason or kind}", throttle_duration_sec=10.0)

    def _statuses(self) -> list[DiagnosticStatus]:
        idle = "" if self._subscriptions_of_flow else f"nobody subscribes to {', '.join(self._names_of_outputs())}"
        return [self.tally.status(f"{self.get_fully_qualified_name()[1:]}: flow", idle, self._silence)]
