# SPDX-License-Identifier: Apache-2.0
"""Augmentation: whatever is done to a pair, the flow goes on to say where its pixels went."""

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
from dataset_layouts import Scene, mean_difference

from training.flow_dataset import Sample
from training.samples import Augmentation
from training.settings import build

SIZE = (96, 128)
NO_COLOUR = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "eraser_probability": 0.0}
NO_MOTION = {"spatial_probability": 0.0, "horizontal_flip": 0.0, "vertical_flip": 0.0}


def pair(seed: int = 0, known: float = 1.0) -> Sample:
    """A pair with exact flow at a share of the pixels, of which some are hidden; elsewhere the flow is nonsense."""
    rng, scene = np.random.default_rng(seed), Scene(seed, SIZE)
    flow = scene.flow(0, 1)
    valid = rng.random(SIZE) < known
    valid[20:40, 30:60] = False
    occluded = np.zeros(SIZE, bool)
    occluded[50:70, 80:100] = True
    flow[~valid] = rng.choice([1000, np.nan], 2)
    return Sample("scene/0", scene.image(0), scene.image(1), flow, valid, occluded)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("crop", [(64, 80), SIZE, (120, 144)])
def test_flow_is_what_happens_between_the_images(sparse: bool, crop: tuple[int, int]) -> None:
    """Why: an offset of half a pixel, or a sign, between the images and the flow spoils training without an error."""
    augmentation = Augmentation(crop, sparse, max_scale=0.6, spatial_probability=0.9, vertical_flip=0.5, **NO_COLOUR)
    for seed in range(24):
        before = pair(seed % 6, known=0.7 if sparse else 1.0)
        after = augmentation(before, np.random.default_rng(seed))
        assert after.image1.shape == after.image2.shape == (*crop, 3) and after.flow.shape == (*crop, 2)
        assert after.valid.shape == after.occluded.shape == crop and after.name == before.name
        assert after.image1.dtype == np.uint8 and after.flow.dtype == np.float32 and after.valid.dtype == bool
        assert not after.flow[~after.valid].any() and after.valid.mean() > 0.2
        right = mean_difference(after.image1, after.image2, after.flow, after.valid)
        wrong = mean_difference(after.image1, after.image2, after.flow + np.float32(0.5), after.valid)
        assert right < 1.1 and right < 0.6 * wrong, (seed, right, wrong)


@pytest.mark.parametrize("sparse", [False, True])
def test_flow_stays_with_its_pixel(sparse: bool) -> None:
    """Why: smooth flow half a pixel beside its image still warps well; at motion boundaries it would be wrong."""
    y, x = np.indices(SIZE)
    image = np.rint(np.stack([1.9 * x, 1.9 * y, x], axis=2)).astype(np.uint8)
    valid = np.random.default_rng(0).random(SIZE) < (0.5 if sparse else 1)
    before = Sample("ramp/0", image, image, np.stack([x, y], axis=2).astype(np.float32), valid, None)
    for seed, scale in enumerate(np.repeat([-0.4, -0.1, 0.25, 0.7], 4)):
        settings = {"min_scale": scale, "max_scale": scale, "spatial_probability": 1, "stretch": 0}
        after = Augmentation((64, 80), sparse, **settings, **NO_COLOUR)(before, np.random.default_rng(seed))
        there = np.abs(after.flow[after.valid]) / 2**scale
        assert np.abs((there - after.image1[:, :, :2][after.valid] / 1.9).mean(axis=0)).max() < 0.15


@pytest.mark.parametrize("sparse", [False, True])
def test_flips_negate_their_component(sparse: bool) -> None:
    """Why: mirrored images with the flow of before are the classic mistake."""
    before = pair()
    known = np.where(before.valid[:, :, None], before.flow, 0)
    for mirrored, rows, columns, sign in (
        ({"horizontal_flip": 1.0}, 1, -1, (-1, 1)),
        ({"vertical_flip": 1.0}, -1, 1, (1, -1)),
        ({"horizontal_flip": 1.0, "vertical_flip": 1.0}, -1, -1, (-1, -1)),
        ({}, 1, 1, (1, 1)),
    ):
        after = Augmentation(SIZE, sparse, **(NO_COLOUR | NO_MOTION | mirrored))(before, np.random.default_rng(0))
        assert np.array_equal(after.flow, known[::rows, ::columns] * np.float32(sign))
        assert np.array_equal(after.image2, before.image2[::rows, ::columns])
        assert np.array_equal(after.valid, before.valid[::rows, ::columns])
        stays = after.valid & ~_leaves(after.flow)
        assert np.array_equal(after.occluded[stays], before.occluded[::rows, ::columns][stays])


