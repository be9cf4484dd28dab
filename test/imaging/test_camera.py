# SPDX-License-Identifier: Apache-2.0
"""Rays of calibrated cameras: what OpenCV projects onto a pixel is the ray of that pixel."""

import cv2
import numpy as np
import pytest

from deq_flow_ros.imaging.camera import CameraModel, NormalizedFlow, known_distortion

MATRIX = np.array([[600.0, 0, 331], [0, 590, 245], [0, 0, 1]])
PLUMB_BOB = (-0.3, 0.1, 0.001, -0.0005, -0.02)
RATIONAL = (0.5, -0.2, 0.001, 0.0005, 0.01, 0.8, -0.1, 0.02)
THIN_PRISM_AND_TILT = (*RATIONAL, 1e-3, 1e-4, -5e-4, 2e-4, 0.01, -0.02)
EQUIDISTANT = (-0.02, 0.01, -0.005, 0.001)


def camera(model: str = "none", distortion: tuple[float, ...] = ()) -> CameraModel:
    """A 640 x 480 camera."""
    return CameraModel(600.0, 590.0, 331.0, 245.0, 640, 480, model, distortion)


def rays(limit_degrees: float) -> np.ndarray:
    """(N, 3) unit vectors up to an angle from the axis, with the axis itself."""
    generator = np.random.default_rng(0)
    angle, around = np.radians(limit_degrees) * generator.random(500), 2 * np.pi * generator.random(500)
    angle[0] = 0
    return np.column_stack([np.sin(angle) * np.cos(around), np.sin(angle) * np.sin(around), np.cos(angle)])


@pytest.mark.parametrize(
    ("model", "distortion"),
    [
        ("none", ()),
        ("plumb_bob", PLUMB_BOB),
        ("plumb_bob", PLUMB_BOB[:4]),
        ("rational_polynomial", RATIONAL),
        ("rational_polynomial", THIN_PRISM_AND_TILT[:12]),
        ("rational_polynomial", THIN_PRISM_AND_TILT),
    ],
)
def test_a_pixel_has_the_ray_that_projects_onto_it(model: str, distortion: tuple[float, ...]) -> None:
    """Coefficients in another order, or too few iterations, would bend bearings at the border by many pixels."""
    expected = rays(30)
    pixels = cv2.projectPoints(expected, np.zeros(3), np.zeros(3), MATRIX, np.array(distortion or (0.0,) * 4))[0]
    found = camera(model, distortion).bearings(pixels.reshape(-1, 2))
    assert np.abs(found - expected).max() < 1e-7
    normalized = camera(model, distortion).normalized(pixels.reshape(-1, 2))
    assert np.allclose(normalized, expected[:, :2] / expected[:, 2:], atol=1e-7)


def test_a_fisheye_looks_sideways_too() -> None:
    """Below 90 degrees it is cv2.fisheye; above, where a tangent cannot follow, the model's own polynomial."""
    expected = rays(80)
    fisheye = camera("equidistant", EQUIDISTANT)
    pixels = cv2.fisheye.projectPoints(
        expected.reshape(-1, 1, 3), np.zeros(3), np.zeros(3), MATRIX, np.array(EQUIDISTANT)
    )[0].reshape(-1, 2)
    assert np.abs(fisheye.bearings(pixels) - expected).max() < 1e-7
    angle = np.radians(100)
    radius = angle * (1 + sum(k * angle ** (2 * i + 2) for i, k in enumerate(EQUIDISTANT)))
    beyond = np.array([[331 + 600 * radius, 245.0]])
    assert np.allclose(fisheye.bearings(beyond), [[np.sin(angle), 0, np.cos(angle)]], atol=1e-9)
    assert np.isnan(fisheye.normalized(beyond)).all()


def test_pixels_without_a_ray_are_nan() -> None:
    """Polynomials fold back outside of what was calibrated; a wrong ray there would look as good as a right one."""
    far = np.array([[331.0, 245.0], [5000.0, 245.0], [np.nan, 3.0]])
    for model, distortion in (("plumb_bob", PLUMB_BOB), ("equidistant", (-0.3, 0.0, 0.0, 0.0))):
        found = camera(model, distortion).bearings(far)
        assert np.allclose(found[0], (0, 0, 1)) and np.isnan(found[1:]).all(), model
    folded = camera("equidistant", (0.3012, -0.1059, -0.0131, -0.0056))  # turns back at 76 degrees
    angle = np.arccos(folded.bearings(np.array([[1144.56, 245.0], [1200.0, 245.0]]))[:, 2])
    assert np.degrees(angle[0]) == pytest.approx(66.9, abs=0.1) and np.isnan(angle[1])
    assert camera("plumb_bob", PLUMB_BOB).bearings(np.empty((0, 2))).shape == (0, 3)


