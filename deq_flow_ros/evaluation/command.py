# SPDX-License-Identifier: Apache-2.0
"""The command line of evaluations that need no ROS; docs/evaluate_bag.md describes it.

Exit status: 0 all well; 1 done, but something is wrong with a recording (each problem is named, and what could be read
is evaluated); 2 unusable input, options or output folder; 130 interrupted (what there is is written; --resume goes on).
"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import cv2
import torch
from rich.console import Console
from rich.table import Table

from deq_flow_ros.evaluation.folder import OccupiedError
from deq_flow_ros.evaluation.headline import comparison, terminal_rows
from deq_flow_ros.evaluation.overview import INDEX, Assignment, check_place, is_done, terminal_table, write_overview
from deq_flow_ros.evaluation.progress import Progress
from deq_flow_ros.evaluation.recordings import device_of, find_recordings, processes, share
from deq_flow_ros.evaluation.report import METRICS, write_outputs
from deq_flow_ros.evaluation.runner import deterministic, load_models
from deq_flow_ros.evaluation.session import Models, Plan, Session
from deq_flow_ros.evaluation.settings import Setting, all_settings
from deq_flow_ros.evaluation.summary import BY_THE_CLOCK
from deq_flow_ros.host import keep_freed_memory
from deq_flow_ros.media.frame import MediaError
from deq_flow_ros.model import PRECISIONS

REALTIME_BUDGET_MS = 90.0
"""Of the node, unless its parameter says otherwise (config/flow.yaml)."""


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Options of a command line."""
    parser = argparse.ArgumentParser(
        prog="evaluate_bag",
        description="How good, how fast and how steady the flow is on a recording: a report, and a bag with the flow.",
        epilog="With --live, INPUT (or a rendered drive) is played through flow_node over DDS; see --live --help.",
    )
    parser.add_argument("input", nargs="?", help="bag (rosbag2, .db3, .mcap, .bag), video, or folder of images")
    parser.add_argument("--bags", type=Path, metavar="DIR", help="every recording below this folder, instead of one")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="for the results (default: evaluation)")
    parser.add_argument("--resume", action="store_true", help="go on with what an interrupted run left in --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the results that are in --out")
    parser.add_argument("--realtime", action="store_true", help="as on the robot, simulated from measured costs")
    parser.add_argument(
        "--costs", type=Path, metavar="METRICS", help="costs out of this metrics.json, instead of measuring them"
    )
    parser.add_argument("--topic", help="image topic of a bag that has several")
    parser.add_argument("--stamps", choices=("header", "record"), default="header", help="stamps of a bag's images")
    parser.add_argument("--fps", type=float, help="rate of a folder of images (default: 30)")
    parser.add_argument("--max-frames", type=int, default=0, metavar="N", help="only the first N (default 0: all)")
    parser.add_argument("--truth", metavar="WHERE", help="true flow: folder of flow files, or 32FC2 topic of the bag")
    parser.add_argument("--model", default="nano", help="name or weights file (default: nano)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of weights, features (default: auto)")
    parser.add_argument("--threads", type=int, default=0, help="of the processor (default 0: as PyTorch chooses)")
    parser.add_argument("--direction", choices=("forward", "backward"), default="forward", help="default: forward")
    parser.add_argument(
        "--budget-ms", type=float,
        help=f"latency budget, 0 = none (default: none; with --realtime {REALTIME_BUDGET_MS:g}, as the node has it)",
    )  # fmt: skip
    parser.add_argument("--max-iterations", type=int, default=12, help="per pair (default: 12)")
    parser.add_argument("--tolerance-px", type=float, default=0.05, help="settled below (default: 0.05; 0 = never)")
    parser.add_argument("--max-scale", type=float, default=1.0, help="largest processing scale (default: 1)")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="SETTING",
        help="more settings on the same frames: dis, farneback, or NAME:KEY=VALUE,... with what differs from the main "
        "one, as in cold:warm=false fast:budget_ms=50",
    )  # fmt: skip
    parser.add_argument(
        "--consistency-every", type=int, default=10, metavar="N",
        help="solve every N-th pair in the other direction as well (default: 10, 0 = none)",
    )  # fmt: skip
    parser.add_argument("--no-bag", action="store_true", help="do not record the flow")
    parser.add_argument("--images", action="store_true", help="record the images beside the flow")
    parser.add_argument("--storage", choices=("mcap", "sqlite3"), default="mcap", help="of that bag (default: mcap)")
    options = parser.parse_args(arguments)
    if (options.input is None) == (options.bags is None):
        parser.error("expected a recording, or --bags DIR, and not both (--live plays a rendered drive without any)")
    for name in ("max_frames", "budget_ms", "tolerance_px", "consistency_every", "threads"):
        value = getattr(options, name)
        if value is not None and not value >= 0:
            parser.error(f"expected --{name.replace('_', '-')} of at least 0, got {value}")
    if options.costs is not None and not options.realtime:
        parser.error("--costs are of a simulation, which --realtime asks for")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run; returns the exit status of the module's docstring."""
    options = parse_options(arguments)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    keep_freed_memory()
    try:
        plan = make_plan(options)
        assignments = _assignments(options)
        if options.threads:
            torch.set_num_threads(options.threads)
            cv2.setNumThreads(options.threads)
        with _StopRequest() as stop, deterministic():
            models = load_models(plan.settings)
            if options.bags is None:
                return _evaluate(assignments[0], plan, models, options, console, stop)
            return _evaluate_all(assignments, plan, models, options, console, stop)
    except (MediaError, ValueError, OSError, RuntimeError) as error:
        # Of `load_model`: no such weights, other weights, no such device; each says what to do.
        if not isinstance(error, MediaError) and not _is_users(error):
            raise
        console.print(f"evaluate_bag: {error}", style="red")
        return 2
    except KeyboardInterrupt:
        console.print("evaluate_bag: interrupted; --resume goes on", style="red")
        return 130


