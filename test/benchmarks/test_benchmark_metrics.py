# SPDX-License-Identifier: Apache-2.0
"""The metrics of the benchmarks, against figures worked out by hand."""

import numpy as np
import pytest

from training.evaluate import REGIONS, by_region, figures, measure, summarise
from training.flow_dataset import Sample

IMAGE = np.zeros((1, 5, 3), np.uint8)


def row(lengths: list[float], valid: list[bool], occluded: list[bool] | None) -> Sample:
    """One row of pixels that move to the right."""
    flow = np.zeros((1, 5, 2), np.float32)
    flow[0, :, 0] = lengths
    hidden = None if occluded is None else np.array([occluded])
    return Sample("made/row", IMAGE, IMAGE, flow, np.array([valid]), hidden)


def off_by(sample: Sample, errors: list[float]) -> np.ndarray:
    """The truth of a row, moved down by so many px."""
    assert sample.flow is not None
    flow = sample.flow.copy()
    flow[0, :, 1] += errors
    return flow


def test_pixels_count_where_the_benchmarks_count_them() -> None:
    """Why: thresholds and regions are conventions; one pixel on each side of each of them shows which ones hold."""
    sample = row([0, 9.5, 10, 40, 100], [True, True, True, True, True], [False, False, True, True, False])
    tallies = measure(off_by(sample, [1.0, 1.5, 3.0, 3.5, 4.5]), sample)
    assert set(tallies) == set(REGIONS)
    assert {region: tally.pixels for region, tally in tallies.items()} == {
        "all": 5, "matched": 3, "unmatched": 2, "s0-10": 2, "s10-40": 1, "s40+": 2,
    }  # fmt: skip
    assert tallies["all"].error_px == pytest.approx(13.5)
    assert tallies["unmatched"].error_px == pytest.approx(6.5)
    # "Above": an error of exactly 1 or 3 px is none. 4.5 px is an error, but within 5 % of 100 px.
    assert (tallies["all"].over_1px, tallies["all"].over_3px, tallies["all"].fl) == (4, 2, 1)
    assert (tallies["s40+"].over_3px, tallies["s40+"].fl) == (2, 1)


def test_what_is_not_valid_counts_nowhere() -> None:
    """Why: sparse ground truth is zero where it is unknown, and a mean over that would look wonderful."""
    sample = row([0, 9, 20, 60, 0], [False, True, True, False, False], None)
    tallies = measure(off_by(sample, [50, 1, 2, 50, 50]), sample)
    assert "matched" not in tallies  # nobody knows
    assert tallies["all"].pixels == 2 and tallies["all"].error_px == pytest.approx(3)
    assert tallies["s40+"].pixels == 0
    regions = by_region([tallies])
    assert regions["s40+"] == {"images": 0, "pixels": 0}
    assert figures("sintel-clean", regions)["s40+"] == "-" and figures("sintel-clean", regions)["all"] == "1.500"


def test_means_over_pixels_and_over_images_differ() -> None:
    """Why: KITTI 2012 and Middlebury average over images, Sintel and KITTI 2015 over pixels: both must be right."""
    many = row([0] * 5, [True, True, True, True, False], None)
    one = row([0] * 5, [True, False, False, False, False], None)
    summary = summarise(
        [measure(off_by(many, [0, 0, 0, 4, 9]), many)["all"], measure(off_by(one, [4, 9, 9, 9, 9]), one)["all"]]
    )
    assert (summary["images"], summary["pixels"]) == (2, 5)
    assert summary["epe_px"] == pytest.approx(8 / 5) and summary["epe_image_mean_px"] == pytest.approx((1 + 4) / 2)
    assert summary["over_3px_percent"] == pytest.approx(40)
    assert summary["over_3px_image_mean_percent"] == pytest.approx((25 + 100) / 2)
    kitti = figures("kitti-2012", {"all": summary})
    assert kitti["Out-all"] == "62.50 %" and kitti["EPE"] == "2.500"


def test_what_cannot_be_measured_is_refused() -> None:
    """Why: NaN, another size or a missing truth would end as a figure, or as no figure, hours later."""
    sample = row([0] * 5, [True] * 5, None)
    with pytest.raises(FloatingPointError, match="made/row: the estimated flow is not finite"):
        measure(off_by(sample, [np.nan, 0, 0, 0, 0]), sample)
    with pytest.raises(ValueError, match=r"expected a flow of shape \(1, 5, 2\), got \(1, 4, 2\)"):
        measure(np.zeros((1, 4, 2)), sample)
    with pytest.raises(ValueError, match="made/row has no ground truth"):
        measure(np.zeros((1, 5, 2)), Sample("made/row", IMAGE, IMAGE, None, sample.valid, None))
