# SPDX-License-Identifier: Apache-2.0
"""Recordings in all their forms: the same pixels must give the same flow, and what an evaluation costs.

``python -m benchmarks.bag --data DIR [--frames N] [--threads 1] [--json OUT]``
``python -m benchmarks.bag --generate-gb 2 [--json OUT]``

With ``--data``: a ROS 1 bag and its rosbag2 conversion, a folder of images, and a video, each as it is, as
an mcap made of its frames, and as a folder of PNG files; every one is evaluated by a process of its own with
``evaluate_bag``. All forms of a recording must have equal pixels, and give flow that is equal bit by bit. Reading and
writing (the flow bag included) are printed as shares of the run.

With ``--generate-gb``: a recording of so many GB is made in a temporary folder and evaluated at a quarter of its
resolution, so that it does not take all day, while the memory of the process is watched: it must not grow.

Exit status: 0 all well, 1 a check failed, 2 unusable input, 3 an evaluation failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console

from benchmarks.report import Benchmark, Row, table
from deq_flow_ros.command_line import number
from deq_flow_ros.errors import UserError
from deq_flow_ros.evaluation.report import FRAMES, METRICS
from deq_flow_ros.imaging.encodings import to_rgb
from deq_flow_ros.imaging.frame import frame_from_array
from deq_flow_ros.model.deq_flow import MIN_SIDE
from deq_flow_ros.recordings import open_source
from deq_flow_ros.recordings.bags import BagWriter, read_image, read_messages
from deq_flow_ros.recordings.flow_bag import FLOW_TOPIC

RECORDINGS = {
    "bag": ("bag/tiny_svo.bag", "bag/tiny_svo_ros2_converted"),
    "folder": ("video/bedroom_frames",),
    "video": ("video/intel_car-detection.mp4",),
}
"""Recordings below --data. Those of one key are the same recording in several forms."""
STEP_NS = 33_333_333
GENERATED = (480, 640)
MOST_GROWTH, MOST_GROWTH_MB = 0.05, 32.0
"""How much memory may grow from the first quarter of the frames to the last. If it grows by more than both limits
(share, MB), it is not constant.
"""


@dataclass(frozen=True)
class Evaluation:
    """What one process printed, and how its memory developed: pairs of (bytes of frames.csv, MB that it held besides
    files).
    """

    metrics: Row
    memory_mb: list[tuple[int, float]]


class EvaluationError(UserError):
    """An evaluation failed. The message has its output."""


def images(source: str | Path, count: int) -> Iterator[np.ndarray]:
    """The first frames of a recording, (H, W, 3) uint8 RGB."""
    for f in islice(open_source(source).frames(), count):
        yield to_rgb(f.data, f.height, f.width, f.step, f.encoding, f.is_bigendian)


def make_forms(source: str | Path, folder: Path, count: int) -> list[Path]:
    """An mcap and a folder of PNG files with the pixels of a recording."""
    pictures = folder / "png"
    pictures.mkdir(parents=True)
    with BagWriter(folder / "mcap") as writer:
        for number, image in enumerate(images(source, count)):
            bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
            stamp_ns = (number + 1) * STEP_NS
            writer.write_frame("/camera/image_raw", frame_from_array(bgr, stamp_ns, stamp_ns, "camera"))
            cv2.imwrite(str(pictures / f"{number:05d}.png"), bgr)
    return [folder / "mcap", pictures]


def evaluate(source: str | Path, out: Path, arguments: Sequence[str]) -> Evaluation:
    """Run ``evaluate_bag`` in a process of its own.

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
    return Evaluation(json.loads((out / METRICS).read_text()), memory)


