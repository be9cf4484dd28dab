# SPDX-License-Identifier: Apache-2.0
"""What a stream takes for a cut: those that it misses, and those that it sees where there is none.

``python -m benchmarks.cuts --sequence FRAMES ... [--frames 40] [--cuts 120] [--json OUT]``

- *Continuing*: sequences, the demo scene and generated clips. Every pair but the first has to start warm.
- *Light*: the same, with half of the light, or 1.7 times as much, from the third frame on.
- *Cuts*: two of them, one after the other, drawn by a seed. A cut is noticed if there is no flow across it, or the
  pair across it or right behind it does not start warm.
- *Flat*: a frame of black, white or grey. It and the frame behind it give no flow, and the pair after starts cold.

A cut that is missed is compared: how much worse the pair right behind it is after 2 iterations than one that begins
cold, in px, against a cold solve of 24 iterations. The exit status is 1 if that is above 0.05 px for any, if a flat
frame gives flow, or if there is a false alarm in *continuing* or *light*.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console

from benchmarks.report import Benchmark, Row, print_table
from benchmarks.sequences import MOTIONS, PATTERNS, moving_frames, stream
from deq_flow_ros.demo.scene import Scene
from deq_flow_ros.model import DEQFlow, load_model
from training.generator import HELD_OUT_SEED, ProceduralGenerator

SIZE = 240, 320  # of all frames, so that a cut can lead from any sequence to any other
SLACK_PX = 0.05
ITERATIONS = 2  # at every pair
LIGHTS = (0.5, 1.7)
LEVELS = (0, 255, 128)
MISSED = "cuts missed"
Frames = list[np.ndarray]


def sequences(paths: Sequence[str], count: int, clips: int) -> Iterator[tuple[str, Frames]]:
    """Sequences of successive frames, each with its kind. Every generated clip is a kind of its own."""
    for path in paths:
        frames = moving_frames(path, count)
        yield Path(path).stem, [cv2.resize(frame, SIZE[::-1], interpolation=cv2.INTER_AREA) for frame in frames]
    scene = Scene()
    yield "demo scene", [scene.render(number) for number in range(min(count, 24))]
    for name, (low, high) in MOTIONS.items():
        generator = ProceduralGenerator(
            *SIZE, frames=5, seed=HELD_OUT_SEED + len(name), static_share=0.0, patterns=PATTERNS,
            min_displacement_px=low, max_displacement_px=high,
        )  # fmt: skip
        for number in range(clips):
            pairs = generator.pairs(name, number)
            yield f"{name} {number}", [pairs[0].image1, *(pair.image2 for pair in pairs)]


def alarms(model: DEQFlow, frames: Frames) -> list[str]:
    """The reasons why pairs other than the first did not start warm."""
    results = stream(model, frames, max_iterations=ITERATIONS)[2:]
    return [
        "no flow" if result is None else str(result.info.reset_reason)
        for result in results
        if result is None or not result.info.warm
    ]


def worse_behind_cut(model: DEQFlow, before: Frames, after: Frames) -> float | None:
    """How much larger than of a cold start the error of the pair behind a cut is, px; None if the cut was noticed."""
    across, behind = stream(model, [*before, *after], max_iterations=ITERATIONS)[-2:]
    if across is None or behind is None or not across.info.warm or not behind.info.warm:
        return None
    cold, settled = (stream(model, after, max_iterations=made, warm=False)[-1] for made in (ITERATIONS, 24))
    assert cold is not None and settled is not None
    errors = [np.linalg.norm(result.flow - settled.flow, axis=2).mean() for result in (behind, cold)]
    return float(errors[0] - errors[1])


def flat_gives_flow(model: DEQFlow, frames: Frames, level: int) -> bool:
    """Whether the stream does anything but end at a frame of one colour that stands before the last two frames."""
    flat = np.full_like(frames[0], level)
    at, behind, last = stream(model, [*frames[:-2], flat, *frames[-2:]], max_iterations=ITERATIONS)[-3:]
    return at is not None or behind is not None or last is None or last.info.warm


def run(options: argparse.Namespace, console: Console) -> Row:
    """Measure everything that the docstring of the module names; what must not happen is reported as a problem."""
    model = load_model(options.model, options.device)
    known = list(sequences(options.sequence, options.frames, options.clips))
    wrong = [f"{kind}: {why}" for kind, frames in known for why in alarms(model, frames)]
    figures = {"continuing": (sum(len(frames) - 2 for _, frames in known), wrong)}
    wrong = []
    for (kind, frames), factor in product(known, LIGHTS):
        lit = [*frames[:2], *(cv2.convertScaleAbs(frame, alpha=factor) for frame in frames[2:4])]
        wrong += [f"{kind} x{factor:g}: {why}" for why in alarms(model, lit)]
    figures["light"] = 2 * len(known) * len(LIGHTS), wrong
    rng = np.random.default_rng(0)
    missed, harmful = [], []
    for _ in range(options.cuts):
        first, second = rng.choice(len(known), 2, replace=False)
        (kind1, before), (kind2, after) = known[first], known[second]
        starts = [int(rng.integers(len(frames) - 3)) for frames in (before, after)]
        cut = before[starts[0] : starts[0] + 3], after[starts[1] : starts[1] + 2]
        worse = worse_behind_cut(model, *cut)
        if worse is not None:
            missed.append(f"{kind1} to {kind2}: {worse:+.2f} px")
            harmful += missed[-1:] if worse > SLACK_PX else []
    figures[MISSED] = options.cuts, missed
    figures[f"of these worse than cold by {SLACK_PX:g} px"] = options.cuts, harmful
    wrong = [f"{k} {v}" for k, frames in known for v in LEVELS if flat_gives_flow(model, frames[:5], v)]
    figures["flat"] = len(LEVELS) * len(known), wrong
    rows: list[Row] = [{"what": name, "tried": tried, "wrong": wrong} for name, (tried, wrong) in figures.items()]
    shown = [{**row, "count": len(row["wrong"]), "which": "; ".join(row["wrong"][:6])} for row in rows]
    columns = {"what": "{what}", "tried": "{tried}", "wrong": "{count}", "which": "{which}"}
    print_table(console, f"{options.model}, {ITERATIONS} iterations a pair", columns, shown)
    problems = [f"{row['what']}: {which}" for row in rows if row["what"] != MISSED for which in row["wrong"]]
    return {"figures": rows, "problems": problems}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__)
    line.add_argument("--sequence", nargs="*", default=[], help="videos, bags or folders of images")
    line.add_number("--frames", 40, "of each --sequence", least=5)
    line.add_number("--clips", 8, "generated ones, slow and fast each", least=2)
    line.add_number("--cuts", 120, "how many", least=1)
    line.add_model()
    return line.run(line.parse_args(arguments), run)


if __name__ == "__main__":
    raise SystemExit(main())
