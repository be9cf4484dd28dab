# SPDX-License-Identifier: Apache-2.0
"""The options of ``evaluate_bag --live``, and the parameters that the node gets of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from deq_flow_ros.command_line import CommandLine
from deq_flow_ros.model import PRECISIONS
from deq_flow_ros.recordings import Frame, Source
from deq_flow_ros.recordings.source import DEFAULT_FPS
from deq_flow_ros.stamps import MAX_PAUSE_S, longest_gap_ms
from deq_flow_ros.streaming import EstimatorSettings

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
        try:
            options.roi = json.loads(given["roi"])
        except ValueError:
            options.roi = None
        if not (isinstance(options.roi, list) and len(options.roi) == 4 and all(map(_is_position, options.roi))):
            line.error("expected --param roi:=[X,Y,WIDTH,HEIGHT] in whole pixels")
    return options


def _is_position(value: object) -> bool:
    return type(value) is int and value >= 0


def node_parameters(options: argparse.Namespace, source: Source, first: Frame | None) -> dict[str, str]:
    """Parameters of flow_node by name; ``first`` is a frame of the stream, if there is one to look at."""
    gap_ms = longest_gap_ms(EstimatorSettings().max_gap_ms, source.nominal_period_ns)
    # Reliable and deep, unlike the node's default for robots: here every frame has to be accounted for, and one that
    # is lost on the way to the node could not be.
    parameters = {
        "model": options.model,
        "device": options.device,
        "precision": options.precision,
        "latency_budget_ms": str(float(options.budget_ms)),
        "direction": options.direction,
        "max_gap_ms": str(gap_ms),
        "qos_reliability": "reliable",
        "qos_depth": "10",
        "autostart": "true",
    }
    if first is not None and min(first.width, first.height) >= 16:
        width, height = options.roi[2:] if any(options.roi) else (first.width, first.height)
        parameters |= {"warm_up_width": str(width), "warm_up_height": str(height)}
    return parameters | options.param
