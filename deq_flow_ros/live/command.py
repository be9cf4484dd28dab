# SPDX-License-Identifier: Apache-2.0
"""``evaluate_bag --live [INPUT]``: plays a camera stream through the real node over DDS and reports how it did.

Without INPUT it plays a drive through a rendered hall whose exact flow is known. docs/evaluate_bag.md lists the results
and the exit statuses.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from deq_flow_ros import UNUSABLE, UserError
from deq_flow_ros.command_line import CommandLine, exit_status
from deq_flow_ros.demo.bag import exact_flow, render_scene_bag
from deq_flow_ros.demo.scene import SceneSettings
from deq_flow_ros.evaluation.command import print_results
from deq_flow_ros.evaluation.results import RESULTS, ResultWriter, refuse_foreign
from deq_flow_ros.evaluation.summary import RunInfo, SettingEntry
from deq_flow_ros.host import ChildError, TimeShares
from deq_flow_ros.imaging import MAX_PAUSE_S, longest_gap_ms, stamp_to_ns
from deq_flow_ros.live.played import COLD, COLD_NOTE, STREAMED, changes, in_order, look_closer, read_run
from deq_flow_ros.live.run import Progress, Published, RunOptions, prepare_environment, profiles_file, run_live
from deq_flow_ros.model import PRECISIONS, choose_precision, load_model
from deq_flow_ros.recordings import Frame, MediaError, Source, open_source
from deq_flow_ros.recordings.bag_reader import read_messages
from deq_flow_ros.recordings.bags import (
    FLOW_TOPIC,
    IMAGE_TOPIC,
    STATISTICS_TOPIC,
    FrameReport,
    check_space,
    report_of,
    take_account,
)
from deq_flow_ros.recordings.files import sha256
from deq_flow_ros.recordings.source import DEFAULT_FPS
from deq_flow_ros.ros import process
from deq_flow_ros.ros.parameters import NodeSettings
from deq_flow_ros.streaming import EstimatorSettings

LOGS, PREVIEWS = "logs", ".previews"
COMPARED_PAIRS = 15
"""About so many pairs are solved again: from a cold start, and in the other direction."""
SHORTEST_S = 4.0
"""A recording that would be over sooner is played so much slower that it lasts this long."""
OWN_OPTIONS = {
    "model": "--model", "device": "--device", "precision": "--precision", "latency_budget_ms": "--budget-ms",
    "direction": "--direction",
}  # fmt: skip
"""Parameters of flow_node that have an option of their own."""
REFUSED = {
    "cameras": "one camera is played, on ~/image",
    "output_scale": "flow of another size cannot be held against the images",
    "units": "the measures are of pixels",
}
"""Parameters of flow_node that an evaluation cannot be made with, and why."""


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Read a command line; ends the process with status 2 where it is wrong.

    :returns: the options; ``param`` is a dictionary, and ``roi`` its region of interest, empty if there is none.
    """
    line = CommandLine("evaluate_bag --live", "Play a camera stream through flow_node over DDS and report how it did.")
    add = line.add_argument
    add("input", nargs="?", help="bag, video, folder of images or camera index (default: a rendered drive)")
    line.add_path("--out", "folder for the results", default=Path("build/demo"))
    add("--topic", help="image topic of a bag that has several")
    rate = f"speed of the replay (default: 1, less where it would last below {SHORTEST_S:g} s)"
    line.add_number("--rate", None, rate, above=0, kind=float)
    line.add_number("--seconds", 30.0, "play so much of the stream; 0: all", least=0)
    line.add_number("--max-frames", 0, "and at most so many frames; 0: all", least=0)
    line.add_number("--fps", 0.0, f"rate of a folder of images; 0: {DEFAULT_FPS:g}", metavar="HZ", least=0)
    line.add_part()
    pauses = "skip pauses of the recording that last longer; 0: wait them out"
    line.add_number("--max-pause-s", MAX_PAUSE_S, pauses, least=0, metavar="S")
    line.add_model("name or weights file")
    line.add_device()
    line.add_precision(PRECISIONS)
    line.add_number("--budget-ms", 90.0, "latency budget; 0: none", least=0)
    add("--direction", choices=("forward", "backward"), default="forward", help="of the flow")
    add("--param", action="append", default=[], metavar="NAME:=VALUE", help="any other parameter of flow_node")
    add("--storage", choices=("mcap", "sqlite3"), default="mcap", help="format of the recording")
    options = line.parse_args(arguments)
    given: dict[str, str] = {}
    for text in options.param:
        name, assigned, value = text.partition(":=")
        name = name.strip()
        if name in given:
            line.error(f"expected one value of {name}, got several with --param")
        if not assigned:
            line.error(f"expected --param NAME:=VALUE, got {text!r}")
        if name in OWN_OPTIONS:  # the report and the comparison with cold starts would not know of it
            line.error(f"expected {OWN_OPTIONS[name]} for the parameter {name}, got --param {text}")
        if name in REFUSED:
            line.error(f"expected no --param {name} ({REFUSED[name]}), got --param {text}")
        given[name] = value
    options.param, options.roi = given, []
    if "roi" in given:
        numbers = re.fullmatch(r"\s*\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]\s*", given["roi"])
        if numbers is None:
            line.error("expected --param roi:=[X,Y,WIDTH,HEIGHT] in whole pixels")
        options.roi = [int(number) for number in numbers.groups()]
    return options


