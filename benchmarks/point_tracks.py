# SPDX-License-Identifier: Apache-2.0
"""How long points are followed, and how far they drift, beside OpenCV's KLT on the same frames from the same points.

    python -m benchmarks.point_tracks [--every 3] [--steps 30] [--sequence BEDROOM_FRAMES] [--plot OUT.png]

KLT is calcOpticalFlowPyrLK with its defaults (windows of 21 px, 4 levels) and a forward-backward check of 1 px. On the
rendered drive, a point counts if it is visible in the last image as well. A recording has no truth: there, the drift is
the distance from the start after all steps forward and as many back.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console

from benchmarks.drive import klt, perception_stream
from benchmarks.report import Benchmark, Row, picture, table
from benchmarks.sequences import PERIOD_NS, moving_frames
from deq_flow_ros.demo.scene import Scene, SceneSettings
from deq_flow_ros.model import load_model
from deq_flow_ros.perception.point_tracks import PointTracker, TrackSettings, corners

SPACING_PX, TEXTURE = 12, 2.0
NEAR_PX = (1.0, 2.0, 5.0)
Followed = tuple[np.ndarray, np.ndarray]
"""Positions (N, 2) px, and which points are still followed (N,)."""


def flows(images: list[np.ndarray], model: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Flow and uncertainty from each image to the next."""
    estimator = perception_stream(load_model(model), direction="forward")
    results = [estimator.update(image, number * PERIOD_NS) for number, image in enumerate(images)]
    return [(r.flow, r.uncertainty) for r in results if r is not None and r.uncertainty is not None]


def by_flow(fields: list[tuple[np.ndarray, np.ndarray]], greys: list[np.ndarray], points: np.ndarray) -> Followed:
    """As ``point_tracks`` does."""
    tracker = PointTracker(TrackSettings(spacing_px=4, max_tracks=0))
    tracker.begin(points)
    for step, (flow, uncertainty) in enumerate(fields):
        tracker.follow(flow, uncertainty, greys[step], greys[step + 1], (step, step + 1))
    there, alive = points.copy(), np.zeros(len(points), bool)
    there[tracker.tracks.ids], alive[tracker.tracks.ids] = tracker.tracks.points, True
    return there, alive


def by_klt(greys: list[np.ndarray], points: np.ndarray) -> Followed:
    """As OpenCV's examples do, with the check."""
    here, alive = points.astype(np.float32)[:, None], np.ones(len(points), bool)
    limits = np.array(greys[0].shape[::-1]) - 1
    for first, second in pairwise(greys):
        going = np.flatnonzero(alive)
        if not going.size:
            break
        there, kept = klt(first, second, here[going])
        alive[going] = kept & ((there[:, 0] >= 0) & (there[:, 0] <= limits)).all(axis=1)
        here[going] = there
    return here[:, 0].astype(np.float64), alive


def _summary(name: str, alive: np.ndarray, error: np.ndarray, counted: np.ndarray) -> Row:
    kept = alive & counted
    return {
        "method": name,
        "points": int(counted.sum()),
        "survive": float(kept.sum() / max(counted.sum(), 1)),
        "mean_px": float(error[kept].mean()) if kept.any() else float("nan"),
        "median_px": float(np.median(error[kept])) if kept.any() else float("nan"),
        **{f"within_{px:g}_px": float((kept & (error <= px)).sum() / max(counted.sum(), 1)) for px in NEAR_PX},
    }


