# SPDX-License-Identifier: Apache-2.0
"""``sensor_msgs/CameraInfo``: as a camera model, and changed as the image that it describes is."""

from __future__ import annotations

import copy

import numpy as np
from sensor_msgs.msg import CameraInfo, RegionOfInterest
from std_msgs.msg import Header

from deq_flow_ros.imaging.camera import CameraModel, known_distortion

Region = tuple[int, int, int, int]
"""x, y, width, height in pixels of an image; all 0 is the whole image, as in ``sensor_msgs/RegionOfInterest``."""
WHOLE: Region = (0, 0, 0, 0)


def camera_model(message: CameraInfo, rectified: bool = False) -> CameraModel:
    """The camera of the images that ``message`` describes, its region of interest and binning included.

    :param rectified: of the images that image_proc rectifies, by P, in the frame that R turns to; else of those as they
        were taken, by K and D, in the frame of the lens.
    :raises ValueError: for an uncalibrated camera, or values that contradict each other or are unknown.
    """
    name, matrix = ("P", message.p.reshape(3, 4)) if rectified else ("K", message.k.reshape(3, 3))
    if not message.k[0] or not matrix[0, 0]:
        raise ValueError(f"the camera is not calibrated: expected {name}[0] above 0, got {matrix[0, 0]:g}")
    if matrix[0, 1]:
        raise ValueError(f"expected a camera without skew, got {name}[1] = {matrix[0, 1]:g}")
    model, distortion = known_distortion(message.distortion_model, message.d)
    # Drivers without distortion name any model or none. Of a fisheye, zeros have a meaning.
    if rectified or (model != "equidistant" and not any(distortion)):
        model, distortion = "none", ()
    sensor = CameraModel(
        fx=float(matrix[0, 0]),
        fy=float(matrix[1, 1]),
        cx=float(matrix[0, 2]),
        cy=float(matrix[1, 2]),
        width=message.width,
        height=message.height,
        distortion_model=model,
        distortion=distortion,
    )
    x, y, width, height = _sensor_region(message)
    binning_x, binning_y = _binning(message)
    return sensor.cropped(x, y, width, height).scaled(1 / binning_x, 1 / binning_y)


def image_size(message: CameraInfo) -> tuple[int, int]:
    """Height and width of the images that ``message`` describes; 0 where an uncalibrated camera says none."""
    _, _, width, height = _sensor_region(message)
    binning_x, binning_y = _binning(message)
    return height // binning_y, width // binning_x


def adapted(message: CameraInfo, header: Header, roi: Region, size: tuple[int, int]) -> CameraInfo:
    """The camera_info, with ``header``, of the part ``roi`` of its image after that was resized to ``size`` (height,
    width).

    A part changes the region of interest, in pixels of the sensor, as image_proc's crop_decimate does. Another size
    scales K and P, as image_proc's resize does; the region and the binning, which another scale would not leave whole
    numbers, then become part of K and P.

    :raises ValueError: for a part that is not within the image that ``message`` describes.
    """
    result = copy.copy(message)
    result.header = header
    image_height, image_width = image_size(message)
    x, y, width, height = roi if roi != WHOLE else (0, 0, image_width, image_height)
    if width < 1 or height < 1 or x < 0 or y < 0 or x + width > image_width or y + height > image_height:
        part = f"x {x}, y {y}, width {width}, height {height}"
        raise ValueError(f"expected a region within the {image_width} x {image_height} px of camera_info, got {part}")
    sensor_x, sensor_y, _, _ = _sensor_region(message)
    binning_x, binning_y = _binning(message)
    left, top = sensor_x + x * binning_x, sensor_y + y * binning_y
    if size == (height, width):
        if roi not in (WHOLE, (0, 0, image_width, image_height)):
            result.roi = RegionOfInterest(
                x_offset=left, y_offset=top, width=width * binning_x, height=height * binning_y, do_rectify=True
            )
        return result
    scale_x, scale_y = size[1] / width / binning_x, size[0] / height / binning_y
    for name, columns in (("k", 3), ("p", 4)):
        scaled = getattr(message, name).reshape(3, columns).copy()
        scaled[:2, 2] -= scaled[2, 2] * np.array([left, top])
        scaled[0] *= scale_x
        scaled[1] *= scale_y
        setattr(result, name, scaled.reshape(-1))
    result.height, result.width = size
    result.binning_x = result.binning_y = 0
    result.roi = RegionOfInterest()
    return result


def _sensor_region(message: CameraInfo) -> Region:
    """x, y, width, height of the region of interest, in pixels of the sensor, binned or not."""
    roi = message.roi
    if not roi.width and not roi.height:
        return 0, 0, message.width, message.height
    return roi.x_offset, roi.y_offset, roi.width, roi.height


def _binning(message: CameraInfo) -> tuple[int, int]:
    """Pixels of the sensor per pixel of the image, across and down; 0 counts as 1."""
    return max(1, message.binning_x), max(1, message.binning_y)