def _is_users(error: Exception) -> bool:
    """Whether the error is one that `load_model`, a setting or the system words for the user."""
    known = type(error) in (ValueError, RuntimeError) or type(error).__name__ == "WeightsError"
    return known or isinstance(error, OSError)


def make_plan(options: argparse.Namespace) -> Plan:
    """What to do, from the options. Raises ValueError for impossible settings, `MediaError` for an unreadable file."""
    budget_ms = options.budget_ms
    if budget_ms is None and options.realtime:
        budget_ms = REALTIME_BUDGET_MS
    setting = Setting(
        Path(options.model).stem,
        model=options.model,
        device=device_of(options.device),
        precision=options.precision,
        budget_ms=budget_ms or None,
        max_iterations=options.max_iterations,
        tolerance_px=options.tolerance_px or None,
        direction=options.direction,
        min_scale=min(0.25, options.max_scale),
        max_scale=options.max_scale,
    )
    truth: str | None = options.truth
    topic = truth if truth is not None and truth.startswith("/") and not Path(truth).is_dir() else None
    return Plan(
        tuple(all_settings(setting, options.compare)),
        mode="realtime" if options.realtime else "offline",
        topic=options.topic,
        fps=options.fps,
        stamps=options.stamps,
        max_frames=options.max_frames,
        consistency_every=options.consistency_every,
        truth_folder=None if topic else truth,
        truth_topic=topic,
        storage=options.storage,
        bag=not options.no_bag,
        images=options.images,
        costs=None if options.costs is None else read_costs(options.costs),
    )