def _leaves(flow: np.ndarray) -> np.ndarray:
    y, x = np.indices(flow.shape[:2]) + flow.transpose(2, 0, 1)[::-1]
    return (x < -0.5) | (y < -0.5) | (x > flow.shape[1] - 0.5) | (y > flow.shape[0] - 0.5)


def test_small_images_are_scaled_up_to_the_crop() -> None:
    """Why: whole images, so that it shows at the borders whether both sides are treated alike."""
    before, mirror = pair(), np.float32((-1, 1))
    parts = before.image1, before.image2, before.flow * mirror, before.valid, before.occluded
    augmentation = Augmentation((2 * SIZE[0], 2 * SIZE[1]), **NO_COLOUR, **NO_MOTION)
    as_is, mirrored = (
        augmentation(sample, np.random.default_rng(0))
        for sample in (before, Sample("mirrored", *(part[:, ::-1].copy() for part in parts)))
    )
    for name in ("image1", "image2", "valid"):
        image, other = (getattr(sample, name).astype(int) for sample in (as_is, mirrored))
        assert np.abs(image - other[:, ::-1]).max() <= 1
    assert np.allclose(as_is.flow, mirrored.flow[:, ::-1] * mirror, atol=1e-3)
    assert mean_difference(as_is.image1, as_is.image2, as_is.flow, as_is.valid) < 1.1


def test_what_leaves_the_crop_is_occluded() -> None:
    """Why: the loss treats hidden targets differently, and a crop hides most of them."""
    crop = (40, 50)
    after = Augmentation(crop, **NO_COLOUR, **NO_MOTION)(pair(1), np.random.default_rng(3))
    assert _leaves(after.flow).any() and after.occluded[_leaves(after.flow)].all()
    unknown = Augmentation(crop, **NO_COLOUR, **NO_MOTION)(replace(pair(1), occluded=None), np.random.default_rng(3))
    assert unknown.occluded is None and np.array_equal(unknown.flow, after.flow)


def test_size_and_shape_change_within_their_bounds() -> None:
    """Why: the vectors tell by how much an image was scaled; the published schedules depend on these ranges."""
    flow = np.full((*SIZE, 2), 4.0, np.float32)
    flow[~pair().valid] = 0  # must not be mixed into its neighbours
    before = replace(pair(), flow=flow)
    augmentation = Augmentation(
        (48, 64), min_scale=-0.4, max_scale=0.8, horizontal_flip=0, vertical_flip=0, **NO_COLOUR
    )
    scales = []
    for seed in range(200):
        after = augmentation(before, np.random.default_rng(seed))
        assert np.ptp(after.flow[after.valid], axis=0).max() < 1e-3
        scales.append(np.log2(after.flow[after.valid][0] / 4))
    across, down = np.transpose(scales)
    assert np.isclose(across, 0, atol=1e-6).mean() == pytest.approx(0.2, abs=0.08)  # spatial_probability is 0.8
    assert (across == down).mean() == pytest.approx(0.2 + 0.8 * 0.2, abs=0.09)  # and of these, 0.8 are stretched
    assert -0.6 < across.min() < -0.35 and 0.7 < across.max() < 1.0
    assert 0.3 < np.abs(across - down).max() < 0.4


def test_colours_change_together_or_apart() -> None:
    """Why: light changes both frames in most pairs, and matching has to survive where it does not."""
    still = replace(pair(), image2=pair().image1)
    equal = 0
    for seed in range(100):
        after = Augmentation(SIZE, **NO_MOTION, eraser_probability=0)(still, np.random.default_rng(seed))
        assert np.abs(after.image1.astype(int) - still.image1).mean() > 0.5
        equal += np.array_equal(after.image1, after.image2)
    assert equal / 100 == pytest.approx(0.8, abs=0.1)


