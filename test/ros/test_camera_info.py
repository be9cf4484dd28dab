# SPDX-License-Identifier: Apache-2.0
"""camera_info of what is published: a consumer that follows the message's comments gets the rays of the input image."""

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
from sensor_msgs.msg import CameraInfo, RegionOfInterest
from std_msgs.msg import Header

from deq_flow_ros.ros.messages import WHOLE, adapted, camera_model, image_size


def calibration(**changes: object) -> CameraInfo:
    """Of a 640 x 480 sensor behind a lens that distorts, right camera of a stereo pair."""
    message = CameraInfo(
        header=Header(frame_id="camera"),
        width=640,
        height=480,
        distortion_model="plumb_bob",
        d=[-0.3, 0.1, 0.001, -0.0005, -0.02],
        k=[600.0, 0, 331, 0, 590, 245, 0, 0, 1],
        r=[1.0, 0, 0, 0, 1, 0, 0, 0, 1],
        p=[580.0, 0, 325, -58, 0, 580, 240, 0, 0, 0, 1, 0],
    )
    for name, value in changes.items():
        setattr(message, name, value)
    return message


HEADER = Header(frame_id="camera_of_the_flow")
PIXELS = np.array([[0.0, 0.0], [60.0, 50.0], [150.0, 90.0]])


def test_binning_and_region_are_respected() -> None:
    """By the message's comments: pixel u of the image is u * binning + x_offset of the sensor that K describes."""
    roi = RegionOfInterest(x_offset=100, y_offset=40, width=400, height=300)
    message = calibration(binning_x=2, binning_y=2, roi=roi)
    camera = camera_model(message)
    assert (camera.height, camera.width) == image_size(message) == (150, 200)
    expected = camera_model(calibration()).bearings(PIXELS * 2 + (100, 40))
    assert np.allclose(camera.bearings(PIXELS), expected, atol=1e-7)
    rectified = camera_model(message, rectified=True)
    assert rectified.distortion_model == "none"
    assert np.allclose(rectified.normalized(PIXELS), (PIXELS * 2 + (100, 40) - (325, 240)) / 580)


@pytest.mark.parametrize("binning", [0, 1, 2])
@pytest.mark.parametrize("region", [WHOLE, (0, 0, 100, 80), (31, 17, 200, 100)])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.3])
def test_the_adapted_message_gives_the_rays_of_the_input(
    binning: int, region: tuple[int, int, int, int], scale: float
) -> None:
    """Whatever the crop and the scale, and for raw as for rectified images."""
    roi = RegionOfInterest(x_offset=20, y_offset=14, width=600, height=440) if binning else RegionOfInterest()
    message = calibration(binning_x=binning, binning_y=binning, roi=roi)
    height, width = image_size(message)
    x, y, part_width, part_height = region if region != WHOLE else (0, 0, width, height)
    size = round(part_height * scale), round(part_width * scale)
    result = adapted(message, HEADER, region, size)
    assert result.header == HEADER and image_size(result) == size
    published = PIXELS * (size[1] / part_width, size[0] / part_height)
    for rectified in (False, True):
        expected = camera_model(message, rectified).bearings(PIXELS + np.array([x, y]))
        assert np.allclose(camera_model(result, rectified).bearings(published), expected, atol=1e-7)


def test_what_is_not_changed_is_passed_on() -> None:
    """A crop keeps the calibration of the sensor (crop_decimate), a scale the baseline in pixels (resize)."""
    message = calibration()
    same = adapted(message, HEADER, WHOLE, (480, 640))
    assert same == calibration(header=HEADER) and message == calibration()
    part = adapted(message, HEADER, (31, 17, 200, 100), (100, 200))
    roi = RegionOfInterest(x_offset=31, y_offset=17, width=200, height=100, do_rectify=True)
    assert part == calibration(header=HEADER, roi=roi)
    half = adapted(message, HEADER, WHOLE, (240, 320))
    assert half.p.tolist() == [290.0, 0, 162.5, -29, 0, 290, 120, 0, 0, 0, 1, 0]
    assert half.k.tolist() == [300.0, 0, 165.5, 0, 295, 122.5, 0, 0, 1]
    assert (half.d, half.r.tolist(), half.width, half.height) == (message.d, message.r.tolist(), 320, 240)
    assert message == calibration()


def test_uncalibrated_cameras_are_passed_on_but_have_no_rays() -> None:
    """K[0] == 0 is how ROS says "not calibrated"; drivers publish it."""
    message = CameraInfo(width=640, height=480)
    result = adapted(message, HEADER, WHOLE, (240, 320))
    assert (result.height, result.width, result.k[0], result.header) == (240, 320, 0.0, HEADER)
    with pytest.raises(ValueError, match=r"not calibrated: expected K\[0\] above 0, got 0"):
        camera_model(message)
    with pytest.raises(ValueError, match=r"expected P\[0\] above 0, got 0"):
        camera_model(calibration(p=np.zeros(12)), rectified=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"distortion_model": "plumb"}, "plumb_bob.*got 'plumb'"),
        ({"d": [0.1, 0.2]}, "4, 5, 8, 12 or 14 finite coefficients"),
        ({"k": [600.0, 0, 0, 0, 590, 0, 331, 245, 1]}, "last row of K, got .331.0, 245.0, 1.0.: is it transposed"),
        ({"k": [0.0035, 0, 0.0018, 0, 0.0035, 0.0013, 0, 0, 1]}, r"in pixels, got K.0. = 0.0035 for 640 px"),
        ({"k": [600.0, 3, 331, 0, 590, 245, 0, 0, 1]}, r"without skew, got K\[1\] = 3"),
        ({"width": 0}, "got 0 x 480"),
        ({"roi": RegionOfInterest(x_offset=600, width=100, height=100)}, "640 x 480 image, got x 600"),
    ],
)
def test_contradictions_are_named(change: dict, words: str) -> None:
    """Bearings from a broken calibration would look as good as right ones."""
    with pytest.raises(ValueError, match=words):
        camera_model(calibration(**change))


def test_a_part_outside_of_the_image_is_named() -> None:
    """A region of interest that was set for another camera."""
    with pytest.raises(
        ValueError, match="within the 640 x 480 px of camera_info, got x 600, y 0, width 100, height 50"
    ):
        adapted(calibration(), HEADER, (600, 0, 100, 50), (50, 100))
    with pytest.raises(ValueError, match="within the 0 x 480 px of camera_info"):
        adapted(calibration(width=0), HEADER, WHOLE, (480, 640))


def test_cameras_without_distortion_need_no_model() -> None:
    """Simulators and drivers of rectified images name any model, or none."""
    for model, d in (("", []), ("plumb_bob", [0.0] * 5), ("perspective", [])):
        assert camera_model(calibration(distortion_model=model, d=d)).distortion_model == "none"
    assert camera_model(calibration(distortion_model="equidistant", d=[0.0] * 4)).distortion_model == "equidistant"
