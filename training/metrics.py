# SPDX-License-Identifier: Apache-2.0
"""Errors of flow fields as the benchmarks define them: counts on one image pair, and the figures of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from deq_flow_ros.imaging.metrics import error_lengths, is_outlier
from training.datasets import Sample

SPEEDS = {"s0-10": (0.0, 10.0), "s10-40": (10.0, 40.0), "s40+": (40.0, np.inf)}
"""Regions by the length of the true flow in px, from the first to below the second (MPI-Sintel's s0-10, s10-40, s40+;
Butler et al., ECCV 2012, section 4)."""
REGIONS = ("all", "matched", "unmatched", *SPEEDS)
"""Where errors are counted. ``matched``: what image 1 shows is visible in image 2 as well (KITTI calls it "noc");
``unmatched``: it is not (Sintel; Butler et al., section 4). Only where the data set says what is occluded."""

Summary = dict[str, float | None]


class Tally(NamedTuple):
    """Sums over the pixels of a region of one image where the ground truth is valid.

    :ivar error_px: sum of the endpoint errors.
    :ivar over_1px: pixels whose endpoint error is above 1 px (Spring; Mehl et al., CVPR 2023).
    :ivar over_3px: above 3 px (KITTI 2012's outliers, development kit).
    :ivar fl: above 3 px and above 5 % of the length of the true flow (KITTI 2015's "Fl", development kit).
    """

    pixels: int
    error_px: float
    over_1px: int
    over_3px: int
    fl: int


def measure(flow: np.ndarray, sample: Sample) -> dict[str, Tally]:
    """Tallies of an estimate (H, W, 2) px against the ground truth of its sample, by region.

    Regions that the data set does not tell apart are left out. Where a sample has alternatives (Spring), the least
    error counts, against the longest vector for ``fl``, and regions go by the mean length, as on its server.

    :raises ValueError: for another shape, or a sample without ground truth.
    :raises FloatingPointError: where the estimate is not finite: no mean would mean anything.
    """
    if sample.flow is None:
        raise ValueError(f"{sample.name} has no ground truth to measure against; use a split that has")
    if flow.shape != sample.flow.shape:
        raise ValueError(f"{sample.name}: expected a flow of shape {sample.flow.shape}, got {flow.shape}")
    if not np.isfinite(flow).all():
        raise FloatingPointError(f"{sample.name}: the estimated flow is not finite everywhere")
    truths = [truth.astype(np.float64) for truth in (sample.flow, *sample.alternatives)]
    error = np.minimum.reduce([error_lengths(flow, truth) for truth in truths])
    lengths = np.stack([np.linalg.norm(truth, axis=2) for truth in truths])
    length, longest = lengths.mean(axis=0), lengths.max(axis=0)
    masks = {"all": sample.valid}
    if sample.occluded is not None:
        masks |= {"matched": sample.valid & ~sample.occluded, "unmatched": sample.valid & sample.occluded}
    masks |= {name: sample.valid & (length >= low) & (length < high) for name, (low, high) in SPEEDS.items()}
    counted = {"over_1px": error > 1, "over_3px": error > 3, "fl": is_outlier(error, longest)}
    return {
        name: Tally(
            int(mask.sum()), float(error[mask].sum()), **{k: int((mask & over).sum()) for k, over in counted.items()}
        )
        for name, mask in masks.items()
    }


def summarise(tallies: Sequence[Tally]) -> Summary:
    """What several images have in one region; None where there is no pixel.

    Means over pixels weigh every pixel of the set alike; means over images every image, however many pixels of it are
    known. Benchmarks differ in which they mean, so both are here. docs/evaluation.md explains the keys.
    """
    counts = np.array([tally for tally in tallies if tally.pixels], np.float64).reshape(-1, 5)
    if not len(counts):
        return {"images": 0, "pixels": 0, **dict.fromkeys(_MEASURES)}
    pixels, error, over_1px, over_3px, fl = counts.sum(axis=0).tolist()
    values = (
        error / pixels, float(np.mean(counts[:, 1] / counts[:, 0])), 100 * over_1px / pixels, 100 * over_3px / pixels,
        100 * float(np.mean(counts[:, 3] / counts[:, 0])), 100 * fl / pixels,
    )  # fmt: skip
    return {"images": len(counts), "pixels": int(pixels), **dict(zip(_MEASURES, values, strict=True))}


_MEASURES = (
    "epe_px", "epe_image_mean_px", "over_1px_percent", "over_3px_percent", "over_3px_image_mean_percent", "fl_percent",
)  # fmt: skip


def by_region(measured: Sequence[Mapping[str, Tally]]) -> dict[str, Summary]:
    """``summarise`` for every region that any of the images has."""
    regions = (region for region in REGIONS if any(region in tallies for tallies in measured))
    return {region: summarise([tallies[region] for tallies in measured if region in tallies]) for region in regions}


class Column(NamedTuple):
    """A figure of a table: ``key`` of the summary of ``region``."""

    label: str
    region: str
    key: str

    def of(self, regions: Mapping[str, Summary]) -> str:
        """The figure for people; a dash where there is none."""
        value = regions.get(self.region, {}).get(self.key)
        return "-" if value is None else f"{value:.2f} %" if "percent" in self.key else f"{value:.3f}"


_EPE, _IMAGE_EPE = Column("EPE", "all", "epe_px"), Column("EPE", "all", "epe_image_mean_px")
_1PX, _FL = Column("1px", "all", "over_1px_percent"), Column("Fl", "all", "fl_percent")
_SINTEL = tuple(Column(region, region, "epe_px") for region in REGIONS)
# The development kit of 2012 averages over images, that of 2015 over all pixels. 2015 has no endpoint error of its own;
# the literature (RAFT, arXiv 2003.12039, and since) averages it over images as in 2012.
_KITTI = (
    _IMAGE_EPE, Column("EPE noc", "matched", "epe_image_mean_px"),
    Column("Fl-all", "all", "fl_percent"), Column("Fl-noc", "matched", "fl_percent"),
)  # fmt: skip
_OUT = tuple(Column(f"Out-{k}", r, "over_3px_image_mean_percent") for k, r in (("all", "all"), ("noc", "matched")))
_COLUMNS: dict[str, tuple[Column, ...]] = {
    "sintel-clean": _SINTEL, "sintel-final": _SINTEL, "kitti-2012": (*_KITTI, *_OUT), "kitti-2015": _KITTI,
    "spring": (_1PX, _EPE, _FL), "middlebury": (_IMAGE_EPE,),
}  # fmt: skip


def columns(dataset: str) -> tuple[Column, ...]:
    """The figures that the benchmark of a data set quotes; of one without benchmark, error and outliers by pixels."""
    if dataset.startswith("pairs/"):
        return _IMAGE_EPE, _1PX, _FL
    return _COLUMNS.get(dataset, (_EPE, _1PX, Column("3px", "all", "over_3px_percent")))
