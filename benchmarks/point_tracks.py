# SPDX-License-Identifier: Apache-2.0
"""How long points are followed, and how far they drift, beside OpenCV's KLT on the same frames.

    python -m benchmarks.point_tracks [--sequence BEDROOM_FRAMES] [--seed 0] [--plot OUT.png] [--json OUT]

KLT is calcOpticalFlowPyrLK with a forward-backward check of 1 px, with its default window and that of point_tracks.
Points are followed for 30 images at 10 Hz. On the rendered drive, a point counts if it is visible in the last image as
well; the ceiling is the share of those that are visible in all images between. The second table does not depend on the
limits by which a method gives points up: as many of its best are taken as have the error together, by the expected
error, and for KLT by the largest forward-backward distance. A recording has no truth: its drift is the distance from
the start after all steps forward and as many back.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
from rich.console import Console

from benchmarks.report import Benchmark, Row, picture, print_table
from benchmarks.sequences import CHECK_PX, EVERY, PERIOD_NS, klt, moving_frames, perception_stream
from deq_flow_ros.demo.scene import Scene, SceneSettings
from deq_flow_ros.model import load_model
from deq_flow_ros.perception.point_tracks import PointTracker, TrackSettings, corners

STEPS = 30
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
Field = tuple[np.ndarray, np.ndarray]
"""Backward flow (H, W, 2) px, and its uncertainty (H, W) px."""


class Followed(NamedTuple):
    """Where N points are in the end, (N, 2) px, and how much a method trusts them.

    :ivar rankings: of (N,) each, the best point with the smallest value, infinite for those that were lost.
    :ivar alive: (N,) those that are still followed with the limits that the method has otherwise.
    """

    points: np.ndarray
    rankings: list[np.ndarray]
    alive: np.ndarray


def flows(images: list[np.ndarray], model: str) -> list[Field]:
    """Backward flow and uncertainty from each image but the first."""
    estimator = perception_stream(load_model(model), direction="backward")
    results = [estimator.update(image, number * PERIOD_NS) for number, image in enumerate(images)]
    return [(r.flow, r.uncertainty) for r in results if r is not None and r.uncertainty is not None]


def by_flow(fields: list[Field], greys: list[np.ndarray], points: np.ndarray) -> Followed:
    """As ``point_tracks`` does; the tracks that it would end for their expected error go on."""
    tracker = PointTracker(TrackSettings(spacing_px=4, max_tracks=0, max_error_px=10.0))
    tracker.begin(points)
    for step, field in enumerate(fields):
        tracker.follow(*field, greys[step], greys[step + 1], (step, step + 1), backward=True)
    there, error, tracks = points.copy(), np.full(len(points), np.inf), tracker.tracks
    there[tracks["id"]], error[tracks["id"]] = tracks["point"], tracks["error"]
    return Followed(there, [error], error <= LIMITS.max_error_px)


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
    return Followed(here[:, 0].astype(np.float64), rankings, apart < CHECK_PX)


def by_all(fields: list[Field], greys: list[np.ndarray], points: np.ndarray) -> dict[str, Followed]:
    """The points as each method follows them, by its name."""
    of_klt = {name: by_klt(greys, points, window_px) for name, window_px in WINDOWS_PX.items()}
    return {"point_tracks": by_flow(fields, greys, points), **of_klt}


def _summary(method: str, alive: np.ndarray, error: np.ndarray) -> Row:
    kept, count = pd.Series(error[alive]), max(len(error), 1)
    return {
        "method": method, "points": len(error), "survive": len(kept) / count, "mean_px": kept.mean(),
        "median_px": kept.median(), "within_px": {f"{px:g}": (kept <= px).sum() / count for px in NEAR_PX},
    }  # fmt: skip


def at_equal_error(rankings: list[np.ndarray], error: np.ndarray) -> dict[str, float]:
    """The largest shares of the points that have these mean and median errors together."""
    best, count = dict.fromkeys(LEVELS, 0.0), len(error)
    fewest = max(1, round(FEWEST * count))
    for ranking in rankings:
        held = np.isfinite(ranking)
        so_far = pd.Series(error[held][np.argsort(ranking[held], kind="stable")]).expanding(fewest)
        figures = {"mean": so_far.mean(), "median": so_far.median()}  # NaN while they are too few
        for level, (kind, px) in LEVELS.items():
            best[level] = max(best[level], (np.flatnonzero(figures[kind] <= px) + 1).max(initial=0) / count)
    return best


def _drive(options: argparse.Namespace, console: Console) -> dict[str, list[Row]]:
    settings = SceneSettings(seed=options.seed)
    scene, numbers = Scene(settings), list(range(0, settings.frames, EVERY))
    with console.status("rendering"):
        images = [scene.render(number) for number in numbers]
    greys, fields = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images], flows(images, options.model)
    grid = np.mgrid[6 : settings.height : 12, 6 : settings.width : 12][::-1].reshape(2, -1).T.astype(np.float64)
    runs: dict[tuple[str, str], list[list[np.ndarray]]] = {}
    for start in range(0, len(numbers) - STEPS, max(1, (len(numbers) - STEPS) // 10)):
        ways = [scene.flow(numbers[start], numbers[start + step]) for step in range(1, STEPS + 1)]
        (flow, visible), always = ways[-1], np.logical_and.reduce([seen for _, seen in ways])
        for kind, points in (("corners", corners(greys[start], SPACING_PX, TEXTURE)), ("grid", grid)):
            x, y = points.astype(int).T
            found = by_all(fields[start : start + STEPS], greys[start : start + STEPS + 1], points)
            for method, (there, rankings, alive) in found.items():
                error = np.linalg.norm(there - points - flow[y, x], axis=1)
                known = [part[visible[y, x]] for part in (alive, error, always[y, x], *rankings)]
                runs.setdefault((f"{kind} of the drive", method), []).append(known)
    if options.plot:
        _plot(options.plot, images[: STEPS + 1], fields[:STEPS], greys[: STEPS + 1])
    rows: dict[str, list[Row]] = {}
    for (kind, method), each in runs.items():
        alive, error, always, *rankings = (np.concatenate(part) for part in zip(*each, strict=True))
        row = _summary(method, alive, error) | {"survive_of_visible": alive[always].mean(), "ceiling": always.mean()}
        rows.setdefault(kind, []).append({**row, "equal": at_equal_error(rankings, error)})
    return rows


def _recording(path: str, model: str) -> list[Row]:
    frames = moving_frames(path, STEPS * EVERY + 1)[::EVERY]
    frames = [cv2.resize(f, (320, round(320 * f.shape[0] / f.shape[1])), interpolation=cv2.INTER_AREA) for f in frames]
    there_and_back = [*frames, *frames[-2::-1]]
    greys, fields = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in there_and_back], flows(there_and_back, model)
    points = corners(greys[0], SPACING_PX, TEXTURE)
    one_way, rows = by_all(fields[: len(frames) - 1], greys[: len(frames)], points), []
    for method, back in by_all(fields, greys, points).items():
        row = _summary(method, back.alive, np.linalg.norm(back.points - points, axis=1))
        rows.append({**row, "survive": float(one_way[method].alive.mean())})
    return rows


def measure(options: argparse.Namespace, console: Console) -> Row:
    """Print the tables."""
    drive = _drive(options, console)
    groups = {**drive, **{Path(path).stem: _recording(path, options.model) for path in options.sequence}}
    rows, of_drive = (
        [{"name": name, **row} for name, of_group in some.items() for row in of_group] for some in (groups, drive)
    )
    names = {"points": "{name}", "method": "{method}"}
    columns = {
        **names, "count": "{points}", "survive": "{survive:.1%}", "of visible": "{survive_of_visible:.1%}",
        "mean px": "{mean_px:.2f}", "median px": "{median_px:.2f}",
        **{f"<= {px:g} px": f"{{within_px[{px:g}]:.1%}}" for px in NEAR_PX},
    }  # fmt: skip
    print_table(console, f"Points after {STEPS} images at 10 Hz", columns, rows, names=2)
    columns = {**names, "ceiling": "{ceiling:.1%}", **{level: f"{{equal[{level}]:.1%}}" for level in LEVELS}}
    print_table(console, f"Points that survive {STEPS} images with equal error [px]", columns, of_drive, names=2)
    return groups


def _plot(path: Path, images: list[np.ndarray], fields: list[Field], greys: list[np.ndarray]) -> None:
    """The last image, with the way of each point that has been followed until there."""
    tracker = PointTracker()
    ways: dict[int, list[np.ndarray]] = {}
    for step, field in enumerate(fields):
        tracker.follow(*field, greys[step], greys[step + 1], (step, step + 1), backward=True)
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


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__, device=False, plot="the ways of the points through the drive", threads=1)
    line.add_model()
    line.add_number("--seed", 0, "of the textures of the drive", least=0, kind=int)
    line.add_argument("--sequence", nargs="+", default=[], help="videos, bags or folders of images, without truth")
    return line.run(line.parse_args(arguments), measure)


if __name__ == "__main__":
    raise SystemExit(main())
