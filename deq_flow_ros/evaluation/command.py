# SPDX-License-Identifier: Apache-2.0
"""The command line of evaluations that need no ROS; docs/evaluate_bag.md describes it and its exit status."""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from deq_flow_ros import UNUSABLE, UserError
from deq_flow_ros.command_line import MOST_THREADS, USER_ERRORS, CommandLine, exit_status, set_threads
from deq_flow_ros.evaluation import report
from deq_flow_ros.evaluation.methods import Models, Setting, all_settings, deterministic, load_models, with_parameters
from deq_flow_ros.evaluation.recording import RecordingEvaluation
from deq_flow_ros.evaluation.records import FrameRecord
from deq_flow_ros.evaluation.results import OccupiedError
from deq_flow_ros.host import StopRequest, keep_freed_memory
from deq_flow_ros.imaging import MediaError
from deq_flow_ros.model import PRECISIONS, WeightsError
from deq_flow_ros.recordings.files import find_recordings

BUDGET_MS = 90.0
"""The default latency budget of the node (config/flow.yaml)."""
OWN_OPTIONS = {
    "model": "--model", "device": "--device", "precision": "--precision", "direction": "--direction",
    "latency_budget_ms": "--budget-ms", "max_iterations": "--max-iterations",
}  # fmt: skip
"""Parameters of flow_node that have an option of their own."""
LINE_S = 10.0
"""Time between two lines of progress."""


def add_options(line: CommandLine) -> None:
    """The options that all modes have: which part of the recording, and how its flow is computed."""
    add = line.add_argument
    add("--topic", help="image topic of a bag that has several")
    line.add_number("--fps", None, "rate of a folder of images (default: 30)", above=0, kind=float)
    line.add_number("--max-frames", 0, "only the first N; 0: all", least=0, metavar="N")
    line.add_number("--start", 0.0, "begin S seconds after the first frame", least=0, metavar="S")
    line.add_number("--stop", 0.0, "and end there; 0: at the end", least=0, metavar="S")
    line.add_model("name or weights file")
    line.add_device()
    line.add_precision(PRECISIONS)
    add("--direction", choices=("forward", "backward"), default="forward", help="of the flow (default: forward)")
    budget = f"latency budget; 0: none (default: 0; {BUDGET_MS:g} with --realtime and --live)"
    line.add_number("--budget-ms", None, budget, least=0, kind=float)
    line.add_number("--max-iterations", 6, "per pair", least=1)
    add("--param", action="append", default=[], metavar="NAME:=VALUE", help="any other parameter of flow_node")
    add("--storage", choices=("mcap", "sqlite3"), default="mcap", help="format of the bag (default: mcap)")


