# SPDX-License-Identifier: Apache-2.0
"""``evaluate_bag --live [INPUT]``: plays a camera stream through the real node over DDS and reports how it did.

INPUT is a bag, a video, a folder of images or a camera index; without one, a drive through a rendered hall whose exact
flow is known. Writes into --out: ``report.html``, ``flow.mp4``, ``flow.webp``, ``metrics.json``, ``frames.csv``,
``recording/`` (a rosbag2 of the node's outputs) and ``logs/``. Exit status: 0 all well, 1 no flow came out or frames
are not accounted for, 2 unusable input or options, 3 a process failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.progress import track
from rich.table import Table

from deq_flow_ros.command_line import exit_status
from deq_flow_ros.demo.bag import exact_flow, render_scene_bag
from deq_flow_ros.demo.scene import SceneSettings
from deq_flow_ros.errors import UNUSABLE, UserError
from deq_flow_ros.evaluation.results import RESULTS, ResultWriter, refuse_foreign
from deq_flow_ros.evaluation.summary import RunInfo, SettingEntry, terminal_rows
from deq_flow_ros.host import ChildError, TimeShares
from deq_flow_ros.imaging.frame import stamp_to_ns
from deq_flow_ros.live.options import SHORTEST_S, node_parameters, parse_options
from deq_flow_ros.live.played import COLD, COLD_NOTE, STREAMED, in_order, look_closer, read_run
from deq_flow_ros.live.run import Progress, Published, RunOptions, prepare_environment, run_live
from deq_flow_ros.model import choose_precision, load_model
from deq_flow_ros.recordings import MediaError, Source, open_source
from deq_flow_ros.recordings.bags import read_messages
from deq_flow_ros.recordings.files import sha256
from deq_flow_ros.recordings.flow_bag import (
    FLOW_TOPIC,
    IMAGE_TOPIC,
    STATISTICS_TOPIC,
    FrameReport,
    check_space,
    read_reports,
    take_account,
)
from deq_flow_ros.ros import process
from deq_flow_ros.ros.parameters import NodeSettings

LOGS, PREVIEWS = "logs", ".previews"
COMPARED_PAIRS = 15
"""About so many pairs are solved again: from a cold start, and in the other direction."""


def profiles_file() -> Path:
    """The package's Fast DDS profile, from the source tree or from where the package is installed."""
    in_tree = Path(__file__).parents[2] / "config" / "fastdds.xml"
    if in_tree.is_file():
        return in_tree
    from ament_index_python.packages import get_package_share_directory

    return Path(get_package_share_directory("deq_flow_ros")) / "config" / "fastdds.xml"


def main(args: Sequence[str] | None = None) -> int:
    """Run; returns the exit status of the module's docstring."""
    options = parse_options(process.own_arguments(sys.argv if args is None else args))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the children are ended
    return exit_status(
        lambda: evaluate(options, console),
        {ChildError: 3, UserError: UNUSABLE},
        prefix="evaluate_bag",
        interrupted="interrupted, all processes ended",
    )


def evaluate(options: argparse.Namespace, console: Console) -> int:
    """Play, record, analyse, report.

    :returns: the exit status.
    :raises MediaError: for an input that cannot be read.
    :raises ChildError: for a process that failed.
    """
    out: Path = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediaError(f"cannot write to {out}: {error}") from error
    _clear(out, options.input)
    prepare_environment(profiles_file(), out / LOGS)
    path = options.input or str(_render(out.parent / "scene", console))
    source = open_source(path, options.topic, options.fps or None, options.start, options.stop or math.inf)
    source.close()
    frames, rate = _limit(options, source, console), options.rate or _rate(source, console)
    # A camera is the player's alone; nothing is known of its images yet.
    first = None if source.live else next(frame for frame in source.frames() if not frame.problem)
    if first is not None:
        check_space(out, frames or source.count or 0, first.height, first.width, "play less with --seconds")
    play = [path, "--rate", str(rate), "--max-frames", str(frames), "--topic", options.topic or ""]
    for name in ("start", "stop", "max_pause_s", "fps"):
        play += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    parameters = node_parameters(options, source, first)
    run = RunOptions(play, source.live, parameters, out / "recording", out / LOGS, options.storage)
    published = _play(run, frames or source.count, console)
    if not published.stamps_ns:
        raise ChildError(f"the player published no frame; see {out / LOGS / 'player.log'}")
    reports = read_reports(run.bag, STATISTICS_TOPIC)
    flow_stamps_ns = [stamp_to_ns(message.header.stamp) for _, _, message in read_messages(run.bag, FLOW_TOPIC)]
    account = take_account(published.stamps_ns, reports, flow_stamps_ns)
    counts = {"published": len(published.stamps_ns), "received": len(reports), "recorded": len(flow_stamps_ns)}
    if not flow_stamps_ns:
        reasons = {**account.first_reasons, **account.drop_reasons}
        console.print(f"evaluate_bag: no flow was published for {counts['published']} frames; {reasons}", style="red")
        return 1
    description = source.description if options.input else "rendered drive, whose exact flow is known"
    digest = "" if frames or not source.whole else sha256(Path(path))
    about = RunInfo(
        "live",
        {"description": description, "path": path, "sha256": digest, "topic": options.topic, "rate": rate},
        played_s=published.seconds,
        threads=NodeSettings(threads=int(run.node_parameters.get("threads", 0))).compute_threads(),
        problems=account.problems,
        transport=counts,
    )
    recorded = open_source(run.bag, IMAGE_TOPIC) if source.live else source
    metrics = _analyse(options, run, published, reports, recorded, about, console)
    _print_summary(out, metrics, console)
    for problem in metrics["problems"]:
        console.print(f"evaluate_bag: {problem}", style="red")
    return 1 if metrics["problems"] else 0


