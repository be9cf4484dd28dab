# SPDX-License-Identifier: Apache-2.0
"""A recorded run of the flow node held against its input: errors per pair of images, pictures, and a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from deq_flow_ros.media.encodings import EncodingError, to_rgb
from deq_flow_ros.media.flow_recording import Account, FrameReport, read_fields
from deq_flow_ros.media.frame import Frame, MediaError, Source
from deq_flow_ros.media.metrics import endpoint_error, photometric_error, spread

PREVIEW_WIDTH = 320
"""Pictures and video frames are kept no wider than this, in px."""
MAX_PREVIEWS = 200
"""With so many kept, every second one is let go: a longer stream needs no more memory."""
STRIPS = 6
"""Pairs that are kept with all their maps, spread evenly over the run."""

STAGES = (
    "wait",
    "convert",
    "resize",
    "encode",
    "prepare",
    "correlate",
    "coarse",
    "solve",
    "upsample",
    "output",
    "publish",
)
"""Stages of one update in the order of the work; the node may report others."""

ExactFlow = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
"""(stamp on whose pixels the flow lives, stamp it leads to) -> (flow (H, W, 2) px, visible (H, W) bool)."""
ColdFlow = Callable[[FrameReport, np.ndarray, np.ndarray], "tuple[np.ndarray, np.ndarray] | None"]
"""(report, image 1, image 2) -> (flow (H, W, 2), residual (H, W)) from a cold start: coarse to fine, then with as many
iterations as the report says; None where the report tells of none.
"""


@dataclass(frozen=True)
class PairErrors:
    """Errors of one flow field; px, and grey levels of 255 for the photometric ones. NaN where not known."""

    epe: float
    epe_visible: float
    photometric: float
    residual: float


@dataclass(frozen=True)
class PairResult:
    """One processed pair of images: the node's report and how good its flow is. `zero` is the error of no flow at
    all.
    """

    report: FrameReport
    warm: PairErrors
    zero: PairErrors
    cold: PairErrors | None


@dataclass(frozen=True)
class Preview:
    """Small pictures of one pair: image (h, w, 3) RGB, flow (h, w, 2) px of the full image."""

    stamp_ns: int
    image: np.ndarray
    flow: np.ndarray


@dataclass(frozen=True)
class Strip(Preview):
    """A preview with its maps: exact flow (h, w, 2) px, residual (h, w) px, photometric error (h, w) grey levels."""

    exact: np.ndarray | None
    residual: np.ndarray
    photometric: np.ndarray


@dataclass
class Analysis:
    """All pairs of a run, `previews` of every `preview_step`-th of them, and the few `strips`."""

    pairs: list[PairResult] = field(default_factory=list)
    previews: list[Preview] = field(default_factory=list)
    preview_step: int = 1
    strips: list[Strip] = field(default_factory=list)

    def thin(self) -> None:
        """Let every second preview go where there are `MAX_PREVIEWS`."""
        if len(self.previews) >= MAX_PREVIEWS:
            self.previews = self.previews[::2]
            self.preview_step *= 2


class _FrameFinder:
    """Finds frames of a source by stamp while reading it once; only what may still be asked for is kept."""

    def __init__(self, source: Source) -> None:
        self._frames = source.frames()
        self._kept: dict[int, Frame] = {}

    def pair(self, first_ns: int, second_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """The images of two stamps, (H, W, 3) uint8 RGB; pairs must be asked for in the order of the stream."""
        while first_ns not in self._kept or second_ns not in self._kept:
            frame = next(self._frames, None)
            if frame is None:
                raise MediaError(f"the input holds no frames stamped {first_ns} and {second_ns} ns, in this order")
            self._kept[frame.stamp_ns] = frame
        for stamp in list(self._kept):
            if stamp == first_ns:
                break
            del self._kept[stamp]
        return self._rgb(first_ns), self._rgb(second_ns)

    def _rgb(self, stamp_ns: int) -> np.ndarray:
        frame = self._kept[stamp_ns]
        try:
            return to_rgb(frame.data, frame.height, frame.width, frame.step, frame.encoding, frame.is_bigendian)
        except EncodingError as error:
            raise MediaError(
                f"the frame stamped {stamp_ns} ns was processed, but cannot be read here: {error}"
            ) from error


def analyse(
    bag: Path,
    flow_topic: str,
    residual_topic: str,
    reports: Sequence[FrameReport],
    source: Source,
    exact: ExactFlow | None,
    cold: ColdFlow,
    cold_every: int,
) -> Iterator[Analysis]:
    """Go through the recorded fields; yields the growing result after each, the last one being complete.

    `cold` is asked at every `cold_every`-th warm pair. Raises `MediaError` where bag, source and reports do not match.
    """
    result = Analysis()
    finder = _FrameFinder(source)
    processed = {report.flow_stamp_ns: report for report in reports if report.outcome == "processed"}
    # The middle of each of `STRIPS` equal parts: the very first pair, started from nothing, is not typical.
    strips = {len(processed) * (2 * part + 1) // (2 * STRIPS) for part in range(STRIPS)}
    warm_seen = 0
    for stamp_ns, flow, residual in read_fields(bag, flow_topic, residual_topic):
        report = processed.pop(stamp_ns, None)
        if report is None:
            continue  # the account names it
        first_ns, second_ns = report.stamp("image1_stamp_ns"), report.stamp("image2_stamp_ns")
        if first_ns is None or second_ns is None:
            raise MediaError(f"the report of the processed frame {report.stamp_ns} lacks the stamps of its two images")
        images = finder.pair(first_ns, second_ns)
        # Forward flow lives on image 1 and leads to image 2, backward flow the other way round.
        here, there = images if report.forward else images[::-1]
        if flow.shape[:2] != here.shape[:2]:
            raise MediaError(
                f"expected flow of the image's size {here.shape[:2]}, got {flow.shape[:2]} at {stamp_ns} ns"
            )
        stamps = (first_ns, second_ns) if report.forward else (second_ns, first_ns)
        truth = exact(*stamps) if exact else None
        errors, difference, still = _errors(flow, residual, here, there, truth)
        cold_errors = None
        if report.flag("warm"):
            again = cold(report, *images) if warm_seen % cold_every == 0 else None
            cold_errors = _errors(*again, here, there, truth)[0] if again else None
            warm_seen += 1
        number = len(result.pairs)
        result.pairs.append(PairResult(report, errors, still, cold_errors))
        if number in strips:
            result.strips.append(_strip(stamp_ns, here, flow, truth, residual, difference))
        if number % result.preview_step == 0:
            result.previews.append(_preview(stamp_ns, here, flow))
            result.thin()
        yield result


def _errors(
    flow: np.ndarray,
    residual: np.ndarray,
    here: np.ndarray,
    there: np.ndarray,
    truth: tuple[np.ndarray, np.ndarray] | None,
) -> tuple[PairErrors, np.ndarray, PairErrors]:
    """(errors of the flow, photometric map (H, W), errors of zero flow over the same pixels)."""
    difference, photometric, unwarped = photometric_error(here, there, flow)
    nan = float("nan")
    rms = float(np.sqrt(np.nanmean(np.square(residual)))) if np.isfinite(residual).any() else nan
    if truth is None:
        return PairErrors(nan, nan, photometric, rms), difference, PairErrors(nan, nan, unwarped, nan)
    flow_there, visible = truth
    nothing = np.zeros_like(flow_there)
    return (
        PairErrors(endpoint_error(flow, flow_there), endpoint_error(flow, flow_there, visible), photometric, rms),
        difference,
        PairErrors(endpoint_error(nothing, flow_there), endpoint_error(nothing, flow_there, visible), unwarped, nan),
    )


def _preview(stamp_ns: int, image: np.ndarray, flow: np.ndarray) -> Preview:
    return Preview(stamp_ns, cv2.resize(image, _size(image), interpolation=cv2.INTER_AREA), _small(flow))


def _strip(
    stamp_ns: int,
    image: np.ndarray,
    flow: np.ndarray,
    truth: tuple[np.ndarray, np.ndarray] | None,
    residual: np.ndarray,
    difference: np.ndarray,
) -> Strip:
    preview = _preview(stamp_ns, image, flow)
    exact = None if truth is None else _small(truth[0])
    return Strip(stamp_ns, preview.image, preview.flow, exact, _small(residual), _small(difference))


def _size(values: np.ndarray) -> tuple[int, int]:
    """Width and height of the small picture; even, as video codecs halve the colour resolution."""
    height, width = values.shape[:2]
    scale = min(1.0, PREVIEW_WIDTH / width)
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


def _small(values: np.ndarray) -> np.ndarray:
    # Nearest: averaging would mix the flow of two objects into a third, and NaN into everything.
    return cv2.resize(values, _size(values), interpolation=cv2.INTER_NEAREST).astype(np.float16)


def summarise(
    account: Account, reports: Sequence[FrameReport], pairs: Sequence[PairResult], seconds: float
) -> dict[str, Any]:
    """The figures of a run that lasted `seconds`; a dictionary for a JSON file, None where a figure is not known."""
    processed = [report for report in reports if report.outcome == "processed"]
    warm = [report for report in processed if report.flag("warm")]
    stages = {key for report in processed for key in report.values if key.startswith("stage_")}
    compared = [pair for pair in pairs if pair.cold is not None]
    return {
        "account": account.as_dict(),
        "seconds": seconds,
        "fields_per_second": len(processed) / seconds if seconds > 0 else None,
        "latency_ms": spread([report.number("latency_ms") for report in processed]),
        "over_budget_share": _share([report.flag("over_budget") for report in processed]),
        "over_budget_share_warm": _share([report.flag("over_budget") for report in warm]),
        "warm_share": _share([report.flag("warm") for report in processed]),
        "iterations": spread([report.number("iterations") for report in processed]),
        "stop_reasons": dict(Counter(report.values.get("stop_reason", "") for report in processed)),
        "residual_px": spread([report.number("residual_px") for report in processed]),
        "scale": spread([report.number("scale") for report in processed]),
        "stage_ms": {
            stage.removeprefix("stage_").removesuffix("_ms"): spread([report.number(stage) for report in processed])
            for stage in sorted(stages, key=_stage_order)
        },
        "error": {
            "flow": _mean_errors([pair.warm for pair in pairs]),
            "no_flow": _mean_errors([pair.zero for pair in pairs]),
        },
        "cold_against_warm": {
            "pairs": len(compared),
            "warm": _mean_errors([pair.warm for pair in compared]),
            "cold": _mean_errors([pair.cold for pair in compared if pair.cold is not None]),
        },
        "frames": [{"stamp_ns": report.stamp_ns, **report.values} for report in reports],
        "pairs": [
            {
                "stamp_ns": pair.report.stamp_ns,
                "flow": _plain(pair.warm),
                "no_flow": _plain(pair.zero),
                "cold": _plain(pair.cold) if pair.cold else None,
            }
            for pair in pairs
        ],
    }


def _stage_order(key: str) -> tuple[int, str]:
    """Stages in the order of the work, those not known here last."""
    name = key.removeprefix("stage_").removesuffix("_ms")
    return (STAGES.index(name) if name in STAGES else len(STAGES), name)


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


_NAMES = {"epe": "epe_px", "epe_visible": "epe_visible_px", "photometric": "photometric", "residual": "residual_rms_px"}


def _plain(errors: PairErrors) -> dict[str, float | None]:
    return {name: value if np.isfinite(value := getattr(errors, key)) else None for key, name in _NAMES.items()}


def _mean_errors(errors: Sequence[PairErrors]) -> dict[str, float | None]:
    return {name: spread([getattr(error, key) for error in errors])["mean"] for key, name in _NAMES.items()}