def read_parameters(line: CommandLine, texts: Sequence[str]) -> dict[str, str]:
    """The values of ``--param`` by their names. If one is wrong, the process ends with status 2."""
    given: dict[str, str] = {}
    for text in texts:
        name, assigned, value = text.partition(":=")
        if not assigned:
            line.error(f"expected --param NAME:=VALUE, got {text!r}")
        if name in given:
            line.error(f"expected one value of {name}, got several with --param")
        if name in OWN_OPTIONS:
            line.error(f"expected {OWN_OPTIONS[name]} for the parameter {name}, got --param {text}")
        given[name] = value
    return given


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line. If it is wrong, the process ends with status 2."""
    line = CommandLine(
        "evaluate_bag",
        "How good, how fast and how steady the flow is on a recording: a report, and a bag with the flow.\n\n"
        "With --live, INPUT (or a rendered drive) is played through flow_node over DDS; see --live --help.",
    )
    add = line.add_argument
    add("input", nargs="?", help="bag (rosbag2, .db3, .mcap, .bag), video, or folder of images")
    add("--bags", type=Path, metavar="DIR", help="every recording below this folder, instead of one")
    add("--out", type=Path, default=Path("evaluation"), help="folder for the results (default: evaluation)")
    add("--resume", action="store_true", help="keep complete results in --out, start incomplete ones again")
    add("--overwrite", action="store_true", help="replace the results that are in --out")
    add("--realtime", action="store_true", help="simulate the timing on a robot from measured costs")
    add("--costs", type=Path, metavar="METRICS", help="take the costs from this metrics.json, do not measure them")
    add("--stamps", choices=("header", "record"), help="which stamps of a bag's images to use (default: header)")
    add("--truth", metavar="DIR", help="true flow: a folder of flow files")
    add_options(line)
    line.add_number("--threads", 0, "threads on the CPU; 0: PyTorch chooses", least=0, most=MOST_THREADS)
    differing = "NAME:KEY=VALUE,... with differences to the main setting, as cold:warm=false fast:budget_ms=50"
    further = f"further settings: dis, farneback or {differing}"
    add("--compare", nargs="+", action="extend", default=[], metavar="SETTING", help=further)
    every = "solve every N-th pair in the other direction as well; 0: none"
    line.add_number("--consistency-every", 10, every, least=0, metavar="N")
    add("--no-bag", action="store_true", help="do not record the flow")
    add("--images", action="store_true", help="record the images beside the flow")
    if "--live" in arguments:  # the script of ROS hands it to another command
        line.error("--live needs ROS: take ros2 run deq_flow_ros evaluate_bag --live, or scripts/evaluate_bag --live")
    options = line.parse_args(arguments)
    options.param = read_parameters(line, options.param)
    if (options.input is None) == (options.bags is None):
        line.error("expected a recording, or --bags DIR, and not both (--live plays a rendered drive without any)")
    if options.costs is not None and not options.realtime:
        line.error("--costs is for simulations: give --realtime as well")
    if options.resume and options.overwrite:
        line.error("--resume keeps complete results and --overwrite replaces them: give one of both")
    if options.images and options.no_bag:
        line.error("--images are recorded in the bag with the flow, which --no-bag leaves out: give one of both")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    options = parse_options(arguments)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    keep_freed_memory()

    def work() -> int:
        settings = make_settings(options)
        options.costs = None if options.costs is None else read_costs(options.costs)
        set_threads(options.threads)
        stop = StopRequest(insist=True)
        with deterministic():
            models = load_models(settings)

            def one(path: str, out: Path) -> tuple[int, dict[str, Any]]:
                return evaluate(path, out, settings, models, options, console, stop)

            if options.bags is None:
                return one(options.input, options.out)[0]
            return evaluate_all(options, console, stop, one)

    later = "interrupted; --resume goes on with what is not complete"
    return status_of_work(work, {WeightsError: UNUSABLE, **USER_ERRORS}, later)


def status_of_work(work: Callable[[], int], errors: Mapping[type[Exception], int], interrupted: str) -> int:
    """Do the work of ``evaluate_bag``, in all modes; returns the exit status, as ``exit_status`` does."""
    # The script has left it to the system while this module was imported, and a shell ignores it in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def within_memory() -> int:
        try:
            return work()
        except torch.cuda.OutOfMemoryError as error:
            short = ". ".join(str(error).split(". ")[:2])  # what follows is for programmers
            hint = "compute smaller images (--param max_scale:=0.5), compare fewer settings, or take --device cpu"
            raise UserError(f"{short}; {hint}") from error

    return exit_status(within_memory, errors, prefix="evaluate_bag", interrupted=interrupted, exactly=True)


def make_settings(options: argparse.Namespace) -> tuple[Setting, ...]:
    """The settings that the options ask for, the main one first.

    :raises ValueError: for impossible ones.
    """
    usual_ms = BUDGET_MS if options.realtime else None
    budget_ms = usual_ms if options.budget_ms is None else options.budget_ms
    main = Setting(
        Path(options.model).stem, model=options.model, device=options.device, precision=options.precision,
        budget_ms=budget_ms or None, max_iterations=options.max_iterations, direction=options.direction,
    )  # fmt: skip
    return all_settings(with_parameters(main, options.param), options.compare)


def read_costs(path: Path) -> dict[str, Any]:
    """The cost tables in a ``metrics.json``.

    :raises MediaError: if there are none.
    """
    try:
        costs = json.loads(path.read_text())["run"]["costs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MediaError(f"expected a metrics.json of a run with --realtime, got {path}: {error!r}") from error
    if not costs:
        raise MediaError(f"{path} holds no costs, because it is not from a run with --realtime")
    return costs


def evaluate(
    path: str, out: Path, settings: Sequence[Setting], models: Models, options: argparse.Namespace, console: Console,
    stop: StopRequest,
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    """Evaluate one recording, and tell on the terminal how it goes; returns the exit status and the metrics.

    :raises MediaError: for an unusable input or folder.
    """
    evaluation = RecordingEvaluation(path, out, options, settings)
    printed_s = began_s = time.monotonic()

    def show(done: int, latest: FrameRecord) -> None:
        nonlocal printed_s
        if (now_s := time.monotonic()) - printed_s > LINE_S:
            printed_s = now_s
            text = latest.outcome if latest.info is None else f"{latest.info.latency_ms:.0f} ms"
            rate = f"{done / (now_s - began_s):.1f} frames/s"
            console.print(f"frame {done} of {evaluation.frames or '?'}, {text}, {rate}")

    with evaluation.folder as folder:
        if folder.complete:
            console.print(f"{path}: already complete, see {out}")
            metrics = report.read_json(out / report.METRICS) or {}
            return 1 if metrics.get("problems") else 0, metrics
        console.print(evaluation.source.description)
        if not options.realtime and any(setting.budget_ms for setting in settings):
            console.print(f"{report.BY_THE_CLOCK}; a simulation with --realtime can be repeated")
        metrics = evaluation.run(models, show, stop)
    print_results(out, metrics, console)
    if not metrics["complete"]:
        console.print(f"evaluate_bag: interrupted; the results are in {out}, --resume starts again")
        return 130, metrics
    return 1 if metrics["problems"] else 0, metrics


def evaluate_all(
    options: argparse.Namespace, console: Console, stop: StopRequest,
    one: Callable[[str, Path], tuple[int, dict[str, Any]]],
) -> int:  # fmt: skip
    """Evaluate every recording below a folder. One that cannot be used does not stop the others.

    :param one: evaluates a recording into a folder, as ``evaluate`` does.
    """
    out, status, found = options.out, 0, find_recordings(options.bags, options.out)
    done: list[report.Evaluated] = []
    report.write_overview(out / report.INDEX, done)
    for number, path in enumerate(found, start=1):
        if stop.requested:
            break
        console.print(f"recording {number} of {len(found)}: {path}")
        name = path.relative_to(options.bags).as_posix()
        try:
            got, metrics = one(str(path), out / name)
            done.append(report.Evaluated(name, "complete" if metrics["complete"] else "interrupted", metrics=metrics))
        except (MediaError, OSError) as error:
            console.print(f"evaluate_bag: {error}", style="red")
            got, state = (2, "left as it was") if isinstance(error, OccupiedError) else (1, "failed")
            done.append(report.Evaluated(name, state, str(error)))
        status = max(status, got)
        report.write_overview(out / report.INDEX, done)
    states = Counter(each.state for each in done)
    console.print(", ".join(f"{count} {state}" for state, count in states.items()))
    console.print(f"{out / report.INDEX} links to all reports")
    return status


def print_results(out: Path, metrics: dict[str, Any], console: Console) -> None:
    """Print the most important figures, the comparison of settings, and the problems."""
    table = Table(show_header=False, title=metrics["input"]["description"], title_justify="left")
    for name, value in report.terminal_rows(metrics):
        table.add_row(name, value)
    console.print(table)
    if len(metrics["settings"]) > 1:
        pairs = metrics["comparison"]["pairs"]
        table = Table("", title=f"over the {pairs} pairs for which every setting gave flow", title_justify="left")
        for figures in metrics["settings"]:
            table.add_column(figures["name"], justify="right")
        for row in report.comparison(metrics):
            table.add_row(row.title, *row.values)
        console.print(table)
    run = metrics["run"]
    spent = "".join(f"{name} {100 * share:.1f} %, " for name, share in run["time_shares"].items())
    console.print(f"{run['seconds']:.1f} s: {spent}peak memory {run['peak_memory_mb']:.0f} MB")
    console.print(f"{out / report.REPORT} and the files beside it")
    for problem in metrics["problems"]:
        console.print(f"evaluate_bag: {problem}", style="red")