def _clear(out: Path, input: str | None) -> None:
    """Remove old results, so that they are not mistaken for new ones.

    :raises MediaError: where the input is one of them, or they are not of such a run.
    """
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


def _play(run: RunOptions, count: int | None, console: Console) -> Published:
    """The live run, with a line that tells how it goes."""
    total = f" of {count}" if count else ""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=8) as live:
            return run_live(run, lambda progress: live.update(progress.line(total)))
    printed_s = 0.0

    def show(progress: Progress) -> None:
        nonlocal printed_s
        if time.monotonic() - printed_s > 3.0:
            printed_s = time.monotonic()
            console.print(progress.line(total))

    return run_live(run, show)


def _analyse(
    options: argparse.Namespace, run: RunOptions, published: Published, reports: Sequence[FrameReport], source: Source,
    about: RunInfo, console: Console,
) -> dict[str, Any]:  # fmt: skip
    """Hold what was recorded against the input, and write the results; returns the metrics."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shares = TimeShares()
    precision = choose_precision(options.precision, options.device)
    model = load_model(options.model, options.device, precision=precision)
    values: dict[str, Any] = {name: getattr(options, name) for name in ("model", "device", "direction")}
    values |= {"precision": precision, "budget_ms": options.budget_ms or None, **options.param}
    budget = f"budget {options.budget_ms:g} ms" if options.budget_ms else "no latency budget"
    note = f"{Path(options.model).name} on {options.device} in {precision}, {options.direction} flow, {budget}"
    cold = SettingEntry(COLD, {**values, "warm": False, "budget_ms": None}, COLD_NOTE)
    every = max(1, sum(report.outcome == "processed" for report in reports) // COMPARED_PAIRS)
    outcomes = read_run(
        run.bag, in_order(reports, published.stamps_ns), source, exact_flow(Path(run.play[0])), options.roi
    )
    shown = track(outcomes, "analysing", len(reports), console=console, transient=True)
    found, unplayed = False, []
    try:
        with ResultWriter(options.out, [SettingEntry(STREAMED, values, note), cold], options.out / PREVIEWS) as writer:
            for setting, outcome in look_closer(shown, model, options.direction, every):
                writer.add(setting, outcome)
                found |= outcome.fields is not None
                unplayed += [outcome.record.reason] if outcome.record.index >= len(reports) else []
        if not found:
            raise MediaError(
                f"no processed frame has both its flow and its residual in {run.bag}, each stamped as its report says; "
                f"see {run.logs / 'flow_node.log'} and {run.logs / 'recorder.log'}"
            )
        about.seconds = shares.seconds
        about.problems += [*source.skipped, *filter(None, [source.odd_stamps])]
        if unplayed:
            about.problems.append(f"frames that could not be played: {len(unplayed)}; the first: {unplayed[0]}")
        return writer.finish(about)
    finally:
        shutil.rmtree(options.out / PREVIEWS, ignore_errors=True)


def _print_summary(out: Path, metrics: dict[str, Any], console: Console) -> None:
    table = Table(show_header=False, title="Optical flow over DDS", title_justify="left")
    for name, value in terminal_rows(metrics):
        table.add_row(name, value)
    console.print(table)
    size = sum(file.stat().st_size for file in (out / "recording").iterdir()) / 1e6
    results = ", ".join(str(out / name) for name in RESULTS)
    console.print(f"{results}; {out / 'recording'} ({size:.0f} MB)")
