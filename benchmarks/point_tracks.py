# SPDX-License-Identifier: Apache-2.0
"""How long points are followed, and how far they drift, beside OpenCV's KLT on the same frames.

    python -m benchmarks.point_tracks [--every 3] [--steps 30] [--sequence BEDROOM_FRAMES] [--plot OUT.png]

KLT is calcOpticalFlowPyrLK with a forward-backward check of 1 px, with its default window and that of point_tracks. On
the rendered drive, a point counts if it is visible in the last image as well; the ceiling is the share of those that
are visible in all images between. The second table does not depend on the limits by which a method gives points up: as
many of its best are taken as have the error together, by the expected error, and for KLT by the largest
forward-backward distance. A recording has no truth: its drift is the distance from the start after all steps forward
and as many back.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from rich.console import Console

from benchmarks.report import Benchmark, Row, picture, print_table
from benchmarks.sequences import CHECK_PX, PERIOD_NS, klt, moving_frames, perception_stream
from deq_flow_ros.demo.scene import Scene, SceneSettings
from deq_flow_ros.model import load_model
from deq_flow_ros.perception.point_tracks import PointTracker, TrackSettings, corners

SPACING_PX, TEXTURE = 8, 2.0
NEAR_PX = (1.0, 2.0, 5.0)
LEVELS = {f"mean {px:g}": ("mean", px) for px in (1.0, 1.5, 2.0, 3.0)}
LEVELS |= {f"median {px:g}": ("median", px) for px in (0.5, 0.75, 1.0, 1.5, 2.0)}
DIFFERENCES = (4.0, 8.0, 12.0, np.inf)
"""Limits of KLT's difference of the windows, in grey levels."""
FEWEST = 0.02
"""Share of the points of which at least an error is taken."""
LIMITS = TrackSettings()
WINDOWS_PX = {"KLT": 21, f"KLT, {LIMITS.window_px} px": LIMITS.window_px}
Followed = tuple[np.ndarray, list[np.ndarray], np.ndarray]
"""Positions (N, 2) px; rankings of the points (N,), the best with the smallest value and infinite for those that were
lost; and which points (N,) are still followed with the limits that the methods have otherwise."""


