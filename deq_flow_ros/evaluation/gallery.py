# SPDX-License-Identifier: Apache-2.0
"""Pictures and plots of a run. Small pictures are kept on disk during the run, then shown in the report and as a video.

Memory does not grow with the length of a run, and there are never more than some 200 pictures on disk.
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from deq_flow_ros.evaluation.records import DROPPED, MEASURES, PROCESSED, FrameRecord, PairFields
from deq_flow_ros.imaging import MediaError
from deq_flow_ros.imaging.metrics import photometric_map
from deq_flow_ros.imaging.pictures import flow_to_color, heat, top, write_animation, write_video

PREVIEW_WIDTH, MAX_PREVIEWS = 320, 200
"""Largest width of a picture, in px, and number of pictures: in a long run, every second, fourth, ... frame has one."""
GAP = 4
"""Width in px of the white line between the pictures of a film."""
BEST, MEDIAN, WORST = 1, 2, 3
"""Numbers of pairs of each kind in the report."""
RANKED_BY = ("epe_visible_px", "epe_px", "photometric")
"""Pairs are ranked by the first of these measures that they have."""
MAX_VIDEO_FRAMES, MAX_ANIMATION_FRAMES, SLOWEST_FPS = 100, 60, 4.0
"""VP9 takes up to 0.1 s per frame, and an animation is to stay below 3 MB. Videos that are slower are sped up."""


@dataclass(frozen=True, eq=False)
class Preview:
    """Small pictures of one pair, (h, w): the image, uint8 RGB, and maps as float16 in px of the full image.

    :ivar rank: the error that pairs are ranked by; NaN if it is not known.
    :ivar photometric: in grey levels.
    """

    index: int
    rank: float
    stamp_ns: np.ndarray
    image: np.ndarray
    flow: np.ndarray
    photometric: np.ndarray
    residual: np.ndarray | None = None
    truth: np.ndarray | None = None
    uncertainty: np.ndarray | None = None


class Gallery:
    """The previews of one setting, in a folder: some evenly spread over the run, of the same frames in all settings,
    and the best and the worst pairs of the setting.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._last = folder, 0
        self._ranks: dict[int, float] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, index: int) -> bool:
        return index in self._ranks

    def add(self, record: FrameRecord, fields: PairFields) -> None:
        """Keep the pictures of a pair, if it is one of those to be kept so far."""
        index = self._last = record.index
        rank = next((record.measures[key] for key in RANKED_BY if key in record.measures), float("nan"))
        self._ranks[index] = rank
        known = self._by_rank()
        kept = {*self.spread(), *known[:BEST], *known[-WORST:]}
        if index in kept:
            self._write(record, fields)
        for other in set(self._ranks) - kept:
            del self._ranks[other]
            self._file(other).unlink(missing_ok=True)

    def spread(self) -> list[int]:
        """Indices of the evenly spread previews, in the order of the stream."""
        step = 1
        while self._last // step >= MAX_PREVIEWS:
            step *= 2
        return [index for index in sorted(self._ranks) if index % step == 0]

    def ranked(self) -> list[tuple[str, int]]:
        """("best", "median" or "worst", index) of the pairs to show; fewer if there are not enough."""
        known, spread = self._by_rank(), self.spread()
        best, worst = (known[:BEST], known[: -WORST - 1 : -1]) if len(known) > BEST + WORST else ([], [])
        others = [index for index in known if index in spread and index not in (*best, *worst)]
        middle = max(0, (len(others) - MEDIAN) // 2)
        shown = (("best", best), ("median", others[middle : middle + MEDIAN]), ("worst", worst))
        return [(name, index) for name, indices in shown for index in indices]

    def preview(self, index: int) -> Preview:
        """One that was kept."""
        with np.load(self._file(index)) as arrays:
            return Preview(index, self._ranks[index], **arrays)

    def _by_rank(self) -> list[int]:
        return sorted((index for index, rank in self._ranks.items() if np.isfinite(rank)), key=self._ranks.__getitem__)

    def _file(self, index: int) -> Path:
        return self._folder / f"{index}.npz"

    def _write(self, record: FrameRecord, fields: PairFields) -> None:
        height, width = fields.flow.shape[:2]
        scale = min(1.0, PREVIEW_WIDTH / width)
        # Even numbers, because video codecs halve the colour resolution.
        size = max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)
        here, there = (cv2.resize(image, size, interpolation=cv2.INTER_AREA) for image in (fields.here, fields.there))
        maps = {name: getattr(fields, name) for name in ("flow", "residual", "truth", "uncertainty")}
        known = {name: values for name, values in maps.items() if values is not None}
        # Nearest neighbours, because averaging would mix the flow of two objects, and spread NaN.
        small = {name: cv2.resize(values, size, interpolation=cv2.INTER_NEAREST) for name, values in known.items()}
        # In the small images, which takes a quarter of the time. This one is only for looking at.
        small_flow = small["flow"] * np.array([size[0] / width, size[1] / height], np.float32)
        small["photometric"], _ = photometric_map(here, there, small_flow)
        arrays = {name: values.astype(np.float16) for name, values in small.items()}
        file = self._file(record.index)
        try:
            np.savez(file, image=here, stamp_ns=np.int64(record.stamp_ns), **arrays)
        except OSError as error:
            raise MediaError(f"cannot write {file}: {error}; the results so far are kept") from error


