# SPDX-License-Identifier: Apache-2.0
"""Flow as ``sensor_msgs/PointCloud2``: by sensor_msgs_py where ROS provides it, by numpy where it does not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from sensor_msgs.msg import PointCloud2, PointField
from std_msgs.msg import Header

from deq_flow_ros.imaging.camera import CameraModel

try:
    from sensor_msgs_py.point_cloud2 import create_cloud
except ImportError:
    create_cloud = None

FLOW_FIELDS = ("u", "v", "du", "dv", "residual")
RAY_FIELDS = ("x", "y", "z", "rate_x", "rate_y", "rate_z")


def flow_points(
    flow: np.ndarray,
    residual: np.ndarray,
    stride: int,
    header: Header,
    camera: CameraModel | None,
    elapsed_s: float | None,
) -> PointCloud2:
    """Every ``stride``-th pixel of flow (H, W, 2) px and residual (H, W) px, from the first on, as an organized cloud.

    The fields are float32: the pixel ``u``, ``v`` and its flow ``du``, ``dv``, NaN where there is none, and
    ``residual``, all in px. With the ``camera`` of the field's pixels also the unit bearing ``x``, ``y``, ``z`` of the
    pixel in the camera's optical frame (REP 103), and ``rate_x``, ``rate_y``, ``rate_z`` rad/s: b x db/dt of the
    bearing b, as it turns from (u, v) to (u + du, v + dv) in ``elapsed_s``. That is the time from the field's image to
    the one that its flow points to, so below 0 for backward flow; rates are NaN without it.
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
    points = np.column_stack(columns).astype(np.float32)
    cloud = make_cloud(header, names, points)
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


def angular_rates(here: np.ndarray, there: np.ndarray, elapsed_s: float | None) -> np.ndarray:
    """(N, 3) rad/s: the constant rotation that turns unit vectors ``here`` (N, 3) to ``there`` the short way.

    NaN without a time.
    """
    if not elapsed_s:
        return np.full(here.shape, np.nan)
    axis = np.cross(here, there)
    sine = np.linalg.norm(axis, axis=1)
    angle = np.arctan2(sine, np.sum(here * there, axis=1))
    return axis * (np.divide(angle, sine, out=np.ones_like(sine), where=sine > 0) / elapsed_s)[:, None]


def make_cloud(header: Header, names: Sequence[str], points: np.ndarray) -> PointCloud2:
    """A cloud of float32 ``points`` (N, fields), whose fields have these names."""
    fields = [
        PointField(name=name, offset=4 * index, datatype=PointField.FLOAT32, count=1)
        for index, name in enumerate(names)
    ]
    if create_cloud is not None:
        return create_cloud(header, fields, points)
    return cloud_by_numpy(header, fields, points)


def cloud_by_numpy(header: Header, fields: list[PointField], points: np.ndarray) -> PointCloud2:
    """``create_cloud`` of sensor_msgs_py for float32 points (N, fields)."""
    cloud = PointCloud2(header=header, height=1, width=len(points), fields=fields, point_step=4 * len(fields))
    cloud.row_step = cloud.point_step * len(points)
    cloud.is_bigendian = sys.byteorder == "big"
    cloud.data.frombytes(np.ascontiguousarray(points).reshape(-1).view(np.uint8).data)
    return cloud
