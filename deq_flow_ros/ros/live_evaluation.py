# SPDX-License-Identifier: Apache-2.0
"""`evaluate_bag --live [INPUT]`: plays a camera stream through the real node over DDS and reports how it did.

INPUT is a bag, a video, a folder of images or a camera index; without one, a drive through a rendered hall whose
exact flow is known. Writes into --out: `report.html`, `flow.mp4`, `metrics.json`, `frames.csv`, `recording/` (a
rosbag2 of the node's outputs) and `logs/`. Exit status: 0 all well, 1 no flow came out or frames are not accounted for,
2 unusable input or options, 3 a process failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rclpy.utilities import remove_ros_args
from rich.console import Console
from rich.live import Live
from rich.progress import track
from rich.table import Table

from deq_flow_ros.evaluation.folder import refuse_foreign
from deq_flow_ros.evaluation.headline import terminal_rows
from deq_flow_ros.evaluation.output_bag import check_space
from deq_flow_ros.evaluation.provenance import input_hash
from deq_flow_ros.evaluation.recorded import Recording, evaluate_run, read_run
from deq_flow_ros.evaluation.report import RESULTS
from deq_flow_ros.evaluation.summary import RunInfo
from deq_flow_ros.evaluation.truth import exact_flow
from deq_flow_ros.media import Frame, MediaError, Source, open_source
from deq_flow_ros.media.bags import read_stamps
from deq_flow_ros.media.flow_recording import FrameReport, read_reports, take_account
from deq_flow_ros.media.scene import SceneSettings
from deq_flow_ros.media.scene_bag import render_scene_bag
from deq_flow_ros.model import PRECISIONS, choose_precision
from deq_flow_ros.ros import live_run
from deq_flow_ros.ros.children import ChildError
from deq_flow_ros.ros.parameters import Settings

LOGS = "logs"
SHORTEST_S = 4.0
"""A recording that would be over sooner is played so much slower that it lasts this long."""
COMPARED_PAIRS = 15
"""About so many pairs are solved again: from a cold start, and in the other direction."""

OWN_OPTIONS = {
    "model": "--model",
    "device": "--device",
    "precision": "--precision",
    "latency_budget_ms": "--budget-ms",
    "direction": "--direction",
}
"""Parameters of flow_node that have an option of their own."""
REFUSED = {
    "cameras": "one camera is played, on ~/image",
    "roi": "the flow of a part of the image cannot be held against whole images",
    "output_scale": "flow of another size cannot be held against the images",
    "units": "the measures are of pixels",
}
"""Parameters of flow_node that an evaluation cannot be made with, and why."""


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Options of a command line."""
    parser = argparse.ArgumentParser(
        prog="evaluate_bag --live", description="Play a camera stream through flow_node over DDS and report how it did."
    )
    parser.add_argument(
        "input",
        nargs="?",
        help="bag, video, folder of images or camera index; default: a rendered drive with exact flow",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo"), help="directory to write to (default: build/demo)"
    )
    parser.add_argument("--topic", help="image topic of a bag that has several")
    parser.add_argument(
        "--rate",
        type=float,
        help="speed of the replay; default: 1 = as recorded, but slower where the input would be over in a blink",
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="play so much of the stream, 0 = all (default: 30)")
    parser.add_argument("--max-frames", type=int, default=0, help="and at most so many frames, 0 = all (default)")
    parser.add_argument("--model", default="nano", help="name or weights file (default: nano)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of weights, features (default: auto)")
    parser.add_argument("--budget-ms", type=float, default=90.0, help="latency budget, 0 = none (default: 90)")
    parser.add_argument("--direction", choices=("forward", "backward"), default="forward", help="default: forward")
    parser.add_argument(
        "--param", action="append", default=[], metavar="NAME:=VALUE", help="any other parameter of flow_node"
    )
    parser.add_argument(
        "--storage", choices=("mcap", "sqlite3"), default="mcap", help="of the recording (default: mcap)"
    )
    options = parser.parse_args(arguments)
    for name, minimum in (("seconds", 0.0), ("max_frames", 0), ("budget_ms", 0.0)):
        if not getattr(options, name) >= minimum:
            parser.error(f"expected --{name.replace('_', '-')} of at least {minimum:g}, got {getattr(options, name)}")
    if options.rate is not None and not 0 < options.rate < math.inf:
        parser.error(f"expected --rate above 0, got {options.rate}")
    for text in options.param:
        name, assigned, _ = text.partition(":=")
        if not assigned:
            parser.error(f"expected --param NAME:=VALUE, got {text!r}")
        if name.strip() in OWN_OPTIONS:  # the report and the comparison with cold starts would not know of it
            parser.error(f"expected {OWN_OPTIONS[name.strip()]} for the parameter {name.strip()}, got --param {text}")
        if name.strip() in REFUSED:
            parser.error(f"expected no --param {name.strip()} ({REFUSED[name.strip()]}), got --param {text}")
    return options


