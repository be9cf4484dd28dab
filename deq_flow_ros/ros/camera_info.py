# SPDX-License-Identifier: Apache-2.0
"""camera_info: the camera that it describes, and what it becomes for a part of the image or another size."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
from sensor_msgs.msg import CameraInfo, RegionOfInterest
from std_msgs.msg import Header

from deq_flow_ros.imaging import stamp_to_ns
from deq_flow_ros.imaging.camera import CameraModel, known_distortion

Region = tuple[int, int, int, int]
"""x, y, width, height in pixels of an image; all 0 is the whole image, as in ``sensor_msgs/RegionOfInterest``."""
WHOLE: Region = (0, 0, 0, 0)
LEAST_FOCAL = 0.05
"""Focal length of the widest lens, 168 degrees, relative to the width of the image."""
REMEMBERED = 100


@dataclass(frozen=True)
class Calibration:
    """What is known of the camera of an image.

    :ivar message: None where none has come.
    :ivar image_size: height and width of the image; (0, 0): the region of interest is known to be right.
    :ivar topic: where it comes from, for messages to people.
    :ivar rectified: whether the image is a rectified one, which P of its camera_info describes instead of K and D.
    :ivar other: that of the other image of the pair; None: the same.
    """

    message: CameraInfo | None = None
    image_size: tuple[int, int] = (0, 0)
    topic: str = "camera_info"
    rectified: bool = False
    other: CameraInfo | None = None

    def of_field(
        self, header: Header, size: tuple[int, int], roi: Region
    ) -> tuple[CameraInfo | None, CameraModel | None, str]:
        """The camera_info of a field (height, width) of a part of the image, its camera, and why one is missing."""
        if self.message is None:
            return None, None, f"none has come on {self.topic}"
        info = None
        try:
            described, (height, width) = image_size(self.message), self.image_size
            if height and described != (height, width):
                raise ValueError(f"it describes images of {described[1]}x{described[0]} px, these are {width}x{height}")
            if self.other is not None and not alike(self.message, self.other):
                what = "pixels that move then say nothing of angles"
                raise ValueError(f"it changed between the two images, as where a camera zooms: {what}")
            info = adapted(self.message, header, roi, size)
            return info, camera_model(info, self.rectified), ""
        except ValueError as error:
            return info, None, f"that on {self.topic} cannot be used: {error}"


def remember(infos: dict[int, CameraInfo], message: CameraInfo) -> None:
    """Add a camera_info to the last ones by their stamps in ns: images wait longer until their flow is computed."""
    infos[stamp_to_ns(message.header.stamp)] = message
    while len(infos) > REMEMBERED:
        del infos[next(iter(infos))]


def alike(one: CameraInfo, other: CameraInfo) -> bool:
    """Whether two camera_info describe one camera, up to what focusing changes: less than a pixel at the border."""
    if one is other:
        return True
    exact, close = ("distortion_model", "width", "height", "binning_x", "binning_y", "roi"), "kpd"
    same = all(getattr(one, name) == getattr(other, name) for name in exact) and len(one.d) == len(other.d)
    pairs = ((getattr(one, name), getattr(other, name)) for name in close)
    return same and all(np.allclose(*pair, rtol=1e-3, atol=1e-3, equal_nan=True) for pair in pairs)


def camera_model(message: CameraInfo, rectified: bool = False) -> CameraModel:
    """The camera of the images that ``message`` describes, its region of interest and binning included.

    :param rectified: of the images that image_proc rectifies, by P, in the frame that R turns to; else of those as they
        were taken, by K and D, in the frame of the lens.
    :raises ValueError: for an uncalibrated camera, or values that contradict each other or are unknown.
    """
    name, matrix = ("P", message.p.reshape(3, 4)) if rectified else ("K", message.k.reshape(3, 3))
    if not message.k[0] or not matrix[0, 0]:
        raise ValueError(f"the camera is not calibrated: expected {name}[0] above 0, got {matrix[0, 0]:g}")
    if (matrix[2, :3] != (0, 0, 1)).any():
        raise ValueError(f"expected 0, 0, 1 as the last row of {name}, got {matrix[2].tolist()}: is it transposed?")
    if 0 < matrix[0, 0] < LEAST_FOCAL * message.width:
        raise ValueError(
            f"expected a focal length in pixels, got {name}[0] = {matrix[0, 0]:g} for {message.width} px of width, as "
            "one in millimetres or metres would be"
        )
    if matrix[0, 1]:
        raise ValueError(f"expected a camera without skew, got {name}[1] = {matrix[0, 1]:g}")
    model, distortion = known_distortion(message.distortion_model, message.d)
    # Drivers without distortion name any model or none. Of a fisheye, zeros have a meaning.
    if rectified or (model != "equidistant" and not any(distortion)):
        model, distortion = "none", ()
    fx, fy, cx, cy = (float(matrix[place]) for place in ((0, 0), (1, 1), (0, 2), (1, 2)))
    sensor = CameraModel(fx, fy, cx, cy, message.width, message.height, model, distortion)
    x, y, width, height, binning_x, binning_y = _sensor_part(message)
    return sensor.cropped(x, y, width, height).scaled(1 / binning_x, 1 / binning_y)


def image_size(message: CameraInfo) -> tuple[int, int]:
    """Height and width of the images that ``message`` describes; 0 where an uncalibrated camera says none."""
    _, _, width, height, binning_x, binning_y = _sensor_part(message)
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
    whole = (0, 0, image_width, image_height)
    x, y, width, height = roi if roi != WHOLE else whole
    if width < 1 or height < 1 or x < 0 or y < 0 or x + width > image_width or y + height > image_height:
        part = f"x {x}, y {y}, width {width}, height {height}"
        raise ValueError(f"expected a region within the {image_width} x {image_height} px of camera_info, got {part}")
    sensor_x, sensor_y, _, _, binning_x, binning_y = _sensor_part(message)
    left, top = sensor_x + x * binning_x, sensor_y + y * binning_y
    if size == (height, width):
        if roi not in (WHOLE, whole):
            size_of_part = {"width": width * binning_x, "height": height * binning_y}
            result.roi = RegionOfInterest(x_offset=left, y_offset=top, **size_of_part, do_rectify=True)
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


def _sensor_part(message: CameraInfo) -> tuple[int, int, int, int, int, int]:
    """x, y, width, height of the region of interest in pixels of the sensor, and how many of these, across and down, a
    pixel of the image has; a binning of 0 counts as 1.
    """
    roi, binning = message.roi, (max(1, message.binning_x), max(1, message.binning_y))
    if not roi.width and not roi.height:
        return 0, 0, message.width, message.height, *binning
    return roi.x_offset, roi.y_offset, roi.width, roi.height, *binning


def region(rgb: np.ndarray, roi: Region) -> np.ndarray:
    """A part of an (H, W, 3) image, contiguous: (height, width, 3).

    :raises ValueError: where it reaches outside of the image.
    """
    x, y, width, height = roi
    if x + width > rgb.shape[1] or y + height > rgb.shape[0]:
        raise ValueError(
            f"roi {list(roi)} reaches outside of the image, {rgb.shape[1]}x{rgb.shape[0]}; set the parameter "
            "roi to a part of it, or to [0, 0, 0, 0] for all of it"
        )
    return np.ascontiguousarray(rgb[y : y + height, x : x + width])