@pytest.mark.parametrize(
    ("model", "distortion"),
    [("none", ()), ("plumb_bob", PLUMB_BOB), ("rational_polynomial", RATIONAL), ("equidistant", EQUIDISTANT)],
)
def test_whole_fields_are_normalized_as_single_pixels_are(model: str, distortion: tuple[float, ...]) -> None:
    """The table that makes it fast must not show: to 0.02 px, also where flow leaves the image, and NaN stays NaN."""
    view = camera(model, distortion).scaled(0.25, 0.25)
    flow = np.random.default_rng(0).normal(0, 6, (120, 160, 2)).astype(np.float32)
    flow[3, 4] = np.nan
    pixels = np.mgrid[:120, :160][::-1].reshape(2, -1).T
    expected = view.normalized(pixels + flow.reshape(-1, 2)) - view.normalized(pixels)
    error = np.abs(NormalizedFlow(view)(flow).reshape(-1, 2) - expected) * view.fx
    assert np.array_equal(np.isnan(error).any(axis=1).nonzero()[0], [3 * 160 + 4]) and np.nanmax(error) < 0.02


def test_parts_and_scaled_images_keep_their_rays() -> None:
    """The region of interest and the output scale move pixels, not rays."""
    whole = camera("plumb_bob", PLUMB_BOB)
    pixels = np.array([[100.0, 60.0], [400.0, 300.0]])
    part = whole.cropped(40, 20, 500, 400).scaled(0.5, 0.25)
    assert (part.width, part.height) == (250, 100)
    assert np.allclose(part.bearings((pixels - (40, 20)) * (0.5, 0.25)), whole.bearings(pixels), atol=1e-7)
    with pytest.raises(ValueError, match="640 x 480 image, got x 200, y 0, width 500, height 10"):
        whole.cropped(200, 0, 500, 10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fx": 0.0}, "focal lengths above 0"),
        ({"cy": float("nan")}, "cy nan"),
        ({"width": 0}, "got 0 x 480"),
        ({"distortion_model": "polynomial"}, "plumb_bob.*got 'polynomial'"),
        ({"distortion_model": "plumb_bob", "distortion": (0.1,)}, "4, 5, 8, 12 or 14 finite coefficients"),
    ],
)
def test_what_cannot_be_is_named(change: dict, words: str) -> None:
    """A calibration file with a mistake must be readable off the error."""
    values = {"fx": 600.0, "fy": 590.0, "cx": 331.0, "cy": 245.0, "width": 640, "height": 480}
    with pytest.raises(ValueError, match=words):
        CameraModel(**{**values, **change})


@pytest.mark.parametrize(
    ("model", "coefficients", "known"),
    [
        ("Plumb Bob", PLUMB_BOB, ("plumb_bob", PLUMB_BOB)),
        ("plumb_bob", (*PLUMB_BOB, 0, 0, 0), ("plumb_bob", PLUMB_BOB)),
        ("plumb_bob", RATIONAL, ("plumb_bob", RATIONAL)),
        ("rational_polynomial", (*RATIONAL, *[0] * 6), ("rational_polynomial", RATIONAL)),
        ("rational_polynomial", THIN_PRISM_AND_TILT, ("rational_polynomial", THIN_PRISM_AND_TILT)),
        ("radtan", PLUMB_BOB[:4], ("plumb_bob", PLUMB_BOB[:4])),
        ("fisheye", (*EQUIDISTANT, 0), ("equidistant", EQUIDISTANT)),
        ("kannala-brandt4", EQUIDISTANT, ("equidistant", EQUIDISTANT)),
        ("inverse_brown_conrady", PLUMB_BOB, ("inverse_brown_conrady", PLUMB_BOB)),
    ],
)
def test_distortions_are_known_as_drivers_write_them(
    model: str, coefficients: tuple[float, ...], known: tuple[str, tuple[float, ...]]
) -> None:
    """A calibration that is refused costs every field in metric units, though OpenCV would have read it."""
    assert known_distortion(model, coefficients) == known
