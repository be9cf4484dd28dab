# SPDX-License-Identifier: Apache-2.0
"""What comes in from one camera: images by the transport that is there, camera_info, and words where nothing comes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Set as AbstractSet

from rclpy.impl.rcutils_logger import RcutilsLogger
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from deq_flow_ros.imaging.video import VideoDecoder
from deq_flow_ros.ros import qos
from deq_flow_ros.ros.accounts import RATE_LIMITED, UNHEARD
from deq_flow_ros.ros.camera_info import remember
from deq_flow_ros.ros.health import Clocks
from deq_flow_ros.ros.messages import ImageMessage, ReceivedFrame, Source, candidates, video_image
from deq_flow_ros.ros.parameters import NodeSettings
from deq_flow_ros.ros.process import STEADY_CLOCK
from deq_flow_ros.streaming.continuity import StampOrder

MAX_WAIT_NS = 1_000_000_000
"""Longest time in the middleware that is believed; beyond it, the wall clock was set, or no time was given."""
STEP_NS = 10_000_000_000
"""A clock that is set by less is believed at once. Beyond, a single stamp may be garbage."""
WATCH_PERIOD_S = 0.5


class RateLimit:
    """At most so many images per second; one may come a period early, or jitter would cost images of a camera whose
    rate lies at the limit.
    """

    def __init__(self) -> None:
        self._due_ns: float | None = None

    def passes(self, now_ns: int, rate_hz: float) -> bool:
        """Whether an image that comes now, on any clock that does not go back, may pass; a rate of 0 is no limit."""
        if not rate_hz:
            self._due_ns = None
            return True
        period_ns = 1e9 / rate_hz  # another one than before, perhaps
        due_ns = now_ns + period_ns if self._due_ns is None else min(self._due_ns, now_ns + 2 * period_ns)
        early = now_ns < due_ns - period_ns
        self._due_ns = due_ns if early else max(due_ns, now_ns) + period_ns
        return not early


class CameraInput:
    """The subscriptions of one camera, from its construction to ``close``. For the executor's thread alone.

    :param wanted: gives the outputs that somebody subscribes to.
    :param arrivals: where it notes when an image came, in s, and how many the middleware lost before it.
    :ivar settings: as they are now; transport and quality of service are those of the construction.
    :ivar camera_info, infos: the last one that came, or None; the last ones, by their stamps in ns.
    :ivar info_topic: where it comes from; None where that would be the node's own output.
    :ivar rectified: whether the images are rectified, which by image_proc's convention the name ``image_rect`` says.
    :ivar heard: whether somebody subscribed to an output when the last image came, or the node works without.
    :ivar silence: why no image comes (``qos.silence``); None while they do.
    """

    def __init__(
        self, node: Node, prefix: str, settings: NodeSettings, wanted: Callable[[], AbstractSet[str]],
        arrivals: deque[tuple[float, int]], logger: RcutilsLogger, on_frame: Callable[[ReceivedFrame], None],
    ) -> None:  # fmt: skip
        self.settings = settings
        self.silence: str | None = None
        self.camera_info: CameraInfo | None = None
        self.infos: dict[int, CameraInfo] = {}
        self.heard = True
        self._anew: str | None = None
        self._node, self._wanted, self._arrivals = node, wanted, arrivals
        self._logger, self._on_frame = logger, on_frame
        self._rate = RateLimit()
        self.forget_order()
        self._closed = False
        self._candidates = candidates(node, prefix, settings.image_transport)
        image_topic = self._candidates[-1].topic
        # By image_transport's convention beside the image, but not where the node itself publishes.
        beside = node.resolve_topic_name(f"{image_topic.rpartition('/')[0]}/camera_info")
        self.info_topic = None if beside == node.resolve_topic_name(f"{prefix}camera_info") else beside
        self.rectified = image_topic.rpartition("/")[2].startswith("image_rect")
        self._subscription: Subscription | None = None
        self._info_subscriptions: list[Subscription] = []
        self._timer = node.create_timer(WATCH_PERIOD_S, self._watch, clock=STEADY_CLOCK)
        try:
            self._subscribe(self._candidates[0])
            self._subscribe_to_camera_info()
        except Exception:  # a QoS override that cannot be read, for example
            self.close()
            raise

    def topics(self) -> set[str]:
        """What may be subscribed to: all that may carry the images, and the calibration."""
        return {source.topic for source in self._candidates} | ({self.info_topic} if self.info_topic else set())

    def clocks(self) -> Clocks:
        """What is known of the clocks of the images and of the node."""
        names = {offer.node_name for offer in self._node.get_publishers_info_by_topic(self._source.topic)}
        return Clocks(
            played=any("player" in name for name in names),  # ours, and rosbag2's
            simulated=bool(self._node.get_parameter_or("use_sim_time").value),
            offered=self._node.count_publishers("/clock") > 0,
        )

    def forget_order(self) -> None:
        """The next image is taken whatever its stamp."""
        self._order = StampOrder()
        self._latest_arrival_ns: int | None = None

    def close(self) -> None:
        """Unsubscribe from everything."""
        self._closed = True
        self._node.destroy_timer(self._timer)
        for subscription in (self._subscription, *self._info_subscriptions):
            if subscription is not None:
                self._node.destroy_subscription(subscription)
        # Their callbacks hold this object: the circle would keep the camera's memory until it is searched for.
        del self._timer, self._subscription, self._info_subscriptions

    def _subscribe(self, source: Source) -> None:
        if self._subscription is not None:
            self._node.destroy_subscription(self._subscription)
        self._source = source
        self._video = None if source.kind in (Image, CompressedImage) else VideoDecoder()
        reliability = ReliabilityPolicy[self.settings.qos_reliability.upper()]
        self._qos = QoSProfile(depth=self.settings.qos_depth, reliability=reliability)
        self._subscription = self._node.create_subscription(
            source.kind, source.topic, qos.with_info(self._on_message), self._qos, event_callbacks=qos.SILENT,
            qos_overriding_options=qos.override_options(self._node, source.topic),
        )  # fmt: skip
        self._last_number, self._warnings, self._arrived, self._mismatch = 0, 0, False, ""
        self._heard_s = time.monotonic()
        self._logger.info(f"waiting for {source.kind.__name__} messages on {source.topic}")

    def _subscribe_to_camera_info(self) -> None:
        if self.info_topic is None:
            self._logger.info("no camera_info: remap the input image, and the camera_info beside it is used")
            return
        overrides = qos.override_options(self._node, self.info_topic)
        # Drivers send it with each image, for anyone; map servers, simulators and players once, for whoever comes
        # later, which only a subscription that asks for it receives.
        for profile, options in ((qos.sensor_data(), overrides), (qos.latched(), None)):
            subscription = self._node.create_subscription(
                CameraInfo, self.info_topic, self._on_camera_info, profile, event_callbacks=qos.SILENT,
                qos_overriding_options=options,
            )  # fmt: skip
            self._info_subscriptions.append(subscription)

    def _on_message(self, message: ImageMessage, info: dict[str, int]) -> None:
        arrival_ns = arrival(info["received_timestamp"], time.time_ns(), time.monotonic_ns())
        if self._closed:
            return  # taken from the middleware just before the subscription went
        if self._warnings:
            silent_s = time.monotonic() - self._heard_s
            self._logger.info(f"images come on {self._source.topic} after {silent_s:.1f} s without any")
        self.silence = None
        self._arrived, self._warnings, self._heard_s = True, 0, time.monotonic()
        lost, refused = self._lost_before(info["publication_sequence_number"]), None
        if self._video is not None:
            message, refused = video_image(self._video, message, lost)
        stamp = message.header.stamp  # perhaps one that rclpy.time refuses: before 1970
        stamp_ns = stamp.sec * 1_000_000_000 + stamp.nanosec
        self._arrivals.append((arrival_ns * 1e-9, lost))
        now_ns = self._node.get_clock().now().nanoseconds  # 0: simulated time has not begun
        age_ms = (now_ns - (time.monotonic_ns() - arrival_ns) - stamp_ns) * 1e-6 if now_ns else None
        frame = ReceivedFrame(message, arrival_ns, stamp_ns, age_ms, refused, wanted=self._wanted())
        self._judge(frame)
        self._on_frame(frame)

    def _judge(self, frame: ReceivedFrame) -> None:
        heard, before = self.settings.always_on or bool(frame.wanted), self.heard
        self.heard = heard
        if heard and not before:
            self._anew = "nobody subscribed to the flow before"
            self._logger.info("images are processed from now on")
        elif before and not heard:
            self._logger.info(
                "nobody subscribes to the flow or another output of this camera: its images are not processed until "
                "somebody does (parameter always_on: also without); ~/statistics and /diagnostics do not count"
            )
        # Not in the stream behind: there a message that was sent twice would take the place of the image that waits.
        if frame.refused is not None:  # video without a picture
            return
        if not self._rate.passes(frame.arrival_ns, self.settings.max_rate_hz):
            frame.refused = RATE_LIMITED
            return
        # How far a stamp may be ahead of the last one: as far as time went on since then, and a step or gap more.
        since_ns = 0 if self._latest_arrival_ns is None else frame.arrival_ns - self._latest_arrival_ns
        furthest_ns = since_ns + max(STEP_NS, round(1e6 * self.settings.max_gap_ms))
        frame.refused = self._order.why_out(frame.stamp_ns, furthest_ns)
        if frame.refused is None:
            self._latest_arrival_ns = frame.arrival_ns
            frame.starts_anew = self._order.anew
            if not heard:
                frame.refused = UNHEARD
            elif self._anew is not None:
                frame.starts_anew, self._anew = self._anew, None

    def _lost_before(self, number: int) -> int:
        """Messages that the middleware lost between the last one and this, by the publisher's numbers."""
        lost = number - self._last_number - 1 if self._last_number else 0
        self._last_number = number
        if lost <= 0 or self._node.count_publishers(self._source.topic) != 1:
            return 0  # another publisher, or several: their numbers are not related
        return lost

    def _on_camera_info(self, message: CameraInfo) -> None:
        self.camera_info = message
        remember(self.infos, message)

    def _watch(self) -> None:
        """Look at who publishes: change to another transport where the one in use is not published, or has not
        delivered anything yet; name what cannot be received, and why nothing comes.
        """
        if self._closed:
            return
        topics = {source.topic for source in self._candidates}
        published = {topic: self._node.get_publishers_info_by_topic(topic) for topic in topics}
        offers = {
            source: [offer for offer in published[source.topic] if offer.topic_type == source.type_name()]
            for source in self._candidates
        }
        offered = [source for source in self._candidates if offers[source]]
        if offered and self._source != offered[0] and not (self._arrived and self._source in offered):
            before = self._source.topic
            self._subscribe(offered[0])
            self._logger.info(f"changed from {before} to {offered[0].topic}, which is what is published")
        topic = self._source.topic
        mismatch = qos.mismatch(topic, self._qos, offers[self._source]) or ""
        if mismatch and mismatch != self._mismatch:
            self._logger.warning(mismatch)
        self._mismatch = mismatch
        silent_s, limit_s = time.monotonic() - self._heard_s, self.settings.silence_warning_s
        if limit_s and silent_s >= limit_s:
            self.silence = qos.silence(topic, self._source.type_name(), published[topic], silent_s, self._qos)
            if silent_s >= limit_s * 2**self._warnings:
                self._warnings += 1
                self._logger.warning(self.silence)


def arrival(received_ns: int, wall_ns: int, monotonic_ns: int) -> int:
    """When a message arrived, on the clock of ``monotonic_ns``, from the wall-clock time of the middleware.

    It counts as just arrived where that cannot be: some middlewares (Cyclone DDS of ROS Humble) give 0, and the wall
    clock may be set between the two readings.
    """
    waited_ns = wall_ns - received_ns
    believed = received_ns > 0 and 0 <= waited_ns <= MAX_WAIT_NS
    return monotonic_ns - waited_ns if believed else monotonic_ns
