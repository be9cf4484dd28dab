# SPDX-License-Identifier: Apache-2.0
"""Whether the evaluation of a long recording takes constant memory.

``python -m benchmarks.bag [--generate-gb 2] [--threads 1] [--json OUT]``

A recording of so many GB is made in a temporary folder and evaluated by ``evaluate_bag`` in a process of its own, at a
quarter of its resolution, so that it does not take all day, while the memory of the process is watched: it must not
grow. Shares of reading and writing are printed.

Exit status: 0 all well, 1 a check failed, 2 unusable input, 3 the evaluation failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console

from benchmarks.report import Benchmark, Row
from deq_flow_ros.errors import UserError
from deq_flow_ros.evaluation.report import FRAMES, METRICS
from deq_flow_ros.imaging.frame import frame_from_array
from deq_flow_ros.model.deq_flow import MIN_SIDE
from deq_flow_ros.recordings.bags import BagWriter

STEP_NS, GENERATED = 33_333_333, (480, 640)
MOST_GROWTH, MOST_GROWTH_MB = 0.05, 32.0
"""How much memory may grow from the first quarter of the frames to the last. If it grows by more than both limits
(share, MB), it is not constant.
"""


class EvaluationError(UserError):
    """An evaluation failed. The message has its output."""


def evaluate(source: Path, out: Path, arguments: Sequence[str]) -> tuple[Row, list[tuple[int, float]]]:
    """Run ``evaluate_bag`` in a process of its own.

    :returns: the content of ``metrics.json``, and how its memory developed: pairs of (bytes of frames.csv, MB that it
        held besides files).
    :raises EvaluationError: if it fails.
    """
    command = [sys.executable, "-m", "deq_flow_ros.evaluation", str(source), "--out", str(out), *arguments]
    memory: list[tuple[int, float]] = []
    table = out / FRAMES
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                if held := held_mb(process.pid):
                    memory.append((table.stat().st_size if table.is_file() else 0, held))
                time.sleep(0.25)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        said = log.read()
    if process.returncode != 0 or not (out / METRICS).is_file():
        raise EvaluationError(f"evaluate_bag of {source} ended with {process.returncode}:\n{said}")
    return json.loads((out / METRICS).read_text()), memory


def held_mb(pid: int) -> float | None:
    """Memory that a process holds besides pages of files, which the system can take back, in MB; None if it has
    ended.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon:")), None)


def generate(bag: Path, frames: int, height: int, width: int) -> None:
    """Write an mcap of rgb8 images at 30 Hz: a camera that moves in circles over a texture."""
    noise = np.random.default_rng(0).uniform(0, 255, (height + 128, width + 128, 3)).astype(np.float32)
    texture = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    with BagWriter(bag) as writer:
        for number in range(frames):
            x, y = (round(64 + 60 * turn(number / 60)) for turn in (np.cos, np.sin))
            view, stamp_ns = texture[y : y + height, x : x + width], (number + 1) * STEP_NS
            writer.write_frame("/camera/image_raw", frame_from_array(view, stamp_ns, stamp_ns, "camera"))


def held_at(memory_mb: Sequence[tuple[int, float]], part: float) -> float:
    """The largest amount of memory in MB that the process held until a share (0 to 1) of the frames was done."""
    whole = memory_mb[-1][0]
    return max(held for done, held in memory_mb if done <= part * whole)


def measure(options: argparse.Namespace, console: Console) -> Row:
    """Evaluate a generated recording and watch the memory."""
    height, width = GENERATED
    frames = max(8, round(options.generate_gb * 1e9 / (height * width * 3)))
    with tempfile.TemporaryDirectory() as folder:
        bag = Path(folder) / "long"
        with console.status(f"writing {frames} frames of {width}x{height}"):
            generate(bag, frames, height, width)
        size = sum(file.stat().st_size for file in bag.iterdir())
        console.print(f"{frames} frames of {width}x{height}, {size / 1e9:.2f} GB; evaluating")
        scale = str(max(0.25, MIN_SIDE / height))
        arguments = ["--no-bag", "--threads", str(options.threads), "--model", options.model, "--max-iterations", "1"]
        arguments += ["--max-scale", scale, "--consistency-every", "0"]
        metrics, memory_mb = evaluate(bag, Path(folder) / "out", arguments)
    # The report, which is made when all frames are done, takes what it takes.
    quarter, end = (held_at(memory_mb, part) for part in (0.25, 0.99))
    problems = []
    if end > quarter + max(MOST_GROWTH * quarter, MOST_GROWTH_MB):
        problems.append(f"memory grew from {quarter:.0f} MB after a quarter of the frames to {end:.0f} MB at the end")
    done = metrics["settings"][0]["frames"]["all"]
    if done != frames:
        problems.append(f"expected {frames} frames to be accounted for, got {done}")
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in metrics["run"]["time_shares"].items())
    console.print(f"{shares}; held {quarter:.0f} MB after a quarter of the frames, {end:.0f} MB at the end")
    return {
        "bytes": size, "frames": frames, "held_mb_at_quarter": quarter, "held_mb_at_end": end, "memory_mb": memory_mb,
        "metrics": metrics, "problems": problems,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__, device=False, threads=1)
    line.add_number("--generate-gb", 2.0, "size of the recording", above=0, metavar="N")
    line.add_model()
    return line.run(line.parse_args(arguments), measure, {EvaluationError: 3})


if __name__ == "__main__":
    raise SystemExit(main())
