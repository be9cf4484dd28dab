# SPDX-License-Identifier: Apache-2.0
"""When the work on a frame is done: what the next one does not wait for is done before it arrives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.sequences import PERIOD_NS

COLOURS = {
    "encode": "#2b6cb0", "prepare": "#2f855a", "match": "#4a5568", "correlate": "#805ad5", "iteration": "#dd6b20",
    "upsample": "#b83280", "output": "#a0aec0",
}  # fmt: skip
FRAMES = 2


def draw_timeline(path: Path, stage_ms: Mapping[str, float], iterations: int) -> None:
    """Draw two frames of a stream, with the work ahead done after a field and with it done when the frame is there.

    :param stage_ms: medians of a stream's stages; "ahead" is what is done between a field and the next frame.
    """
    after = [(name, stage_ms[name]) for name in ("encode", "match", "correlate")]
    after += [("iteration", stage_ms["iteration"])] * iterations
    after += [("upsample", stage_ms["upsample"]), ("output", stage_ms["output"] + stage_ms["rest"])]
    ahead = ("prepare", stage_ms["ahead"])
    # The next frame is that one of a 30 Hz camera by which all is done.
    camera_ms = PERIOD_NS / 1e6
    period = camera_ms * math.ceil((sum(ms for _, ms in after) + ahead[1]) / camera_ms)
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 2.4), layout="constrained")
        axes = figure.subplots()
        for frame in range(FRAMES):
            done = _draw(axes, 1, frame * period, after)
            _draw(axes, 1, done, [ahead])
            late = _draw(axes, 0, frame * period, [after[0], ahead, *after[1:]])
            for lane, end in ((1, done), (0, late)):
                axes.annotate(
                    f"field, {end - frame * period:.0f} ms", (end, lane + 0.28), (end, lane + 0.42), ha="center",
                    fontsize=8, arrowprops={"arrowstyle": "-|>", "linewidth": 0.6},
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                )  # fmt: skip
            axes.axvline(frame * period, color="#1a202c", linewidth=0.8, linestyle="--")
        for name, colour in COLOURS.items():
            axes.barh(0, 0, color=colour, label=name)
        axes.set(xlabel="ms; dashed: a frame arrives", ylim=(-0.4, 1.75), xlim=(-0.02 * period, FRAMES * period))
        axes.set_yticks([1, 0], ["prepared\nbefore the frame", "prepared\nwith the frame"])
        figure.legend(frameon=False, loc="outside upper center", ncols=len(COLOURS), handlelength=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def _draw(axes: Axes, lane: int, start: float, parts: list[tuple[str, float]]) -> float:
    """Bars one after the other; returns where the last ends."""
    for name, ms in parts:
        axes.barh(lane, ms, 0.5, left=start, color=COLOURS[name], edgecolor="white", linewidth=0.6)
        start += ms
    return start