def _drive(options: argparse.Namespace, console: Console) -> list[Row]:
    scene, settings = Scene(SceneSettings()), SceneSettings()
    numbers = list(range(0, settings.frames, options.every))
    with console.status("rendering"):
        images = [scene.render(number) for number in numbers]
    greys, fields = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images], flows(images, options.model)
    found: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {"point_tracks": [], "KLT": []}
    steps = options.steps
    starts = range(0, len(numbers) - steps, max(1, (len(numbers) - steps) // 10))
    for start in starts:
        points = corners(greys[start], SPACING_PX, TEXTURE)
        flow, visible = scene.flow(numbers[start], numbers[start + steps])
        x, y = points.astype(int).T
        truth, counted = points + flow[y, x], visible[y, x]
        part = greys[start : start + steps + 1]
        for name, (there, alive) in {
            "point_tracks": by_flow(fields[start : start + steps], part, points), "KLT": by_klt(part, points),
        }.items():  # fmt: skip
            error = np.where(counted, np.linalg.norm(there - truth, axis=1), np.inf)
            found[name].append((alive, error, counted))
    if options.plot:
        _plot(options.plot, images[: steps + 1], fields[:steps], greys[: steps + 1])
    return [_summary(name, *(np.concatenate(part) for part in zip(*runs, strict=True))) for name, runs in found.items()]


def _recording(path: str, options: argparse.Namespace) -> list[Row]:
    frames = moving_frames(path, options.steps * options.every + 1)[:: options.every]
    frames = [cv2.resize(f, (320, round(320 * f.shape[0] / f.shape[1])), interpolation=cv2.INTER_AREA) for f in frames]
    there_and_back = [*frames, *frames[-2::-1]]
    greys = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in there_and_back]
    points = corners(greys[0], SPACING_PX, TEXTURE)
    fields = flows(there_and_back, options.model)
    rows = []
    for name, one_way, (back, alive) in (
        ("point_tracks", by_flow(fields[: len(frames) - 1], greys, points)[1], by_flow(fields, greys, points)),
        ("KLT", by_klt(greys[: len(frames)], points)[1], by_klt(greys, points)),
    ):
        drift = np.linalg.norm(back - points, axis=1)
        row = _summary(name, alive, drift, np.ones(len(points), bool))
        rows.append({**row, "survive": float(one_way.mean())})
    return rows


def measure(options: argparse.Namespace, console: Console) -> Row:
    """Print one table."""
    rates = f"{options.steps} steps of every {options.every}th frame"
    made = table(
        f"Points after {rates}", ["frames", "method"],
        ["points", "survive", "mean px", "median px", *(f"<= {px:g} px" for px in NEAR_PX)],
    )  # fmt: skip
    groups = {"rendered drive": _drive(options, console)}
    groups |= {Path(path).stem: _recording(path, options) for path in options.sequence}
    for name, rows in groups.items():
        for row in rows:
            near = [f"{row[f'within_{px:g}_px']:.1%}" for px in NEAR_PX]
            made.add_row(
                name, row["method"], str(row["points"]), f"{row['survive']:.1%}", f"{row['mean_px']:.2f}",
                f"{row['median_px']:.2f}", *near,
            )  # fmt: skip
    console.print(made)
    return groups


def _plot(
    path: Path, images: list[np.ndarray], fields: list[tuple[np.ndarray, np.ndarray]], greys: list[np.ndarray]
) -> None:
    """The last image, with the way of each point that has been followed until there."""
    tracker = PointTracker()
    ways: dict[int, list[np.ndarray]] = {}
    for step, (flow, uncertainty) in enumerate(fields):
        tracker.follow(flow, uncertainty, greys[step], greys[step + 1], (step, step + 1))
        for number, point in zip(tracker.tracks.ids.tolist(), tracker.tracks.points, strict=True):
            ways.setdefault(number, []).append(point)
    with picture(path, 6.0, 4.5) as figure:
        axis = figure.subplots()
        axis.imshow(images[-1])
        for number, age in zip(tracker.tracks.ids.tolist(), tracker.tracks.ages.tolist(), strict=True):
            way = np.array(ways[number])
            axis.plot(*way.T, color=(1.0, 0.85, 0.1) if age < 10 else (0.2, 1.0, 0.4), linewidth=0.8)
            axis.plot(*way[-1], ".", color="white", markersize=3)
        axis.set_axis_off()


def main(args: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    line = Benchmark(__file__, __doc__, device=False, plot="the ways of the points through the drive", threads=1)
    line.add_argument("--model", default="nano", help="name or path (default: nano)")
    line.add_number("--steps", 30, "images that the points are followed for", least=2, kind=int)
    line.add_number("--every", 3, "take every so-many-th frame", least=1, kind=int)
    line.add_argument("--sequence", nargs="+", default=[], help="videos, bags or folders of images, without truth")
    options = line.parse_args(args)
    return line.run(options, measure)


if __name__ == "__main__":
    raise SystemExit(main())