def flows(images: list[np.ndarray], model: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Backward flow and uncertainty from each image but the first."""
    estimator = perception_stream(load_model(model), direction="backward")
    results = [estimator.update(image, number * PERIOD_NS) for number, image in enumerate(images)]
    return [(r.flow, r.uncertainty) for r in results if r is not None and r.uncertainty is not None]


def by_flow(fields: list[tuple[np.ndarray, np.ndarray]], greys: list[np.ndarray], points: np.ndarray) -> Followed:
    """As ``point_tracks`` does; the tracks that it would end for their expected error go on."""
    tracker = PointTracker(TrackSettings(spacing_px=4, max_tracks=0, max_error_px=10.0))
    tracker.begin(points)
    for step, (flow, uncertainty) in enumerate(fields):
        tracker.follow(flow, uncertainty, greys[step], greys[step + 1], (step, step + 1), backward=True)
    there, error = points.copy(), np.full(len(points), np.inf)
    there[tracker.tracks["id"]], error[tracker.tracks["id"]] = tracker.tracks["point"], tracker.tracks["error"]
    return there, [error], error <= LIMITS.max_error_px


def by_klt(greys: list[np.ndarray], points: np.ndarray, window_px: int) -> Followed:
    """As OpenCV's examples do, with the check."""
    here, limits = points.astype(np.float32)[:, None], np.array(greys[0].shape[::-1]) - 1
    apart, differ = np.zeros((2, len(points)))
    for first, second in pairwise(greys):
        here, now_apart, now_differ = klt(first, second, here, window_px)
        inside = ((here >= 0) & (here <= limits)).all(axis=(1, 2))
        apart = np.maximum(apart, np.where(inside, now_apart, np.inf))
        differ = np.maximum(differ, now_differ)
        here = np.where(np.isfinite(apart)[:, None, None], here, np.float32(0))
    rankings = [np.where(differ <= limit, apart, np.inf) for limit in DIFFERENCES]
    return here[:, 0].astype(np.float64), rankings, apart < CHECK_PX


def _summary(name: str, alive: np.ndarray, error: np.ndarray, counted: np.ndarray, ceiling: np.ndarray) -> Row:
    kept, count = error[alive & counted], max(counted.sum(), 1)
    return {
        "method": name, "points": int(counted.sum()), "survive": len(kept) / count,
        "survive_of_visible": (alive & counted & ceiling).sum() / max(ceiling.sum(), 1),
        "mean_px": kept.mean() if len(kept) else np.nan, "median_px": np.median(kept) if len(kept) else np.nan,
        "within_px": {f"{px:g}": (kept <= px).sum() / count for px in NEAR_PX},
    }  # fmt: skip


def at_equal_error(rankings: list[np.ndarray], error: np.ndarray, counted: np.ndarray) -> dict[str, float]:
    """The largest shares of the points that have these mean and median errors together."""
    best = dict.fromkeys(LEVELS, 0.0)
    for ranking in rankings:
        held = counted & np.isfinite(ranking)
        so_far = pd.Series(error[held][np.argsort(ranking[held], kind="stable")]).expanding()
        figures = {"mean": so_far.mean().to_numpy(), "median": so_far.median().to_numpy()}
        fewest = max(1, round(FEWEST * counted.sum()))
        for level, (kind, px) in LEVELS.items():
            numbers = np.flatnonzero(figures[kind] <= px) + 1
            best[level] = max(best[level], numbers[numbers >= fewest].max(initial=0) / int(counted.sum()))
    return best


def _drive(options: argparse.Namespace, console: Console) -> dict[str, list[Row]]:
    scene, settings = Scene(SceneSettings(seed=options.seed)), SceneSettings()
    numbers = list(range(0, settings.frames, options.every))
    with console.status("rendering"):
        images = [scene.render(number) for number in numbers]
    greys, fields = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images], flows(images, options.model)
    grid = np.mgrid[6 : settings.height : 12, 6 : settings.width : 12][::-1].reshape(2, -1).T.astype(np.float64)
    runs: dict[str, dict[str, list[list[np.ndarray]]]] = {"corners of the drive": {}, "grid of the drive": {}}
    steps = options.steps
    for start in range(0, len(numbers) - steps, max(1, (len(numbers) - steps) // 10)):
        ways = [scene.flow(numbers[start], numbers[start + step]) for step in range(1, steps + 1)]
        (flow, visible), part = ways[-1], greys[start : start + steps + 1]
        always = np.logical_and.reduce([seen for _, seen in ways])
        for kind, points in zip(runs, (corners(greys[start], SPACING_PX, TEXTURE), grid), strict=True):
            x, y = points.astype(int).T
            methods = {"point_tracks": by_flow(fields[start : start + steps], part, points)}
            methods |= {name: by_klt(part, points, window_px) for name, window_px in WINDOWS_PX.items()}
            for name, (there, rankings, alive) in methods.items():
                error = np.where(visible[y, x], np.linalg.norm(there - points - flow[y, x], axis=1), np.inf)
                runs[kind].setdefault(name, []).append([alive, error, visible[y, x], always[y, x], *rankings])
    if options.plot:
        _plot(options.plot, images[: steps + 1], fields[:steps], greys[: steps + 1])
    rows: dict[str, list[Row]] = {}
    for kind, by_method in runs.items():
        for name, each in by_method.items():
            alive, error, counted, always, *rankings = (np.concatenate(part) for part in zip(*each, strict=True))
            row = _summary(name, alive, error, counted, always)
            row |= {"ceiling": always.sum() / counted.sum(), "equal": at_equal_error(rankings, error, counted)}
            rows.setdefault(kind, []).append(row)
    return rows


def _recording(path: str, options: argparse.Namespace) -> list[Row]:
    frames = moving_frames(path, options.steps * options.every + 1)[:: options.every]
    frames = [cv2.resize(f, (320, round(320 * f.shape[0] / f.shape[1])), interpolation=cv2.INTER_AREA) for f in frames]
    there_and_back = [*frames, *frames[-2::-1]]
    greys = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in there_and_back]
    points = corners(greys[0], SPACING_PX, TEXTURE)
    fields = flows(there_and_back, options.model)
    there, everything = greys[: len(frames)], np.ones(len(points), bool)
    rows = []
    for name, (_, _, one_way), (back, _, alive) in (
        ("point_tracks", by_flow(fields[: len(frames) - 1], there, points), by_flow(fields, greys, points)),
        *((name, by_klt(there, points, px), by_klt(greys, points, px)) for name, px in WINDOWS_PX.items()),
    ):
        row = _summary(name, alive, np.linalg.norm(back - points, axis=1), everything, everything)
        rows.append({**row, "survive": float(one_way.mean()), "survive_of_visible": float("nan")})
    return rows


def measure(options: argparse.Namespace, console: Console) -> Row:
    """Print the tables."""
    rates = f"{options.steps} steps of every {options.every}th frame"
    drive = _drive(options, console)
    groups = {**drive, **{Path(path).stem: _recording(path, options) for path in options.sequence}}
    rows, of_drive = (
        [{"name": name, **row} for name, of_group in some.items() for row in of_group] for some in (groups, drive)
    )
    names = {"points": "{name}", "method": "{method}"}
    columns = {
        **names, "count": "{points}", "survive": "{survive:.1%}", "of visible": "{survive_of_visible:.1%}",
        "mean px": "{mean_px:.2f}", "median px": "{median_px:.2f}",
        **{f"<= {px:g} px": f"{{within_px[{px:g}]:.1%}}" for px in NEAR_PX},
    }  # fmt: skip
    print_table(console, f"Points after {rates}", columns, rows, names=2)
    columns = {**names, "ceiling": "{ceiling:.1%}", **{level: f"{{equal[{level}]:.1%}}" for level in LEVELS}}
    print_table(console, f"Points that survive {rates} with equal error [px]", columns, of_drive, names=2)
    return groups


def _plot(
    path: Path, images: list[np.ndarray], fields: list[tuple[np.ndarray, np.ndarray]], greys: list[np.ndarray]
) -> None:
    """The last image, with the way of each point that has been followed until there."""
    tracker = PointTracker()
    ways: dict[int, list[np.ndarray]] = {}
    for step, (flow, uncertainty) in enumerate(fields):
        tracker.follow(flow, uncertainty, greys[step], greys[step + 1], (step, step + 1), backward=True)
        for number, point in zip(tracker.tracks["id"].tolist(), tracker.tracks["point"], strict=True):
            ways.setdefault(number, []).append(point)
    with picture(path, 6.0, 4.5) as figure:
        axis = figure.subplots()
        axis.imshow(images[-1])
        for number, age in zip(tracker.tracks["id"].tolist(), tracker.tracks["age"].tolist(), strict=True):
            way = np.array(ways[number])
            axis.plot(*way.T, color=(1.0, 0.85, 0.1) if age < 10 else (0.2, 1.0, 0.4), linewidth=0.8)
            axis.plot(*way[-1], ".", color="white", markersize=3)
        axis.set_axis_off()


def main(args: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    line = Benchmark(__file__, __doc__, device=False, plot="the ways of the points through the drive", threads=1)
    line.add_model()
    line.add_number("--steps", 30, "images that the points are followed for", least=2, kind=int)
    line.add_number("--seed", 0, "of the textures of the drive", least=0, kind=int)
    line.add_number("--every", 3, "take every so-many-th frame", least=1, kind=int)
    line.add_argument("--sequence", nargs="+", default=[], help="videos, bags or folders of images, without truth")
    return line.run(line.parse_args(args), measure)


if __name__ == "__main__":
    raise SystemExit(main())
