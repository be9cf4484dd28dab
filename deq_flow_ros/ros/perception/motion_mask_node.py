# SPDX-License-Identifier: Apache-2.0
"""``motion_mask``: what moves by itself while the camera moves, from the flow of ``flow_node``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sensor_msgs.msg import Image, Imu, PointCloud2
from std_msgs.msg import Header

from deq_flow_ros.imaging import stamp_to_ns
from deq_flow_ros.perception import Gyroscope, rotation_of
from deq_flow_ros.perception.motion_mask import Box, MaskSettings, MotionSegmenter
from deq_flow_ros.ros.messages import array_to_image, make_cloud, table_of
from deq_flow_ros.ros.perception import OK, REPEATED, WARN, FlowField, Verdict
from deq_flow_ros.ros.perception.flow_consumer import ConsumerSettings, FlowConsumer, main_of
from deq_flow_ros.ros.qos import sensor_data
from deq_flow_ros.settings import at_start

try:  # from apt alone: there is no wheel
    import vision_msgs.msg as vision
except ImportError:
    vision = None

DETECTIONS: type | None = None if vision is None else vision.Detection2DArray
"""Type of the message of ``detections``; None where vision_msgs is not installed."""
FIELDS = ("x", "y", "width", "height", "area", "motion")
"""Of the points of ``~/boxes``: those of a ``Box``."""


def detections(header: Header, boxes: Sequence[Box], messages: Any = vision) -> Any:
    """The boxes as ``vision_msgs/Detection2DArray``, each with the class "moving" and, as its score, the share of the
    box that moves.

    :param messages: the module of the message types.
    """
    found = []
    for box in boxes:
        centre = messages.Pose2D(position=messages.Point2D(x=box.x, y=box.y))
        bounds = messages.BoundingBox2D(center=centre, size_x=float(box.width), size_y=float(box.height))
        hypothesis = messages.ObjectHypothesis(class_id="moving", score=box.area / (box.width * box.height))
        results = [messages.ObjectHypothesisWithPose(hypothesis=hypothesis)]
        found.append(messages.Detection2D(header=header, results=results, bbox=bounds))
    return messages.Detection2DArray(header=header, detections=found)


@dataclass(frozen=True)
class MaskNodeSettings(ConsumerSettings, MaskSettings):
    """The parameters of ``motion_mask``."""

    imu: bool = at_start(False, "whether the topic imu gives the rotation of the camera; it needs camera_info")
    imu_to_camera: tuple[float, ...] = at_start(
        (0.0, 0.0, 0.0, 1.0),
        "quaternion [x, y, z, w] that turns directions from the axes of the IMU to those of the camera's optical frame",
    )

    def check(self) -> None:
        if len(self.imu_to_camera) != 4:
            raise ValueError(f"imu_to_camera: expected [x, y, z, w], got {list(self.imu_to_camera)}")
        rotation_of(np.array(self.imu_to_camera))


class MotionMaskNode(FlowConsumer[MaskNodeSettings]):
    """Publishes ``~/mask``, ``~/boxes`` and, where vision_msgs is installed, ``~/detections``."""

    def __init__(self) -> None:
        outputs = {"mask": Image, "boxes": PointCloud2} | ({"detections": DETECTIONS} if DETECTIONS else {})
        super().__init__("motion_mask", MaskNodeSettings, outputs)
        self._segmenter: MotionSegmenter | None = None
        self._gyroscope = Gyroscope(rotation_of(np.array(self.settings.imu_to_camera)))
        if self.settings.imu:
            profile = sensor_data()
            profile.depth = 200  # some IMUs send 1000 messages a second
            self.create_subscription(Imu, "imu", self._on_imu, profile)
        if DETECTIONS is None:
            self.get_logger().info("no ~/detections: vision_msgs is not installed; ~/boxes has the same boxes")

    def process(self, given: FlowField) -> Verdict:
        shape, header = given.uncertainty.shape, given.header
        if self._segmenter is None or (self._segmenter.shape, self._segmenter.camera) != (shape, given.camera):
            self._segmenter = MotionSegmenter((shape[0], shape[1]), given.camera)
        rotation = self._gyroscope.rotation(*given.stamps_ns)
        found = self._segmenter(given.flow, given.uncertainty, self.settings, rotation)
        values = {"moving_share": f"{found.mask.mean():.4f}", "boxes": str(len(found.boxes))}
        if (motion := found.ego_motion) is not None:
            values |= {"model": motion.model, "inliers": f"{motion.inliers:.3f}", "noise_px": f"{found.noise_px:.3f}"}
        if not found.problem:
            self.publish("mask", lambda: array_to_image(found.mask.astype(np.uint8) * 255, "mono8", header))
            self.publish("boxes", lambda: make_cloud(header, table_of(FIELDS, np.array(found.boxes))))
            if DETECTIONS is not None:
                self.publish("detections", lambda: detections(header, found.boxes))
        if given.repeated:
            return Verdict(REPEATED, WARN, values)
        if found.problem or motion is None:
            return Verdict(f"no mask, because {found.problem}", WARN, values)
        words = f"{motion.model} explains {motion.inliers:.0%} of the flow, {len(found.boxes)} moving regions"
        level = OK
        if given.camera_problem:
            words += f"; what is nearer or farther may count as moving, because {given.camera_problem}"
            level = WARN
        if self.settings.imu and rotation is None:
            topic = self.resolve_topic_name("imu")
            words += f"; no measurements on {topic} around the two images, so that the rotation was fitted as well"
            level = WARN
        return Verdict(words, level, values)

    def _on_imu(self, message: Imu) -> None:
        rate = message.angular_velocity
        if message.angular_velocity_covariance[0] != -1:  # -1: it measures none
            self._gyroscope.add(stamp_to_ns(message.header.stamp), np.array([rate.x, rate.y, rate.z]))


main = main_of(MotionMaskNode, "motion_mask", __doc__)

if __name__ == "__main__":
    sys.exit(main())
