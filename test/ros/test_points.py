# SPDX-License-Identifier: Apache-2.0
"""Flow as points: fields where the documentation says, and rates that are the camera's own rotation."""

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
from sensor_msgs.msg import PointCloud2, PointField
from std_msgs.msg import Header

from deq_flow_ros.imaging.camera import CameraModel
from deq_flow_ros.ros import convert
from deq_flow_ros.ros.convert import FLOW_FIELDS, RAY_FIELDS, flow_points

HEADER = Header(frame_id="camera")
CAMERA = CameraModel(60.0, 60.0, 32.0, 24.0, 64, 48, "plumb_bob", (-0.2, 0.05, 0.001, -0.001, 0.0))


def read(cloud: PointCloud2) -> dict[str, np.ndarray]:
    """(height, width) of each field, by the message's own description of it."""
    assert all(field.datatype == PointField.FLOAT32 and field.count == 1 for field in cloud.fields)
    assert cloud.row_step == cloud.width * cloud.point_step and len(cloud.data) == cloud.height * cloud.row_step
    names, offsets = [field.name for field in cloud.fields], [field.offset for field in cloud.fields]
    layout = {"names": names, "formats": ["<f4"] * len(names), "offsets": offsets, "itemsize": cloud.point_step}
    array = np.frombuffer(cloud.data, np.dtype(layout)).reshape(cloud.height, cloud.width)
    return {name: array[name] for name in names}


def test_each_point_is_a_pixel_and_its_flow() -> None:
    """An organized cloud, so that a point's row and column are the pixel's, divided by the stride."""
    flow = np.random.default_rng(0).normal(size=(48, 64, 2)).astype(np.float32)
    residual = np.random.default_rng(1).random((48, 64)).astype(np.float32)
    cloud = flow_points(flow, residual, 5, HEADER, None, None)
    values = read(cloud)
    assert tuple(values) == FLOW_FIELDS and (cloud.height, cloud.width) == (10, 13) and cloud.is_dense
    assert cloud.header == HEADER and (values["u"][3, 7], values["v"][3, 7]) == (35, 15)
    for name, expected in (("du", flow[..., 0]), ("dv", flow[..., 1]), ("residual", residual)):
        assert np.array_equal(values[name], expected[::5, ::5])


def test_rates_are_those_of_a_turning_camera() -> None:
    """A camera that only turns sees each bearing turn the other way; flow of that turn through the distorting lens must
    give it back, less the part around the bearing itself, which no flow of one pixel shows.
    """
    omega, elapsed_s = np.array([0.3, -0.8, 0.5]), 0.05
    pixels = np.mgrid[:48, :64][::-1].reshape(2, -1).T.astype(float)
    here = CAMERA.bearings(pixels)
    there = here @ cv2.Rodrigues(omega * elapsed_s)[0].T
    matrix = np.array([[60.0, 0, 32], [0, 60, 24], [0, 0, 1]])
    moved = cv2.projectPoints(there, np.zeros(3), np.zeros(3), matrix, np.array(CAMERA.distortion))[0].reshape(-1, 2)
    flow = (moved - pixels).reshape(48, 64, 2).astype(np.float32)
    for time, sign in ((elapsed_s, 1), (-elapsed_s, -1)):  # backward flow of a camera that turns the other way
        values = read(flow_points(flow, flow[..., 0], 4, HEADER, CAMERA, time))
        rates = np.stack([values[f"rate_{axis}"] for axis in "xyz"], axis=2).reshape(-1, 3) * sign
        bearings = np.stack([values[axis] for axis in "xyz"], axis=2).reshape(-1, 3)
        sampled = here.reshape(48, 64, 3)[::4, ::4].reshape(-1, 3)
        assert np.allclose(bearings, sampled, atol=1e-6)
        across = omega - sampled * (sampled @ omega)[:, None]
        # The bearing moves on a cone around omega, its mean rate along the chord's great circle: second order in angle.
        assert np.abs(rates - across).max() < 0.03 and np.linalg.norm(across, axis=1).min() > 0.1


def test_a_large_turn_is_not_flattened() -> None:
    """The angle itself, not its sine: a whip of 1 rad between two images would come out 16 % too slow."""
    flow = np.zeros((1, 1, 2), np.float32)
    flow[0, 0, 0] = 60 * np.tan(1.0)
    plain = CameraModel(60.0, 60.0, 0.0, 0.0, 64, 48)
    values = read(flow_points(flow, flow[..., 0], 1, HEADER, plain, 0.1))
    rate = [float(values[f"rate_{axis}"][0, 0]) for axis in "xyz"]
    assert rate == pytest.approx([0, 10.0, 0], abs=1e-5)  # towards +x around +y
    assert [float(values[axis][0, 0]) for axis in "xyz"] == pytest.approx([0, 0, 1])


def test_what_is_unknown_is_nan() -> None:
    """Invalid flow, a time that nobody knows, still pixels: no rate may be made up, none be lost."""
    flow = np.zeros((4, 4, 2), np.float32)
    flow[0, 0] = np.nan
    cloud = flow_points(flow, flow[..., 0], 2, HEADER, CAMERA, 0.1)
    values = read(cloud)
    assert tuple(values) == FLOW_FIELDS + RAY_FIELDS and not cloud.is_dense
    unknown = ("du", "dv", "rate_x", "rate_y", "rate_z")
    assert all(np.isnan(values[name][0, 0]) for name in unknown) and np.isfinite(values["x"]).all()
    assert all((values[name].reshape(-1)[1:] == 0).all() for name in unknown)
    for elapsed_s in (None, 0.0):
        assert np.isnan(read(flow_points(flow, flow[..., 0], 2, HEADER, CAMERA, elapsed_s))["rate_x"]).all()


@pytest.mark.skipif(convert.create_cloud is None, reason="needs sensor_msgs_py: test/launch_environment.sh")
def test_both_writers_agree() -> None:
    """A user with sensor_msgs_py and one without must get the same message."""
    values = np.random.default_rng(0).random((6, 2)).astype(np.float32)
    fields = [PointField(name=name, offset=4 * i, datatype=PointField.FLOAT32, count=1) for i, name in enumerate("uv")]
    ours, theirs = convert.cloud_by_numpy(HEADER, fields, values), convert.create_cloud(HEADER, fields, values)
    assert (ours.data, ours.point_step, ours.fields) == (theirs.data, theirs.point_step, theirs.fields)
    assert ours.is_bigendian == theirs.is_bigendian