@pytest.mark.parametrize(
    ("name", "reach"), [("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.4), ("hue", 0.5 / math.pi)]
)
def test_each_change_of_colour_is_what_it_is_called(name: str, reach: float) -> None:
    """Why: with brightness called contrast, or a hue in other units, published settings mean something else."""
    colour = NO_COLOUR | {name: reach}
    before = replace(pair(), image1=(pair().image1 // 4 + 80).astype(np.uint8))  # nothing gets clipped
    measured = []
    for seed in range(100):
        augmentation = Augmentation(SIZE, **NO_MOTION, **colour, asymmetric_probability=1)
        image = augmentation(before, np.random.default_rng(seed)).image1
        one, other = (picture.astype(np.float32) / 255 for picture in (before.image1, image))
        grey, grey_after = (cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in (one, other))
        if name == "brightness":
            measured.append(other.mean() / one.mean() - 1)
            assert np.abs(other - one * (1 + measured[-1])).max() < 0.01
        elif name == "contrast":
            measured.append(other.std() / one.std() - 1)
            assert grey_after.mean() == pytest.approx(grey.mean(), abs=0.01)
        elif name == "saturation":
            measured.append((other - grey_after[:, :, None]).std() / (one - grey[:, :, None]).std() - 1)
            assert np.abs(grey_after - grey).max() < 0.01
        else:
            hue, hue_after = (cv2.cvtColor(picture, cv2.COLOR_RGB2HSV)[:, :, 0] for picture in (one, other))
            turns = (np.median((hue_after - hue + 180) % 360) - 180) / 360
            measured.append(turns)
            assert np.abs(other.max(axis=2) - one.max(axis=2)).max() < 0.01
    assert -1.03 * reach < min(measured) < -0.85 * reach and 0.85 * reach < max(measured) < 1.03 * reach


def test_the_eraser_hides_parts_of_image_2_only() -> None:
    """Why: it stands for things that come between: image 1 must keep what is hidden, in the mean colour of image 2."""
    before = pair()
    mean = np.rint(before.image2.mean(axis=(0, 1)))
    counts = []
    for seed in range(100):
        after = Augmentation(SIZE, **NO_MOTION, **(NO_COLOUR | {"eraser_probability": 0.5}))(
            before, np.random.default_rng(seed)
        )
        changed = (after.image2 != before.image2).any(axis=2)
        assert np.array_equal(after.image1, before.image1) and (after.image2[changed] == mean).all()
        counts.append(int(changed.sum()))
    assert np.mean(np.array(counts) > 0) == pytest.approx(0.5, abs=0.12) and 5000 < max(counts) < 2 * 100 * 100


def test_all_randomness_is_the_generator_that_is_given() -> None:
    """Why: exact resume and workers need each sample to be a function of its seed."""
    augmentation = Augmentation((64, 80))
    results = []
    for global_seed in (0, 1):
        np.random.seed(global_seed)  # noqa: NPY002  what must have no influence
        cv2.setRNGSeed(global_seed)
        results.append(augmentation(pair(), np.random.default_rng(5)))
    other = augmentation(pair(), np.random.default_rng(6))
    for field in ("image1", "image2", "flow", "valid", "occluded"):
        assert np.array_equal(getattr(results[0], field), getattr(results[1], field))
    assert not np.array_equal(results[0].image1, other.image1)


def test_impossible_settings_are_refused() -> None:
    """Why: recipes are written by hand."""
    for options, message in (
        ({"crop": (0, 64)}, "crop.0: expected greater than or equal to 1, got 0"),
        ({"min_scale": 0.5, "max_scale": 0.1}, "min_scale: expected at most max_scale, 0.1, got 0.5"),
        ({"horizontal_flip": 1.5}, "horizontal_flip: expected less than or equal to 1, got 1.5"),
        ({"hue": math.nan}, "hue: expected .*, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            build(Augmentation, {"crop": (64, 64)} | options)
    with pytest.raises(ValueError, match="scene/0 has no ground truth"):
        Augmentation((64, 64))(replace(pair(), flow=None), np.random.default_rng(0))