def color_range(previews: Sequence[Preview]) -> float:
    """The length in px with the full colour in these pictures: the 95th percentile of flow and truth, at least 1."""
    fields = [field for preview in previews for field in (preview.flow, preview.truth) if field is not None]
    speeds = [np.hypot(*np.moveaxis(field[::4, ::4].astype(np.float32), 2, 0)).ravel() for field in fields]
    return top(np.concatenate(speeds), 1.0, 95)


def panels(preview: Preview) -> tuple[float, list[tuple[str, np.ndarray]]]:
    """The length in px with the full colour, and (caption, picture (h, w, 3) uint8 RGB) of each panel."""
    max_px, grey_levels = color_range([preview]), top(preview.photometric, 10.0)
    shown = [("image", preview.image), (f"flow, full colour {max_px:.1f} px", flow_to_color(preview.flow, max_px))]
    if preview.truth is not None:
        shown.append(("true flow", flow_to_color(preview.truth, max_px)))
    for name, values, least in (("residual", preview.residual, 0.1), ("expected error", preview.uncertainty, 1.0)):
        if values is not None:
            most = top(values, least)
            shown.append((f"{name} ≤ {most:.2g} px", heat(values, most)))
    shown.append((f"photometric error ≤ {grey_levels:.0f}", heat(preview.photometric, grey_levels)))
    return max_px, shown