def node_parameters(options: argparse.Namespace, source: Source, first: Frame | None) -> dict[str, str]:
    """Parameters of flow_node by name; ``first`` is a frame of the stream, if there is one to look at."""
    parameters = {name: getattr(options, name) for name in ("model", "device", "precision", "direction")}
    parameters["latency_budget_ms"] = str(float(options.budget_ms))
    parameters["max_gap_ms"] = str(longest_gap_ms(EstimatorSettings().max_gap_ms, source.nominal_period_ns))
    # Reliable and deep, unlike the node's default for robots: here every frame has to be accounted for, and one that
    # is lost on the way to the node could not be.
    parameters |= {"qos_reliability": "reliable", "qos_depth": "10", "autostart": "true"}
    if first is not None and min(first.width, first.height) >= 16:
        width, height = options.roi[2:] if any(options.roi) else (first.width, first.height)
        parameters |= {"warm_up_width": str(width), "warm_up_height": str(height)}
    return parameters | options.param


def main(args: Sequence[str] | None = None) -> int:
    """Run; returns the exit status that docs/evaluate_bag.md lists."""
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
    """Play, record, analyse, report; returns the exit status.

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
    frames, rate = _extent(options, source, console)
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
    reports = [report_of(message) for _, _, message in read_messages(run.bag, STATISTICS_TOPIC)]
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
        problems=account.problems + changes(account.first_reasons),
        transport=counts,
    )
    recorded = open_source(run.bag, IMAGE_TOPIC) if source.live else source
    metrics = _analyse(options, run, published, reports, recorded, about, console)
    print_results(out, metrics, console)
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
    render_scene_bag(bag, settings)
    return bag


def _extent(options: argparse.Namespace, source: Source, console: Console) -> tuple[int, float]:
    """Number of frames to play, 0 for all, and the speed of the replay."""
    console.print(source.description)
    seconds, period_s, count = options.seconds, source.nominal_period_ns * 1e-9, source.count
    limits = [options.max_frames] if options.max_frames else []
    limit = min([*limits, max(2, math.ceil(seconds / period_s))] if seconds else limits, default=0)
    if count is not None and limit >= count:
        limit = 0
    if source.live:
        console.print(f"playing {seconds:g} s; Ctrl-C ends the stream" if limit else "Ctrl-C ends the stream")
    elif limit:
        console.print(f"playing the first {limit} frames; --seconds 0 plays all")
    if options.rate or source.live or count is None or (lasts_s := count * period_s) >= SHORTEST_S:
        return limit, options.rate or 1.0
    console.print(f"it lasts {lasts_s:.1f} s only and is played slower, in {SHORTEST_S:g} s; --rate 1 forbids that")
    return limit, lasts_s / SHORTEST_S


def _play(run: RunOptions, count: int | None, console: Console) -> Published:
    """The live run, with a line every few seconds that tells how it goes."""
    total, printed_s = f" of {count}" if count else "", 0.0

    def show(progress: Progress) -> None:
        nonlocal printed_s
        if time.monotonic() - printed_s > 3.0:
            printed_s = time.monotonic()
            frames = f"{progress.received}{total} frames, {progress.dropped} dropped"
            latency = "" if math.isnan(progress.latency_ms) else f", latency {progress.latency_ms:.1f} ms"
            console.print(f"{progress.phase}: {frames}{latency}")

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
