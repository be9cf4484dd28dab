# SPDX-License-Identifier: Apache-2.0
"""Boxes around regions as messages: a table that every ROS has, and ``vision_msgs`` where that is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sensor_msgs.msg import PointCloud2
from std_msgs.msg import Header

from deq_flow_ros.perception.motion_mask import Box
from deq_flow_ros.ros.convert import make_cloud

try:  # from apt alone: there is no wheel
    import vision_msgs.msg as vision
except ImportError:
    vision = None

DETECTIONS: type | None = None if vision is None else vision.Detection2DArray
"""Type of the message of ``detections``; None where vision_msgs is not installed."""
FIELDS = ("x", "y", "width", "height", "area", "motion")
CLASS = "moving"


def box_table(header: Header, boxes: Sequence[Box]) -> PointCloud2:
    """One point for each box, in float32: the centre ``x``, ``y``, ``width``, ``height``, ``area``, ``motion``, px."""
    rows = [(*_centre(box), box.width, box.height, box.area_px, box.motion_px) for box in boxes]
    return make_cloud(header, FIELDS, np.array(rows, np.float32).reshape(-1, len(FIELDS)))


def detections(header: Header, boxes: Sequence[Box], messages: Any = vision) -> Any:
    """The boxes as ``vision_msgs/Detection2DArray``, each with the class "moving" and, as its score, the share of the
    box that moves.

    :param messages: the module of the message types.
    """
    found = []
    for box in boxes:
        x, y = _centre(box)
        centre = messages.Pose2D(position=messages.Point2D(x=x, y=y))
        bounds = messages.BoundingBox2D(center=centre, size_x=float(box.width), size_y=float(box.height))
        hypothesis = messages.ObjectHypothesis(class_id=CLASS, score=box.area_px / (box.width * box.height))
        results = [messages.ObjectHypothesisWithPose(hypothesis=hypothesis)]
        found.append(messages.Detection2D(header=header, results=results, bbox=bounds))
    return messages.Detection2DArray(header=header, detections=found)


def _centre(box: Box) -> tuple[float, float]:
    """Pixel (0, 0) has its centre at the image coordinate (0, 0)."""
    return box.x + (box.width - 1) / 2, box.y + (box.height - 1) / 2