def write_moving_pictures(video: Path, animation: Path, gallery: Gallery) -> None:
    """Write the evenly spread previews, image and flow side by side, at the speed of the stream: as a video (MP4), and
    the first of them as an animation (WebP).
    """
    spread = gallery.spread()
    shown = spread[:: -(-len(spread) // MAX_VIDEO_FRAMES) or 1]
    sampled = [gallery.preview(index) for index in shown[:: -(-len(shown) // 20) or 1]]
    max_px, first = color_range(sampled), [int(gallery.preview(index).stamp_ns) for index in shown[:20]]
    period_ns = float(np.median(np.diff(first))) if len(first) > 1 else 0.0
    fps = min(max(SLOWEST_FPS, 1e9 / period_ns if period_ns > 0 else 0.0), 60.0)

    def pictures(indices: Sequence[int]) -> Iterator[np.ndarray]:
        for preview in map(gallery.preview, indices):
            line = np.full((preview.image.shape[0], GAP, 3), 255, np.uint8)
            yield np.hstack([preview.image, line, flow_to_color(preview.flow, max_px)])

    write_video(video, pictures(shown), fps)
    write_animation(animation, pictures(shown[:MAX_ANIMATION_FRAMES]), fps)


SIZE = (4.9, 2.6)  # inches: legible on a phone, and two in a row elsewhere
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#6b7280")
BAD, MUTED = "#c53030", "#5a6676"


def run_plots(frames: Mapping[str, pd.DataFrame], budget_ms: float | None, error: str) -> list[tuple[str, str, str]]:
    """The plots of a run that have something to show, of the rows of ``frames.csv`` by setting, the main one first.

    :param error: the measure that says most about the quality of the flow.
    :returns: title, column, and address of the image.
    """
    frames = dict(list(frames.items())[: len(COLOURS)])
    main, coloured = next(iter(frames.values())), list(zip(frames.items(), COLOURS, strict=False))
    # The axis shows time only if the stamps always increase.
    timed = all(own.stamp_ns.is_monotonic_increasing and own.stamp_ns.is_unique for own in frames.values())
    start_ns = min((own.stamp_ns.iloc[0] for own in frames.values() if len(own)), default=0)
    time = "stream time [s]" if timed else "frame"

    def x_of(own: pd.DataFrame) -> np.ndarray:
        return ((own.stamp_ns - start_ns) * 1e-9 if timed else own["index"]).to_numpy(float)

    def points(axes: Axes, own: pd.DataFrame, column: str, colour: str, label: str = "", line: str = "") -> None:
        known = own[(own.outcome == PROCESSED) & own[column].notna()]
        if len(known):  # as pixels: an hour has 100,000 of them
            dots = axes.plot(x_of(known), known[column], marker=".", markersize=3.5, linestyle=line, linewidth=0.7)
            dots[0].set(color=colour, label=label, rasterized=True)
        axes.set_xlim(0, 1.02 * max(x_of(main), default=0) or 1)

    def latency(axes: Axes) -> None:
        late = main.over_budget == 1
        points(axes, main[~late], "latency_ms", COLOURS[0], "in time" if budget_ms else "")
        points(axes, main[late], "latency_ms", BAD, "late")
        if budget_ms:
            axes.axhline(budget_ms, color=BAD, linewidth=1, linestyle="--", label="budget")
        times = x_of(main[main.outcome == DROPPED])
        if times.size:
            axes.plot(times, 0 * times, "|", color=MUTED, markersize=6, label="dropped", rasterized=True)

    def latencies(axes: Axes) -> None:
        shares = np.linspace(0, 100, 101)
        for (name, own), colour in coloured:
            if own.latency_ms.notna().any():
                axes.plot(np.nanpercentile(own.latency_ms, shares), shares, color=colour, label=name)
        if budget_ms:
            axes.axvline(budget_ms, color=BAD, linewidth=1, linestyle="--", label="budget")

    def iterations(axes: Axes) -> None:
        warm = main.warm == 1
        points(axes, main[warm], "iterations", COLOURS[0], "warm start")
        points(axes, main[~warm], "iterations", COLOURS[1], "cold start")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))

    def of_all(column: str, baseline: str = "", baseline_label: str = "") -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            if baseline:
                points(axes, main, baseline, MUTED, baseline_label)
            for (name, own), colour in coloured:
                several = len(frames) > 1
                points(axes, own, column, colour, name if several else "flow" if baseline else "", "-" * several)

        return draw

    def residual(axes: Axes) -> None:
        of_all("residual_px")(axes)
        positive = known.residual_px[known.residual_px > 0]
        if positive.max() > 20 * positive.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    still = ("photometric_still", "without warping") if error == "photometric" else ("epe_still_px", "zero flow")
    known = pd.concat(frames.values()).select_dtypes("number")
    plots = (
        ("Latency", "ms", "latency_ms", latency, time),
        ("Latency of all frames", "% of the frames", "latency_ms", latencies, "latency [ms]"),
        (MEASURES[error].title.capitalize(), MEASURES[error].unit, error, of_all(error, *still), time),
        ("Forward-backward error", "px", "consistency_px", of_all("consistency_px"), time),
        ("Flicker", "px", "flicker_px", of_all("flicker_px"), time),
        ("Iterations", "iterations", "iterations", iterations, time),
        ("Residual", "px", "residual_px", residual, time),
        ("Processing scale", "scale", "scale", lambda axes: points(axes, main, "scale", COLOURS[0]), time),
    )
    return [
        (title, column, _svg(draw, x, y))
        for title, y, column, draw, x in plots
        if (known[column] > 0).any() and (column != "scale" or main["scale"].nunique() > 1)
    ]


def _svg(draw: Callable[[Axes], None], x_label: str, y_label: str) -> str:
    with matplotlib.style.context(Path(__file__).with_name("plots.mplstyle")):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set(xlabel=x_label, ylabel=y_label)
        if axes.get_yscale() == "linear":
            axes.set_ylim(0, 1.06 * axes.dataLim.ymax)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=10.5)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", dpi=144, metadata={"Date": None})
    return "data:image/svg+xml;base64," + b64encode(buffer.getvalue()).decode()
