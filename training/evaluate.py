# SPDX-License-Identifier: Apache-2.0
"""Errors on image pairs as the benchmarks define them, and the command that evaluates weights on data sets by them.

``python -m training.evaluate --data sintel-clean=FOLDER kitti-2015=FOLDER [--model NAME_OR_PATH] [--out DIR]``

Every pair starts cold; with ``--warm``, pairs that follow another start from its fixed point, moved along the motion.
Metrics and the keys of DIR/metrics.json: docs/evaluation.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from deq_flow_ros.command_line import CommandLine, exit_status, named_path, set_threads
from deq_flow_ros.equilibrium import State
from deq_flow_ros.imaging.metrics import error_lengths, is_outlier
from deq_flow_ros.model import DEQFlow, load_model
from deq_flow_ros.model.cells import carry
from deq_flow_ros.recordings.files import write_json
from training.datasets import open_dataset
from training.flow_dataset import FlowDataset, Sample, open_pairs, to_array, to_tensor

FlowFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]
SPEEDS = {"s0-10": (0.0, 10.0), "s10-40": (10.0, 40.0), "s40+": (40.0, np.inf)}
"""Regions by the length of the true flow in px (MPI-Sintel; Butler et al., ECCV 2012, section 4)."""
REGIONS = ("all", "matched", "unmatched", *SPEEDS)
"""Where errors are counted. ``matched``: what image 1 shows is visible in image 2 as well (KITTI's "noc"); only where
the data set says what is occluded."""


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


def solved(
    model: DEQFlow, dataset: FlowDataset, counts: Sequence[int], coarse_levels: int, warm: bool
) -> Iterator[tuple[Sample, list[np.ndarray]]]:
    """The pairs of a data set in their order, each with its flow (H, W, 2) px after each number of iterations.

    :param coarse_levels: smaller resolutions that cold starts begin with, see ``DEQFlow.coarse_start``.
    :param warm: whether pairs that follow another begin with its state, moved along the motion.
    """
    for run in dataset.sequences():
        states: list[State | None] = [None] * len(counts)
        for sample in map(dataset.__getitem__, run):
            images, flows = [to_tensor(image, model.device) for image in (sample.image1, sample.image2)], []
            for place, count in enumerate(counts):
                result = model(*images, max_iterations=count, state=states[place], coarse_levels=coarse_levels)
                states[place] = carry(result.state) if warm else None
                flows.append(to_array(result.flow))
            yield sample, flows


class Tally(NamedTuple):
    """Sums over the pixels of a region of one image where the ground truth is valid."""

    pixels: int
    error_px: float  # sum of the endpoint errors
    over_1px: int  # pixels whose endpoint error is above 1 px (Spring; Mehl et al., CVPR 2023)
    over_3px: int  # above 3 px (KITTI 2012's outliers, development kit)
    fl: int  # above 3 px and above 5 % of the length of the true flow (KITTI 2015's "Fl", development kit)


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


def summarise(tallies: Sequence[Tally]) -> dict[str, float]:
    """What several images have in one region, see docs/evaluation.md; where there is no pixel, only that.

    Benchmarks differ in whether they mean over all pixels of a set or over its images, so both are here.
    """
    counts = np.array([tally for tally in tallies if tally.pixels], np.float64).reshape(-1, 5)
    if not len(counts):
        return {"images": 0, "pixels": 0}
    pixels, error, over_1px, over_3px, fl = counts.sum(axis=0).tolist()
    _, image_error, _, image_over_3px, _ = (counts / counts[:, :1]).mean(axis=0).tolist()
    return {
        "images": len(counts), "pixels": int(pixels), "epe_px": error / pixels, "epe_image_mean_px": image_error,
        "over_1px_percent": 100 * over_1px / pixels, "over_3px_percent": 100 * over_3px / pixels,
        "over_3px_image_mean_percent": 100 * image_over_3px, "fl_percent": 100 * fl / pixels,
    }  # fmt: skip


def by_region(measured: Sequence[Mapping[str, Tally]]) -> dict[str, dict[str, float]]:
    """``summarise`` for every region that any of the images has."""
    regions = {region: [tallies[region] for tallies in measured if region in tallies] for region in REGIONS}
    return {region: summarise(tallies) for region, tallies in regions.items() if tallies}


_EPE, _IMAGE_EPE = {"EPE": ("all", "epe_px")}, {"EPE": ("all", "epe_image_mean_px")}
_1PX, _FL = {"1px": ("all", "over_1px_percent")}, {"Fl": ("all", "fl_percent")}
_3PX = {"3px": ("all", "over_3px_percent")}
_SINTEL = {region: (region, "epe_px") for region in REGIONS}
# The development kit of 2012 averages over images, that of 2015 over all pixels. 2015 has no endpoint error of its own;
# the literature (RAFT, arXiv 2003.12039, and since) averages it over images as in 2012.
_KITTI = {
    **_IMAGE_EPE, "EPE noc": ("matched", "epe_image_mean_px"),
    "Fl-all": ("all", "fl_percent"), "Fl-noc": ("matched", "fl_percent"),
}  # fmt: skip
_OUT = {f"Out-{kind}": (r, "over_3px_image_mean_percent") for kind, r in (("all", "all"), ("noc", "matched"))}
_COLUMNS = {
    "sintel-clean": _SINTEL, "sintel-final": _SINTEL, "kitti-2012": _KITTI | _OUT, "kitti-2015": _KITTI,
    "spring": _1PX | _EPE | _FL, "middlebury": _IMAGE_EPE,
}  # fmt: skip


def figures(dataset: str, regions: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """What the benchmark of a data set quotes, for people; of one without benchmark, error and outliers by pixels."""
    other = _IMAGE_EPE | _1PX | _FL if dataset.startswith("pairs/") else _EPE | _1PX | _3PX
    found = {}
    for label, (region, key) in _COLUMNS.get(dataset, other).items():
        value = regions.get(region, {}).get(key)
        found[label] = "-" if value is None else f"{value:.2f} %" if "percent" in key else f"{value:.3f}"
    return found


def pair_error(pair: Sample, flow: np.ndarray) -> float:
    """Mean endpoint error over the valid pixels, px; ``ValueError`` if there are none."""
    summary = summarise([measure(flow, pair)["all"]])
    if not summary["pixels"]:
        raise ValueError(f"{pair.name} has no pixel with valid ground truth")
    return summary["epe_px"]


def group_means(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Mean of each group of named pairs, in the order of the pairs, and the mean over the groups as ``mean``."""
    groups: dict[str, list[float]] = {}
    for name, value in values:
        groups.setdefault(name.split("/", 1)[0], []).append(value)
    means = {group: float(np.mean(v)) for group, v in groups.items()}
    return {**means, "mean": float(np.mean(list(means.values())))}


# The split with public ground truth that the literature evaluates on; "train" where it is not named here.
SPLITS = {"chairs": "val", "things-clean": "test", "things-final": "test"}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    line = CommandLine("python -m training.evaluate", __doc__)
    line.add_argument("--data", nargs="+", type=named_path, default=[], metavar="NAME=ROOT",
                      help="data sets, see docs/datasets.md")  # fmt: skip
    line.add_pairs("list of pairs in JSON, see docs/datasets.md; each group is a data set")
    line.add_argument("--split", help="split of all data sets (default: the one the literature evaluates on)")
    line.add_number("--iterations", [12, 24], "numbers to compare", least=1, nargs="+")
    line.add_number("--limit", None, "only the first N pairs of each data set", least=1, kind=int, metavar="N")
    line.add_path("--out", "folder for metrics.json", metavar="DIR")
    add_solve(line)
    options = line.parse_args(arguments)
    if not options.data and not options.pairs:
        line.error("nothing to evaluate: give --data NAME=ROOT, or --pairs")
    if options.split and not options.data:
        line.error("--split is of the data sets of --data: the list of --pairs has none")
    names = [name for name, _ in options.data]
    if "pairs" in names and not options.pairs:
        line.error("--data takes data sets; a list of pairs is given as --pairs LIST.json")
    if len(set(names)) != len(names):
        line.error(f"--data: expected each data set once, got {' '.join(names)}")
    return options


def add_solve(line: CommandLine) -> None:
    """The options that say with what, and how, pairs are solved."""
    line.add_model()
    line.add_argument("--warm", action="store_true", help="start from the fixed point of the pair before, if any")
    line.add_number("--coarse-levels", 0, "smaller resolutions that cold starts begin with; the node takes 2", least=0)
    line.add_device()
    line.add_threads()


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate, print tables, and write metrics.json; returns the exit status."""
    set_threads(options.threads)
    datasets: dict[str, FlowDataset] = {
        name: open_dataset(name, root, split=options.split or SPLITS.get(name, "train")) for name, root in options.data
    }
    datasets |= {f"pairs/{group.name}": group for group in (open_pairs(options.pairs) if options.pairs else ())}
    model, console, entries = load_model(options.model, options.device), Console(), dict[str, Any]()
    for name, dataset in datasets.items():
        measured: dict[int, dict[str, dict[str, Tally]]] = {count: {} for count in options.iterations}
        pairs = solved(model, dataset, options.iterations, options.coarse_levels, options.warm)
        total = min(len(dataset), options.limit or len(dataset))
        for sample, flows in tqdm(islice(pairs, total), total=total, desc=name, unit="pair", dynamic_ncols=True):
            for count, flow in zip(options.iterations, flows, strict=True):
                measured[count][sample.name] = measure(flow, sample)
        results: list[dict[str, Any]] = []
        for count, tallies in measured.items():
            errors = {pair: summarise([regions["all"]]).get("epe_px") for pair, regions in tallies.items()}
            regions = by_region(list(tallies.values()))
            results.append({"iterations": count, "regions": regions, "pairs_epe_px": errors})
        entries[name] = {"pairs": total, "results": results}
        table = Table("iterations", *figures(name, {}), title=f"{name}: {total} pairs")
        for row in results:
            table.add_row(str(row["iterations"]), *figures(name, row["regions"]).values())
        console.print(table)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        chosen = {name: getattr(options, name) for name in ("model", "warm", "coarse_levels", "device")}
        data = {name: str(root) for name, root in options.data}
        pairs_of = {"data": data, "pairs": str(options.pairs) if options.pairs else None, "datasets": entries}
        write_json(options.out / "metrics.json", {**chosen, "torch": torch.__version__, **pairs_of})
        console.print(f"wrote {options.out / 'metrics.json'}", markup=False, soft_wrap=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Evaluate; returns the exit status."""
    options = parse_arguments(arguments)
    return exit_status(lambda: evaluate(options))


if __name__ == "__main__":
    raise SystemExit(main())