def read_costs(path: Path) -> dict[str, Any]:
    """The cost table in a `metrics.json`. Raises `MediaError` where there is none."""
    try:
        costs = json.loads(path.read_text())["run"]["costs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MediaError(f"expected a metrics.json of a run with --realtime, got {path}: {error!r}") from error
    if not costs:
        raise MediaError(f"{path} holds no costs; it is not of a run with --realtime")
    return costs


def _assignments(options: argparse.Namespace) -> list[Assignment]:
    if options.bags is None:
        return [Assignment(options.input, options.out)]
    found = find_recordings(options.bags, options.out)
    return [Assignment(str(path), options.out / path.relative_to(options.bags)) for path in found]


def _evaluate(
    recording: Assignment, plan: Plan, models: Models, options: argparse.Namespace, console: Console, stop: _StopRequest
) -> int:
    """One recording; returns the exit status. Raises `MediaError`, and KeyboardInterrupt before the first frame."""
    stop.begin()
    with console.status(f"reading {recording.path}"):
        session = Session(recording.path, recording.out, plan, options.resume, options.overwrite)
    with closing(session):
        return _run(session, models, console, stop.asked)


def _run(session: Session, models: Models, console: Console, stopped: Callable[[], bool]) -> int:
    """Evaluate what is left of a recording, and write the report; returns the exit status. Raises `MediaError`."""
    if session.complete:
        console.print(f"{session.path}: complete already, see {session.out}")
        return 0 if not json.loads((session.out / METRICS).read_text())["problems"] else 1
    console.print(session.source.description)
    if session.plan.mode == "offline" and any(setting.budget_ms for setting in session.plan.settings):
        console.print(f"every frame is waited for, but {BY_THE_CLOCK}; --realtime simulates it, and can be repeated")
    with Progress(console) as progress:
        outcome = session.run(models, progress.show, stopped)
    with console.status("writing the report"):
        metrics = write_outputs(session.out, outcome.results, outcome.run)
    if outcome.run.complete:
        session.finish()
    _print(session.out, metrics, console)
    for problem in outcome.run.problems:
        console.print(f"evaluate_bag: {problem}", style="red")
    if not outcome.run.complete:
        console.print(f"evaluate_bag: interrupted; --resume goes on (the results so far are in {session.out})")
        return 130
    return 1 if outcome.run.problems else 0


def _evaluate_all(
    assignments: Sequence[Assignment], plan: Plan, models: Models, options: argparse.Namespace, console: Console,
    stop: _StopRequest,
) -> int:  # fmt: skip
    """This process's share of several recordings, in turn; one that cannot be used does not stop the rest."""
    mine = share(assignments)
    status = 0
    check_place(options.out)
    rows = write_overview(options.out, assignments)
    for number, recording in enumerate(mine, start=1):
        console.print(f"recording {number} of {len(mine)}: {recording.path}")
        try:
            got = _evaluate(recording, plan, models, options, console, stop)
            recording.forget_failure()
        except (MediaError, OSError) as error:
            console.print(f"evaluate_bag: {error}", style="red")
            if isinstance(error, OccupiedError):  # what is there is as good as before
                got = 2
            else:
                recording.note_failure(str(error))
                got = 1
        finally:
            rows = write_overview(options.out, assignments)
        status = max(status, got)
        if got == 130:
            break
    console.print(terminal_table(rows))
    console.print(f"{options.out / INDEX} leads to all of them")
    # torchrun ends all processes as soon as one fails. So that none is ended in mid-work, it is the last one to end
    # that says whether something is wrong, with whichever recording.
    if status > 1 or processes()[1] == 1:
        return status
    return 1 if all(is_done(row) for row in rows) and any(row["problems"] for row in rows) else 0


def _print(out: Path, metrics: dict[str, Any], console: Console) -> None:
    table = Table(show_header=False, title=metrics["input"]["description"], title_justify="left")
    for name, value in terminal_rows(metrics):
        table.add_row(name, value)
    console.print(table)
    if len(metrics["settings"]) > 1:
        pairs = metrics["comparison"]["pairs"]
        table = Table("", title=f"over the {pairs} pairs for which every setting gave flow", title_justify="left")
        for figures in metrics["settings"]:
            table.add_column(figures["name"], justify="right")
        for what, values, _ in comparison(metrics):
            table.add_row(what, *values)
        console.print(table)
    shares = metrics["run"]["time_shares"]
    spent = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
    console.print(f"{metrics['run']['seconds']:.1f} s: {spent}; peak memory {metrics['run']['peak_memory_mb']:.0f} MB")
    console.print(f"{out / 'report.html'} and what lies beside it")


class _StopRequest:
    """Within it, Ctrl-C and SIGTERM end a run after the frame in hand; before its first frame, or twice, at once."""

    def __init__(self) -> None:
        self._asked = self._heeded = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopRequest:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked or not self._heeded:
            raise KeyboardInterrupt
        self._asked = True

    def begin(self) -> None:
        """Before a run, which has nothing to lose yet. Raises KeyboardInterrupt where it is not to be any more."""
        if self._asked:
            raise KeyboardInterrupt
        self._heeded = False

    def asked(self) -> bool:
        """Whether to stop; to be asked after each frame."""
        self._heeded = True
        return self._asked
