# SPDX-License-Identifier: Apache-2.0
"""The options of ``evaluate_bag --live``, and the parameters that the node gets of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from deq_flow_ros.model import PRECISIONS
from deq_flow_ros.recordings import Frame, Source
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
    "roi": "the flow of a part of the image cannot be held against whole images",
    "output_scale": "flow of another size cannot be held against the images",
    "units": "the measures are of pixels",
}
"""Parameters of flow_node that an evaluation cannot be made with, and why."""


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Read a command line; ends the process with status 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="evaluate_bag --live", description="Play a camera stream through flow_node over DDS and report how it did."
    )
    add = parser.add_argument
    add("input", nargs="?", help="bag, video, folder of images or camera index (default: a rendered drive)")
    add("--out", type=Path, default=Path("build/demo"), help="folder for the results (default: build/demo)")
    add("--topic", help="image topic of a bag that has several")
    add("--rate", type=float, help=f"speed of the replay (default: 1, less where it would last below {SHORTEST_S:g} s)")
    add("--seconds", type=float, default=30.0, help="play so much of the stream, 0 for all (default: 30)")
    add("--max-frames", type=int, default=0, help="and at most so many frames, 0 for all (default)")
    add("--start", type=float, default=0.0, metavar="S", help="begin S seconds after the first frame")
    add("--stop", type=float, default=0.0, metavar="S", help="and end there (default 0: at the end)")
    pauses = f"skip pauses of the recording that last longer (default {MAX_PAUSE_S:g}; 0: wait them out)"
    add("--max-pause-s", type=float, default=MAX_PAUSE_S, metavar="S", help=pauses)
    add("--model", default="nano", help="name or weights file (default: nano)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--precision", choices=PRECISIONS, default="auto", help="of weights and features (default: auto)")
    add("--budget-ms", type=float, default=90.0, help="latency budget, 0 for none (default: 90)")
    add("--direction", choices=("forward", "backward"), default="forward", help="default: forward")
    add("--param", action="append", default=[], metavar="NAME:=VALUE", help="any other parameter of flow_node")
    add("--storage", choices=("mcap", "sqlite3"), default="mcap", help="format of the recording (default: mcap)")
    options = parser.parse_args(arguments)
    for name in ("seconds", "max_frames", "budget_ms", "start", "stop", "max_pause_s"):
        if not 0 <= getattr(options, name) < math.inf:
            parser.error(f"expected --{name.replace('_', '-')} of at least 0, got {getattr(options, name)}")
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
        parameters |= {"warm_up_width": str(first.width), "warm_up_height": str(first.height)}
    return parameters | dict(text.split(":=", 1) for text in options.param)
