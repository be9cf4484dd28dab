# SPDX-License-Identifier: Apache-2.0
"""Errors on image pairs as the benchmarks define them, and pairs from a list in JSON.

The list is an array of objects with ``name`` (its first component is the group), ``image1``, ``image2``, ``flow``
(any file that ``read_flow`` reads) and optionally ``invalid`` (non-zero where the ground truth does not hold); paths
are relative to the list.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch

from deq_flow_ros.imaging.metrics import error_lengths, is_outlier
from deq_flow_ros.model import DEQFlow
from deq_flow_ros.recordings.flow_files import read_flow
from training.flow_dataset import FlowDataset, PairFiles, Sample, Truth, read_mask
from training.rendering import Clip

FlowFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]
SPEEDS = {"s0-10": (0.0, 10.0), "s10-40": (10.0, 40.0), "s40+": (40.0, np.inf)}
"""Regions by the length of the true flow in px (MPI-Sintel; Butler et al., ECCV 2012, section 4)."""
REGIONS = ("all", "matched", "unmatched", *SPEEDS)
"""Where errors are counted. ``matched``: what image 1 shows is visible in image 2 as well (KITTI's "noc"); only where
the data set says what is occluded."""

Summary = dict[str, float | None]


class PairGroup(FlowDataset):
    """The pairs of one group of a list, as a data set of that name."""

    layout = "the files that the list of pairs names"
    splits = ("train",)

    def __init__(self, name: str, root: Path, entries: Sequence[Mapping[str, str]]) -> None:
        self._entries = entries
        super().__init__(name, root, "train")

    def _find(self) -> Iterator[PairFiles]:
        for entry in self._entries:
            image1, image2, flow = (self.root / entry[key] for key in ("image1", "image2", "flow"))
            invalid = tuple(self.root / entry[key] for key in ("invalid",) if key in entry)
            name = entry["name"].partition("/")[2] or entry["name"]
            yield PairFiles(name, str(image1.parent), image1, image2, flow, invalid)

    def _truth(self, flow: Path, beside: tuple[Path, ...], size: tuple[int, int]) -> Truth:
        vectors, valid = read_flow(flow)
        for path in beside:
            valid = valid & ~read_mask(path, size)
        return Truth(vectors, valid)


def _group(name: str) -> str:
    return name.split("/", 1)[0]


def open_pairs(path: str | Path) -> list[PairGroup]:
    """The groups of a list, in its order.

    :raises FileNotFoundError: naming the list, or the file that is missing.
    :raises ValueError: if the list is not as described above.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must hold a non-empty array of pairs, got {type(entries).__name__}")
    groups: dict[str, list[Mapping[str, str]]] = {}
    for entry in entries:
        missing = {"name", "image1", "image2", "flow"} - set(entry)
        if missing:
            raise ValueError(f"pair {dict(entry)} has no {', '.join(sorted(missing))}")
        groups.setdefault(_group(entry["name"]), []).append(entry)
    names = Counter(entry["name"] for entry in entries)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"{path}: expected each name once, got several pairs of the name {twice[0]}")
    return [PairGroup(name, path.parent, members) for name, members in groups.items()]


def read_pairs(path: str | Path) -> list[Sample]:
    """All pairs of a list, group by group; errors as ``open_pairs``, and ``MediaError`` for a damaged file."""
    return [group[index] for group in open_pairs(path) for index in range(len(group))]


def to_tensor(image: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """(H, W, 3) uint8 to (1, 3, H, W) uint8 on the device."""
    return torch.from_numpy(image).permute(2, 0, 1)[None].to(device)


def to_array(flow: torch.Tensor) -> np.ndarray:
    """Flow of one pair, (1, 2, H, W), to (H, W, 2)."""
    return flow[0].permute(1, 2, 0).cpu().numpy()


def model_flow(model: DEQFlow, iterations: int, coarse_levels: int = 0, scale: float = 1.0) -> FlowFunction:
    """The model, started cold, as a function of two images (H, W, 3) that returns flow (H, W, 2) px.

    :param scale: resolution to process at, 1 is that of the images.
    """

    def flow(image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
        height, width = image1.shape[:2]
        if scale != 1.0:
            size = (round(width * scale), round(height * scale))
            image1, image2 = (cv2.resize(image, size, interpolation=cv2.INTER_CUBIC) for image in (image1, image2))
        pair = to_tensor(image1, model.device), to_tensor(image2, model.device)
        result = to_array(model(*pair, max_iterations=iterations, coarse_levels=coarse_levels).flow)
        if scale != 1.0:
            result = cv2.resize(result, (width, height), interpolation=cv2.INTER_LINEAR) / scale
        return result

    return flow


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
    """What several images have in one region, see docs/evaluation.md; None where there is no pixel.

    Benchmarks differ in whether they mean over all pixels of a set or over its images, so both are here.
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


def pair_errors(pair: Sample, flow: np.ndarray) -> tuple[float, float]:
    """Mean endpoint error (px) and Fl (%, see ``Tally``) over the valid pixels; ``ValueError`` if there are none."""
    summary = summarise([measure(flow, pair)["all"]])
    error, fl = summary["epe_px"], summary["fl_percent"]
    if error is None or fl is None:
        raise ValueError(f"{pair.name} has no pixel with valid ground truth")
    return error, fl


def group_means(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Mean of each group of named pairs, in the order of the pairs, and the mean over the groups as ``mean``."""
    groups: dict[str, list[float]] = {}
    for name, value in values:
        groups.setdefault(_group(name), []).append(value)
    means = {group: float(np.mean(v)) for group, v in groups.items()}
    return {**means, "mean": float(np.mean(list(means.values())))}


def clip_pairs(name: str, clip: Clip) -> list[Sample]:
    """The pairs of the first clip of a batch, each with its place behind the name."""
    images = np.ascontiguousarray(clip.images[0].round().byte().permute(0, 2, 3, 1).numpy())
    flows = np.ascontiguousarray(clip.flow[0].permute(0, 2, 3, 1).numpy())
    return [
        Sample(f"{name}/{t}", images[t], images[t + 1], flows[t], clip.valid[0, t].numpy(), clip.occluded[0, t].numpy())
        for t in range(len(flows))
    ]
