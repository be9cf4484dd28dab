# SPDX-License-Identifier: Apache-2.0
"""``evaluate_bag --live [INPUT]``: plays a camera stream through the real node over DDS and reports how it did.

Without INPUT it plays a drive through a rendered hall whose exact flow is known. docs/evaluate_bag.md lists the results
and the exit statuses.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ament_index_python.packages import get_package_share_directory
from rich.console import Console
from rich.progress import track

from deq_flow_ros import UNUSABLE, UserError
from deq_flow_ros.command_line import CommandLine
from deq_flow_ros.demo import exact_flow, render_scene_bag
from deq_flow_ros.demo.scene import SceneSettings
from deq_flow_ros.evaluation.command import BUDGET_MS, add_options, print_results, read_parameters, status_of_work
from deq_flow_ros.evaluation.records import PROCESSED
from deq_flow_ros.evaluation.report import SettingEntry
from deq_flow_ros.evaluation.results import RECORDING, ResultFolder, ResultWriter, RunInfo
from deq_flow_ros.host import ChildError, TimeShares
from deq_flow_ros.imaging import MAX_PAUSE_S, longest_gap_ms, stamp_to_ns
from deq_flow_ros.live.played import COLD, COLD_NOTE, STREAMED, look_closer, read_run
from deq_flow_ros.live.run import RunOptions, prepare_environment, run_live
from deq_flow_ros.model import choose_precision, load_model
from deq_flow_ros.recordings import Frame, MediaError, Source, bags, open_source
from deq_flow_ros.recordings.bag_reader import read_messages
from deq_flow_ros.recordings.files import sha256
from deq_flow_ros.ros.parameters import NodeSettings
from deq_flow_ros.streaming import EstimatorSettings

LOGS = "logs"
COMPARED_PAIRS = 15
"""About so many pairs are solved again: from a cold start, and in the other direction."""
SHORTEST_S = 4.0
"""A recording that would be over sooner is played so much slower that it lasts this long."""
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
    what = "bag, video, folder of images or camera index (default: a rendered drive)"
    line.add_argument("input", nargs="?", help=what)
    line.add_path("--out", "folder for the results", default=Path("build/demo"))
    rate = f"speed of the replay (default: 1, less where it would last below {SHORTEST_S:g} s)"
    line.add_number("--rate", None, rate, above=0, kind=float)
    line.add_number("--seconds", 30.0, "play so much of the stream; 0: all", least=0)
    pauses = "skip pauses of the recording that last longer; 0: wait them out"
    line.add_number("--max-pause-s", MAX_PAUSE_S, pauses, least=0, metavar="S")
    add_options(line)
    options = line.parse_args(arguments)
    options.budget_ms = BUDGET_MS if options.budget_ms is None else options.budget_ms
    options.param, options.roi = read_parameters(line, options.param), []
    for name in options.param:
        if name in REFUSED:
            line.error(f"expected no --param {name} ({REFUSED[name]}), got --param {name}:={options.param[name]}")
    if "roi" in options.param:
        if not re.fullmatch(r"\s*\[\s*\d+\s*(,\s*\d+\s*){3}\]\s*", options.param["roi"]):
            line.error("expected --param roi:=[X,Y,WIDTH,HEIGHT] in whole pixels")
        options.roi = json.loads(options.param["roi"])
    return options


def node_parameters(options: argparse.Namespace, source: Source, first: Frame | None) -> dict[str, str]:
    """Parameters of flow_node by name; ``first`` is a frame of the stream, if there is one to look at."""
    parameters = {name: getattr(options, name) for name in ("model", "device", "precision", "direction")}
    parameters |= {"latency_budget_ms": str(float(options.budget_ms)), "max_iterations": str(options.max_iterations)}
    parameters["max_gap_ms"] = str(longest_gap_ms(EstimatorSettings().max_gap_ms, source.nominal_period_ns))
    # Reliable and deep, unlike the node's default for robots: here every frame has to be accounted for, and one that
    # is lost on the way to the node could not be.
    parameters |= {"qos_reliability": "reliable", "qos_depth": "10"}
    if first is not None and min(first.width, first.height) >= 16:
        width, height = options.roi[2:] if any(options.roi) else (first.width, first.height)
        parameters |= {"warm_up_width": str(width), "warm_up_height": str(height)}
    return parameters | options.param


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status that docs/evaluate_bag.md lists."""
    options = parse_options(arguments)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # this ends the children too
    errors: dict[type[Exception], int] = {ChildError: 3, UserError: UNUSABLE}
    return status_of_work(lambda: evaluate(options, console), errors, "interrupted, all processes ended")


