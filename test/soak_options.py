# SPDX-License-Identifier: Apache-2.0
"""The options of a soak run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from soak_faults import WARM_UP_S
from soak_parts import image_size


def parse_options(args: Sequence[str]) -> argparse.Namespace:
    """Options of the command line."""
    about = "Run flow_node for minutes and hold it to its promises."
    parser = argparse.ArgumentParser(prog="soak_flow_node", description=about)
    parser.add_argument("--input", required=True, help="bag, video or folder of images that the cameras show")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--hours", type=float, help="instead of --minutes")
    parser.add_argument("--rate", type=float, default=30.0, help="of the first camera, Hz (default 30)")
    parser.add_argument(
        "--size", type=image_size, default=(640, 480), help="of the first camera, WIDTHxHEIGHT (default 640x480)"
    )
    parser.add_argument("--budget-ms", type=float, default=150.0, help="latency_budget_ms, 0 = none (default 150)")
    parser.add_argument("--max-iterations", type=int, default=6)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--cameras", type=int, default=1)
    parser.add_argument("--misbehave", action="store_true", help="the last of several cameras does all that is wrong")
    parser.add_argument("--faults", type=int, metavar="SEED", help="something goes wrong every 20 s, as SEED has it")
    parser.add_argument("--parameter", action="append", default=[], metavar="NAME:=VALUE", help="another parameter")
    parser.add_argument("--reliable", action="store_true", help="images and flow by deep and reliable queues")
    parser.add_argument("--warm-up-s", type=float, help="not judged; at most a third of the run")
    parser.add_argument("--busy-neighbour", action="store_true", help="another process keeps one core busy")
    parser.add_argument("--overhead", action="store_true", help="1 minute at 5 Hz, one iteration, low scale, no budget")
    parser.add_argument("--accounts-only", action="store_true", help="judge no times and no memory")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures")
    options = parser.parse_args(args)
    if options.hours is not None:
        options.minutes = 60.0 * options.hours
    if options.warm_up_s is None:
        options.warm_up_s = 30.0 if options.faults is None else WARM_UP_S
    if options.faults is not None and (options.misbehave or options.overhead or options.cameras > 1):
        parser.error("--faults is for one camera, without --misbehave and --overhead")
    if options.faults is not None:
        options.reliable = True  # or an image that a stopped process misses would count as lost
    if options.misbehave and options.cameras < 2:
        parser.error("--misbehave needs --cameras 2 or more: another one to look at")
    if options.overhead and options.cameras > 1:
        parser.error(f"--overhead looks at one camera, got --cameras {options.cameras}")
    if options.overhead:
        options.minutes, options.rate, options.max_iterations, options.budget_ms = 1.0, 5.0, 1, 0.0
        # The estimator must be done before the next image comes, or images wait for it. What the node does beside it is
        # at the size of the image, whatever the scale that it computes at.
        options.parameter = ["min_scale:=0.25", "max_scale:=0.25", *options.parameter]
    return options