def profiles_file() -> Path:
    """The package's Fast DDS profile, from the source tree or from where the package is installed."""
    in_tree = Path(__file__).parents[2] / "config" / "fastdds.xml"
    if in_tree.is_file():
        return in_tree
    from ament_index_python.packages import get_package_share_directory

    return Path(get_package_share_directory("deq_flow_ros")) / "config" / "fastdds.xml"


def main(args: Sequence[str] | None = None) -> int:
    """Run; returns the exit status of the module's docstring."""
    options = parse_options(remove_ros_args(list(sys.argv if args is None else args))[1:])
    console = Console(highlight=False, markup=False, soft_wrap=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the children are ended
    try:
        return evaluate(options, console)
    except MediaError as error:
        console.print(f"evaluate_bag: {error}", style="red")
        return 2
    except ChildError as error:
        console.print(f"evaluate_bag: {error}", style="red")
        return 3
    except KeyboardInterrupt:
        console.print("evaluate_bag: interrupted, all processes ended")
        return 130


def evaluate(options: argparse.Namespace, console: Console) -> int:
    """Play, record, analyse, report. Raises `MediaError` and `ChildError`."""
    out: Path = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediaError(f"cannot write to {out}: {error}") from error
    _clear(out, options.input)
    live_run.prepare_environment(profiles_file(), out / LOGS)
    path = options.input or str(_render(out.parent / "scene", console))
    source = open_source(path, options.topic)
    source.close()
    frames = _limit(options, source, console)
    rate = options.rate or _rate(source, console)
    # A camera is the player's alone; nothing is known of its images yet.
    first = None if source.live else next(iter(source.frames()))
    if first is not None:
        check_space(out, frames or source.count or 0, first.height, first.width, "play less with --seconds")
    run = live_run.RunOptions(
        path, options.topic, rate, frames, source.live, _node_parameters(options, first), out / "recording",
        out / LOGS, options.storage,
    )  # fmt: skip
    published = _play(run, frames or source.count, console)
    if not published.stamps_ns:
        raise ChildError(f"the player published no frame; see {out / 'logs' / 'player.log'}")
    reports = read_reports(run.bag, live_run.STATISTICS_TOPIC)
    account = take_account(published.stamps_ns, reports, read_stamps(run.bag, live_run.FLOW_TOPIC))
    if not account.flow_messages:
        reasons = {**account.first_reasons, **account.drop_reasons}
        console.print(f"evaluate_bag: no flow was published for {account.published} frames; {reasons}", style="red")
        return 1
    recorded = open_source(run.bag, live_run.IMAGE_TOPIC) if source.live else source
    about = RunInfo(
        "live",
        {
            "description": source.description if options.input else "rendered drive, whose exact flow is known",
            "path": path,
            "sha256": input_hash(path),
            "topic": options.topic,
            "rate": rate,
        },
        played_s=published.seconds,
        threads=Settings(threads=int(run.node_parameters.get("threads", 0))).compute_threads(),
        problems=account.problems,
        transport={"published": account.published, "received": account.received, "recorded": account.flow_messages},
    )
    metrics = _analyse(options, run, reports, recorded, about, console)
    _print_summary(out, metrics, console)
    for problem in account.problems:
        console.print(f"evaluate_bag: {problem}", style="red")
    return 1 if account.problems else 0


def _clear(out: Path, input: str | None) -> None:
    """Remove old results, never to be mistaken for new ones. Raises `MediaError` where the input is one of them."""
    results = [out / name for name in RESULTS]
    for path in (*results, out / "recording"):
        place = path.resolve()
        if input and place in (read := Path(input).resolve(), *read.parents):
            raise MediaError(f"the input {input} would be overwritten by the new {path}; choose another --out")
    if not (out / LOGS).is_dir():  # which every live run has
        refuse_foreign(out, RESULTS)
    try:
        for path in results:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise MediaError(f"cannot remove an old result: {error}") from error


def _render(bag: Path, console: Console) -> Path:
    """The demo scene's bag, rendered unless it is there already."""
    settings = SceneSettings()
    if not bag.exists():
        console.print(f"rendering {settings.frames} frames of the demo scene into {bag} (kept for later runs)")
    started = time.monotonic()
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        render_scene_bag(bag, settings, lambda done: live.update(f"rendered {done} of {settings.frames} frames"))
    console.print(f"demo scene ready in {time.monotonic() - started:.1f} s")
    return bag


def _limit(options: argparse.Namespace, source: Source, console: Console) -> int:
    """Number of frames to play, 0 for all."""
    limits = [options.max_frames] if options.max_frames else []
    if options.seconds:
        limits.append(max(2, math.ceil(options.seconds * 1e9 / source.nominal_period_ns)))
    limit = min(limits, default=0)
    if source.count is not None and limit >= source.count:
        limit = 0
    console.print(source.description)
    if source.live:
        console.print(f"playing {options.seconds:g} s; Ctrl-C ends the stream" if limit else "Ctrl-C ends the stream")
    elif limit:
        console.print(f"playing the first {limit} frames; --seconds 0 plays all")
    return limit


def _rate(source: Source, console: Console) -> float:
    """Speed of the replay where the user has not said any."""
    if source.live or source.count is None:
        return 1.0
    lasts = source.count * source.nominal_period_ns * 1e-9
    if lasts >= SHORTEST_S:
        return 1.0
    console.print(
        f"the input lasts {lasts:.1f} s only and is played slower, in {SHORTEST_S:g} s; --rate 1 forbids that"
    )
    return lasts / SHORTEST_S


def _node_parameters(options: argparse.Namespace, first: Frame | None) -> dict[str, str]:
    # Reliable and deep, unlike the node's default for robots: here every frame has to be accounted for, and one that
    # is lost on the way to the node could not be.
    parameters = {
        "model": options.model,
        "device": options.device,
        "precision": options.precision,
        "latency_budget_ms": str(float(options.budget_ms)),
        "direction": options.direction,
        "qos_reliability": "reliable",
        "qos_depth": "10",
        "autostart": "true",
    }
    if first is not None and min(first.width, first.height) >= 16:
        parameters |= {"warm_up_width": str(first.width), "warm_up_height": str(first.height)}
    return parameters | dict(text.split(":=", 1) for text in options.param)


def _play(run: live_run.RunOptions, count: int | None, console: Console) -> live_run.Published:
    """The live run, with a line that tells how it goes."""
    total = f" of {count}" if count else ""
    printed = 0.0

    def line(progress: live_run.Progress) -> str:
        text = f"{progress.phase}: {progress.received}{total} frames, {progress.dropped} dropped"
        if progress.last is None:
            return text
        last = progress.last
        residual = last.number("residual_px")  # there is none without any iteration
        return (
            f"{text}, {progress.fields_per_second:4.1f} flow/s, latency {last.number('latency_ms'):5.1f} ms, "
            f"{last.number('iterations'):2.0f} iterations" + (f", residual {residual:.3f} px" if residual >= 0 else "")
        )

    if not console.is_terminal:

        def show(progress: live_run.Progress) -> None:
            nonlocal printed
            if time.monotonic() - printed > 3.0:
                printed = time.monotonic()
                console.print(line(progress))

        return live_run.run(run, show)
    with Live(console=console, refresh_per_second=8) as live:
        return live_run.run(run, lambda progress: live.update(line(progress)))


def _analyse(
    options: argparse.Namespace,
    run: live_run.RunOptions,
    reports: Sequence[FrameReport],
    source: Source,
    about: RunInfo,
    console: Console,
) -> dict[str, Any]:
    """Hold what was recorded against the input, and write the results; returns the metrics."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    settings = {"model": options.model, "device": options.device, "budget_ms": options.budget_ms or None}
    settings |= {"precision": choose_precision(options.precision, options.device)}
    settings |= {"direction": options.direction, **dict(text.split(":=", 1) for text in options.param)}
    recording = Recording(run.bag, live_run.FLOW_TOPIC, live_run.RESIDUAL_TOPIC)
    done = read_run(recording, reports, source, exact_flow(Path(run.input)))
    shown = track(done, "analysing", len(reports), console=console, transient=True)
    every = max(1, sum(report.outcome == "processed" for report in reports) // COMPARED_PAIRS)
    metrics = evaluate_run(options.out, shown, settings, _note(options), every, about)
    if metrics is None:
        raise MediaError(
            f"no processed frame has both its flow and its residual in {run.bag}, each stamped as its report says; see "
            f"{run.logs / 'flow_node.log'} and {run.logs / 'recorder.log'}"
        )
    return metrics


def _note(options: argparse.Namespace) -> str:
    budget = f"budget {options.budget_ms:g} ms" if options.budget_ms else "no latency budget"
    precision = choose_precision(options.precision, options.device)
    return f"{Path(options.model).name} on {options.device} in {precision}, {options.direction} flow, {budget}"


def _print_summary(out: Path, metrics: dict[str, Any], console: Console) -> None:
    table = Table(show_header=False, title="Optical flow over DDS", title_justify="left")
    for name, value in terminal_rows(metrics):
        table.add_row(name, value)
    console.print(table)
    size = sum(file.stat().st_size for file in (out / "recording").iterdir()) / 1e6
    results = ", ".join(str(out / name) for name in RESULTS)
    console.print(f"{results}; {out / 'recording'} ({size:.0f} MB)")
