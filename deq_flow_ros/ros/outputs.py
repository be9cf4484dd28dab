# SPDX-License-Identifier: Apache-2.0
"""What the node gives out of one camera: messages of flow and residual, each only where somebody subscribes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.lifecycle import LifecycleNode, LifecyclePublisher
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2
from std_msgs.msg import Header

from deq_flow_ros.imaging.camera import CameraModel, NormalizedFlow
from deq_flow_ros.imaging.encodings import encode_image
from deq_flow_ros.imaging.pictures import TABLE_RADIUS, color_table, flow_to_color
from deq_flow_ros.ros import qos
from deq_flow_ros.ros.camera_info import Calibration
from deq_flow_ros.ros.messages import array_to_image, compressed_image, make_cloud, table_of
from deq_flow_ros.ros.parameters import NodeSettings
from deq_flow_ros.streaming import FlowResult
from deq_flow_ros.streaming.interface import Palette

ACCOUNTS = "statistics"
_TOPICS = {
    ACCOUNTS: DiagnosticArray,
    "flow": Image,
    "flow_color": Image,
    "flow_color/compressed": CompressedImage,
    "residual": Image,
    "uncertainty": Image,
    "points": PointCloud2,
    "camera_info": CameraInfo,
}
FLOW_FIELDS = ("u", "v", "du", "dv", "residual")
RAY_FIELDS = ("x", "y", "z", "rate_x", "rate_y", "rate_z")
"""Of ``~/points``: always, and with a calibrated camera."""
COLORED = frozenset(("flow_color", "flow_color/compressed"))
RESIDUAL = frozenset(("residual", "points"))
DESCRIBED = frozenset(("points", "camera_info"))
"""Outputs that need the colours, the residual, or the calibration."""


@lru_cache(maxsize=8)
def make_palette(max_px: float) -> Palette:
    """The colours of ``flow_to_color``, for a device that paints; ``max_px`` is the parameter ``color_max_px``."""
    return Palette(color_table(), TABLE_RADIUS, max_px or None)


class FlowOutputs:
    """The publishers of one camera, from configure to cleanup, under ``prefix``: "~/", or "~/NAME/" of a named camera.

    Reliable, with few messages kept, unless ROS's own QoS overrides say otherwise: the parameters
    ``qos_overrides.TOPIC.publisher.{history,depth,reliability,durability}`` at start.

    :ivar logger: of this camera alone, so that throttling one camera's words does not swallow another's.
    :raises RuntimeError: for such a parameter with a value that is none; or rclpy's ParameterException.
    """

    def __init__(self, node: LifecycleNode, prefix: str) -> None:
        self._node = node
        name = prefix.strip("~/")
        self.logger = node.get_logger().get_child(name) if name else node.get_logger()
        self._said = {"missing": "", "strange": ""}
        self._publishers: dict[str, LifecyclePublisher] = {}
        accounts = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
        try:
            for name, kind in _TOPICS.items():
                # Overrides are written into the profile given.
                self._publishers[name] = node.create_lifecycle_publisher(
                    kind, prefix + name, accounts if name == ACCOUNTS else qos.output(),
                    qos_overriding_options=QoSOverridingOptions(qos.OVERRIDABLE),
                )  # fmt: skip
        except Exception:
            self.destroy()
            raise

    def destroy(self) -> None:
        """Give the publishers back."""
        while self._publishers:
            self._node.destroy_lifecycle_publisher(self._publishers.popitem()[1])

    def wanted(self) -> set[str]:
        """Names of the outputs that somebody subscribes to, but for the accounts: "flow", "flow_color/compressed"."""
        return {name for name, one in self._publishers.items() if name != ACCOUNTS and one.get_subscription_count()}

    def publish_account(self, account: DiagnosticArray) -> None:
        """Publish the account of a frame on ``statistics``, for whoever listens now; it is reliable."""
        self._publishers[ACCOUNTS].publish(account)

    def publish(
        self, result: FlowResult, header: Header, calibration: Calibration, elapsed_s: float, settings: NodeSettings
    ) -> None:
        """Publish the fields of a result with ``header``, each as far as there is one and somebody subscribes.

        :param elapsed_s: time from the image of the field to the one that its flow points to; below 0 if backward.
        :raises ValueError: before anything is published, if flow in other units than px has no usable camera_info.
        """
        flow, residual, uncertainty, colors = result.flow, result.residual, result.uncertainty, result.colors
        wanted = self.wanted() - (RESIDUAL if residual is None else set())
        if not wanted:
            return
        sampled, flow, residual, uncertainty = _resized(flow, residual, uncertainty, settings.output_scale)
        info = camera = None
        problem = ""

        def send(name: str, message: Any) -> None:
            self._publishers[name].publish(message)

        if wanted & DESCRIBED or settings.units != "px":
            info, camera, problem = calibration.of_field(header, flow.shape[:2], settings.roi)
            self._name_problems(calibration, header, problem if wanted & DESCRIBED else "", info is not None)
        if "flow" in wanted:
            in_units = flow
            if settings.units != "px":
                if camera is None:
                    raise ValueError(f"units {settings.units} need camera_info; {problem}")
                if not elapsed_s:
                    raise ValueError(f"units {settings.units} need two images with different stamps")
                in_units = _normalized(camera)(flow) / np.float32(elapsed_s)
            send("flow", array_to_image(in_units, "32FC2", header))
        for name, field in (("residual", residual), ("uncertainty", uncertainty)):
            if name in wanted and field is not None:
                send(name, array_to_image(field, "32FC1", header))
        if info is not None and "camera_info" in wanted:
            send("camera_info", info)
        if "points" in wanted and residual is not None:
            send("points", flow_points(flow, residual, settings.points_stride, header, camera, elapsed_s))
        if wanted & COLORED:
            if colors is None or settings.output_scale != 1.0:
                colors = flow_to_color(sampled, settings.color_max_px or None)
            if "flow_color" in wanted:
                send("flow_color", array_to_image(colors, "rgb8", header))
            if "flow_color/compressed" in wanted:
                data = encode_image(colors, settings.compressed_format, settings.jpeg_quality)
                # As compressed_image_transport writes it: what the image was, and the order in which it was compressed.
                format = f"rgb8; {settings.compressed_format} compressed bgr8"
                send("flow_color/compressed", compressed_image(data, format, header))

    def _name_problems(self, calibration: Calibration, header: Header, problem: str, described: bool) -> None:
        """Name what is missing in what people subscribe to, and a camera_info that may be another camera's; once, until
        it changes.

        :param described: whether camera_info goes out all the same.
        """
        which = "camera_info goes out as it came, but" if described else "no camera_info goes out, and"
        told = {"missing": f"{which} points have no bearings: {problem}" if problem else "", "strange": ""}
        theirs = (calibration.message and calibration.message.header.frame_id) or header.frame_id
        if theirs != header.frame_id:
            whose = f"has the frame_id {theirs!r}, the images have {header.frame_id!r}: is it that of another camera?"
            told["strange"] = f"camera_info on {calibration.topic} {whose} It is used all the same"
        for what, words in told.items():
            if words and words != self._said[what]:
                self.logger.warning(words)
        self._said = told


@lru_cache(maxsize=4)
def _normalized(camera: CameraModel) -> NormalizedFlow:
    return NormalizedFlow(camera)


def _resized(
    flow: np.ndarray, residual: np.ndarray | None, uncertainty: np.ndarray | None, scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Flow in px of the image; flow, residual and uncertainty in px of the published field; all of the field's size.

    Pixels are left out, none are mixed: between two motions there is none, and NaN does not spread.
    """
    if scale == 1.0:
        return flow, flow, residual, uncertainty
    of_image = np.array(flow.shape[1::-1])
    size = np.maximum(1, np.rint(of_image * scale).astype(int))
    ratio = (size / of_image).astype(np.float32)

    def sampled(field: np.ndarray) -> np.ndarray:
        return cv2.resize(field, size.tolist(), interpolation=cv2.INTER_NEAREST)

    here = sampled(flow)
    residual, uncertainty = (None if one is None else sampled(one) * ratio.mean() for one in (residual, uncertainty))
    return here, here * ratio, residual, uncertainty


