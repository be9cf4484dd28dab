# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of the nodes that use the flow share: the flow, the camera of the rendered drive, and KLT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from deq_flow_ros.demo.scene import Scene
from deq_flow_ros.imaging.camera import CameraModel
from deq_flow_ros.model import DEQFlow
from deq_flow_ros.streaming import FlowEstimator

CONFIG = Path(__file__).parents[1] / "config" / "perception.yaml"
CHECK_PX = 1.0
"""How far a point that is tracked forward and back may end from where it began."""


def perception_stream(model: DEQFlow, **changed: Any) -> FlowEstimator:
    """The estimator as ``flow_node`` runs it with ``config/perception.yaml``, without a latency budget.

    :param changed: settings of ``EstimatorSettings`` by name that are to be others than in the file.
    """
    given = yaml.safe_load(CONFIG.read_text())["/**"]["ros__parameters"]
    names = ("max_iterations", "min_scale", "max_scale", "refinement", "direction")
    settings = {name: given[name] for name in names} | changed
    return FlowEstimator(model, latency_budget_ms=None, tolerance_px=None, max_gap_ms=1e9, uncertainty=True, **settings)


def camera_of(scene: Scene) -> CameraModel:
    """The calibration of the rendered images."""
    width, height = scene.settings.width, scene.settings.height
    return CameraModel(scene.focal, scene.focal, (width - 1) / 2, (height - 1) / 2, width, height)


def klt(first: np.ndarray, second: np.ndarray, points: np.ndarray, window_px: int = 21) -> tuple[np.ndarray, ...]:
    """Points (N, 1, 2) float32 px of one grey image in another, by OpenCV, whose default window it is.

    :returns: where they are, (N, 1, 2) float32 px; how far from the start, (N,) px, they end when they are followed
        back, infinite where they are lost; and the mean difference (N,) of the windows in grey levels.
    """
    there, found, differ = cv2.calcOpticalFlowPyrLK(first, second, points, None, winSize=(window_px, window_px))
    back, found_back, _ = cv2.calcOpticalFlowPyrLK(second, first, there, None, winSize=(window_px, window_px))
    apart = np.linalg.norm(back - points, axis=2)[:, 0]
    lost = np.float32(np.inf)
    return there, np.where((found & found_back)[:, 0] == 1, apart, lost), np.where(found == 1, differ, lost)[:, 0]