def evaluate(options: argparse.Namespace, console: Console) -> int:
    """Play, record, analyse, report; returns the exit status.

    :raises MediaError: for an input that cannot be read, or a folder that holds something else.
    :raises ChildError: for a process that failed.
    """
    out: Path = options.out
    with ResultFolder(out, {"mode": "live"}, [options.input] if options.input else [], overwrite=True) as folder:
        path = options.input or str(_render(out.parent / "scene", console))
        source = open_source(path, options.topic, options.fps, options.start, options.stop or math.inf)
        source.close()
        frames, rate = _extent(options, source, console)
        # A camera is the player's alone; nothing is known of its images yet.
        first = None if source.live else next((frame for frame in source.frames() if not frame.problem), None)
        folder.begin()
        if first is not None:
            bags.check_space(out, frames or source.count or 0, first.height, first.width, "play less with --seconds")
        play = [path, "--rate", str(rate), "--max-frames", str(frames), "--topic", options.topic or ""]
        play += ["--start", str(options.start), "--stop", str(options.stop), "--fps", str(options.fps or 0)]
        play += ["--max-pause-s", str(options.max_pause_s)]
        parameters = node_parameters(options, source, first)
        # A recording at its place is a whole one; what a killed run leaves of one is removed by the next.
        run = RunOptions(play, source.live, parameters, folder.state / RECORDING, out / LOGS, options.storage)
        profiles = Path(__file__).parents[2] / "config" / "fastdds.xml"
        if not profiles.is_file():
            profiles = Path(get_package_share_directory("deq_flow_ros")) / "config" / "fastdds.xml"
        prepare_environment(profiles, run.logs)
        try:
            published = run_live(run, console.print)
        finally:
            if run.bag.exists():
                run = replace(run, bag=run.bag.replace(out / RECORDING))
        if not published.stamps_ns:
            raise ChildError(f"the player published no frame; see {run.logs / 'player.log'}")
        reports = [bags.report_of(message) for _, _, message in read_messages(run.bag, bags.STATISTICS_TOPIC)]
        flow_stamps_ns = [
            stamp_to_ns(message.header.stamp) for _, _, message in read_messages(run.bag, bags.FLOW_TOPIC)
        ]
        account = bags.take_account(published.stamps_ns, reports, flow_stamps_ns)
        counts = {"published": len(published.stamps_ns), "received": len(reports), "recorded": len(flow_stamps_ns)}
        if not flow_stamps_ns:
            why = {**account.first_reasons, **account.drop_reasons}
            console.print(f"evaluate_bag: no flow was published for {counts['published']} frames; {why}", style="red")
            return 1
        description = source.description if options.input else "rendered drive, whose exact flow is known"
        digest = "" if frames or not source.whole else sha256(Path(path))
        about = RunInfo(
            "live", {"description": description, "path": path, "sha256": digest, "topic": options.topic, "rate": rate},
            played_s=published.seconds, problems=account.problems, transport=counts,
            threads=NodeSettings(threads=int(parameters.get("threads", 0))).compute_threads(),
        )  # fmt: skip
        played = open_source(run.bag, bags.IMAGE_TOPIC) if source.live else source
        metrics = _analyse(options, folder, run, published.stamps_ns, reports, played, about, console)
        folder.finish(complete=True)
    print_results(out, metrics, console)
    return 1 if metrics["problems"] else 0


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


def _analyse(
    options: argparse.Namespace, folder: ResultFolder, run: RunOptions, published_ns: Sequence[int],
    reports: Sequence[bags.FrameReport], source: Source, about: RunInfo, console: Console,
) -> dict[str, Any]:  # fmt: skip
    """Hold what was recorded against the input, and write the results; returns the metrics."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shares = TimeShares()
    precision = choose_precision(options.precision, options.device)
    model = load_model(options.model, options.device, precision=precision)
    values: dict[str, Any] = {name: getattr(options, name) for name in ("model", "device", "direction")}
    values |= {"precision": precision, "budget_ms": options.budget_ms or None}
    values |= {"max_iterations": options.max_iterations, **options.param}
    budget = f"budget {options.budget_ms:g} ms" if options.budget_ms else "no latency budget"
    note = f"{Path(options.model).name} on {options.device} in {precision}, {options.direction} flow, {budget}"
    cold = SettingEntry(COLD, {**values, "warm": False, "budget_ms": None}, COLD_NOTE)
    every = max(1, sum(report.outcome == PROCESSED for report in reports) // COMPARED_PAIRS)
    records = read_run(run.bag, published_ns, reports, source, exact_flow(Path(run.play[0])), options.roi)
    shown = track(records, "analysing", len(reports), console=console, transient=True)
    found, unplayed = False, []
    with ResultWriter(folder, [SettingEntry(STREAMED, values, note), cold]) as writer:
        for setting, record in look_closer(shown, model, options.direction, every):
            writer.add(setting, record)
            found |= record.fields is not None
            unplayed += [] if record.frame is None else [record.reason]
    if not found:
        raise MediaError(
            f"no processed frame has both its flow and its residual in {run.bag}, each stamped as its report says; "
            f"see {run.logs / 'flow_node.log'}"
        )
    about.seconds = shares.seconds
    about.problems += [*source.skipped, *filter(None, [source.odd_stamps])]
    if unplayed:
        about.problems.append(f"frames that could not be played: {len(unplayed)}; the first: {unplayed[0]}")
    return writer.finish(about)