def flow_points(
    flow: np.ndarray, residual: np.ndarray, stride: int, header: Header, camera: CameraModel | None, elapsed_s: float
) -> PointCloud2:
    """Every ``stride``-th pixel of flow (H, W, 2) px and residual (H, W) px, from the first on, as an organized cloud.

    The fields are float32: the pixel ``u``, ``v`` and its flow ``du``, ``dv``, NaN where there is none, and
    ``residual``, all in px. With the ``camera`` of the field's pixels also the unit bearing ``x``, ``y``, ``z`` of the
    pixel in the camera's optical frame (REP 103), and ``rate_x``, ``rate_y``, ``rate_z`` rad/s: b x db/dt of the
    bearing b, as it turns from (u, v) to (u + du, v + dv) in ``elapsed_s``. That is the time from the field's image to
    the one that its flow points to, so below 0 for backward flow; rates are NaN where it is 0.
    """
    height, width = residual.shape
    pixels = _grid(height, width, stride)
    there = flow[::stride, ::stride].reshape(-1, 2)
    columns = [*pixels.T, *there.T, residual[::stride, ::stride].reshape(-1)]
    names: tuple[str, ...] = FLOW_FIELDS
    if camera is not None:
        bearings = _grid_bearings(camera, height, width, stride)
        rates = angular_rates(bearings, camera.bearings(pixels + there), elapsed_s)
        columns += [*bearings.T, *rates.T]
        names += RAY_FIELDS
    points = np.column_stack(columns)
    cloud = make_cloud(header, table_of(names, points))
    cloud.height, cloud.width = residual[::stride, ::stride].shape
    cloud.row_step = cloud.width * cloud.point_step
    cloud.is_dense = bool(np.isfinite(points).all())
    return cloud


@lru_cache(maxsize=4)
def _grid_bearings(camera: CameraModel, height: int, width: int, stride: int) -> np.ndarray:
    """(N, 3) bearings of every ``stride``-th pixel: the same for every field of a camera."""
    return camera.bearings(_grid(height, width, stride))


def _grid(height: int, width: int, stride: int) -> np.ndarray:
    """(N, 2) float64: x and y of every ``stride``-th pixel, row by row."""
    return np.mgrid[:height:stride, :width:stride][::-1].reshape(2, -1).T.astype(np.float64)


def angular_rates(here: np.ndarray, there: np.ndarray, elapsed_s: float) -> np.ndarray:
    """(N, 3) rad/s: the constant rotation that turns unit vectors ``here`` to ``there`` the short way, or NaN."""
    if not elapsed_s:
        return np.full(here.shape, np.nan)
    axis = np.cross(here, there)
    sine = np.linalg.norm(axis, axis=1)
    angle = np.arctan2(sine, np.sum(here * there, axis=1))
    return axis * (np.divide(angle, sine, out=np.ones_like(sine), where=sine > 0) / elapsed_s)[:, None]