def held_mb(pid: int) -> float | None:
    """Memory that a process holds besides pages of files, which the system can take back, in MB; None if it has
    ended.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon:")), None)


def digest(arrays: Iterator[np.ndarray]) -> str:
    """SHA-256 of the arrays in their order, hexadecimal."""
    whole = hashlib.sha256()
    for array in arrays:
        whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()


def all_forms(options: argparse.Namespace, console: Console) -> Row:
    """Evaluate every recording in every form."""
    rows: list[Row] = []
    arguments = ["--max-frames", str(options.frames), "--threads", str(options.threads), "--model", options.model]
    with tempfile.TemporaryDirectory() as folder:
        for name, paths in RECORDINGS.items():
            there = [options.data / path for path in paths]
            made = make_forms(there[0], Path(folder) / name, options.frames)
            for source in (*there, *made):
                out = Path(folder) / f"out_{len(rows)}"
                with console.status(f"{name}: {source.name}"):
                    metrics = evaluate(source, out, [*arguments, "--compare", "cold:warm=false", "dis"]).metrics
                flow = digest(read_image(message) for _, _, message in read_messages(out / "flow", FLOW_TOPIC))
                pixels = digest(images(source, options.frames))
                rows.append(
                    {"recording": name, "form": source.name, "pixels": pixels, "flow": flow, "metrics": metrics}
                )
    print_forms(rows, console)
    return {"rows": rows, "problems": differences(rows)}


def differences(rows: Sequence[Row]) -> list[str]:
    """Forms of one recording with other pixels than its first form, or with the same pixels and another flow."""
    problems = []
    for row in rows:
        first = next(other for other in rows if other["recording"] == row["recording"])
        for what in ("pixels", "flow"):
            if row[what] != first[what]:
                problems.append(f"{row['form']} has other {what} than {first['form']}")
                break
    return problems


def print_forms(rows: Sequence[Row], console: Console) -> None:
    """Print the flow figures and the costs, one line per form."""
    quality = table(
        "mean over the pairs; flow: its digest",
        ["form"],
        ["frames", "photometric", "cold", "DIS", "consistency", "flow"],
    )
    cost = table(
        "main setting; shares and memory of the whole run",
        ["form"],
        ["median ms", "fields/s", "reading", "writing", "peak MB"],
    )
    for row in rows:
        main, cold, dis = row["metrics"]["settings"]
        run, form = row["metrics"]["run"], f"{row['recording']}: {row['form']}"
        photometric = [settings["measures"]["photometric"]["mean"] for settings in (main, cold, dis)]
        consistency = main["measures"].get("consistency_px", {}).get("mean")
        quality.add_row(
            form, str(main["frames"]["all"]), *(f"{value:.2f}" for value in photometric),
            "-" if consistency is None else f"{consistency:.2f} px", row["flow"][:6],
        )  # fmt: skip
        cost.add_row(
            form, f"{main['latency_ms']['median']:.0f}", f"{main['fields_per_second']:.1f}",
            *(f"{100 * run['time_shares'].get(name, 0.0):.1f} %" for name in ("reading", "writing")),
            f"{run['peak_memory_mb']:.0f}",
        )  # fmt: skip
    console.print(quality, cost)


def long_recording(options: argparse.Namespace, console: Console) -> Row:
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
        began = time.monotonic()
        evaluation = evaluate(bag, Path(folder) / "out", arguments)
        seconds = time.monotonic() - began
    # The report, which is made when all frames are done, takes what it takes.
    quarter, end = (held_at(evaluation.memory_mb, part) for part in (0.25, 0.99))
    problems = []
    if end > quarter + max(MOST_GROWTH * quarter, MOST_GROWTH_MB):
        problems.append(f"memory grew from {quarter:.0f} MB after a quarter of the frames to {end:.0f} MB at the end")
    done = evaluation.metrics["settings"][0]["frames"]["all"]
    if done != frames:
        problems.append(f"expected {frames} frames to be accounted for, got {done}")
    run = evaluation.metrics["run"]
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in run["time_shares"].items())
    console.print(
        f"{seconds:.0f} s ({shares}); held {quarter:.0f} MB after a quarter of the frames, {end:.0f} MB at the end; "
        f"peak with pages of files {run['peak_memory_mb']:.0f} MB"
    )
    return {
        "bytes": size, "frames": frames, "seconds": seconds, "held_mb_at_quarter": quarter, "held_mb_at_end": end,
        "memory_mb": evaluation.memory_mb, "metrics": evaluation.metrics, "problems": problems,
    }  # fmt: skip


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


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__, device=False, threads=1)
    what = line.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, help="folder with the recordings")
    what.add_argument("--generate-gb", type=number(float, above=0), metavar="N", help="make and evaluate so many GB")
    line.add_number("--frames", 40, "of each recording, the first so many", least=3)
    line.add_model()
    options = line.parse_args(arguments)
    return line.run(options, all_forms if options.data else long_recording, {EvaluationError: 3})


if __name__ == "__main__":
    raise SystemExit(main())
