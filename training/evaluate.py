# SPDX-License-Identifier: Apache-2.0
"""Evaluate weights on data sets with ground truth, as their benchmarks do.

``python -m training.evaluate --data sintel-clean=FOLDER kitti-2015=FOLDER [--model NAME_OR_PATH] [--out DIR]``

Every pair starts cold. With ``--sequences``, pairs that follow each other are solved once more from the last pair's
fixed point, at the same numbers of iterations and, cold and warm, to a tolerance. ``torchrun --nproc_per_node N -m
training.evaluate ...`` shares the work between processes, on a machine with GPUs one each; the figures stay the same.
Metrics and the keys of DIR/metrics.json: docs/evaluation.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from deq_flow_ros.command_line import CommandLine, exit_status, named_path, set_threads
from deq_flow_ros.equilibrium import make_solver
from deq_flow_ros.imaging.pictures import error_strip, write_picture
from deq_flow_ros.model import load_model
from deq_flow_ros.model.weights import check_device
from deq_flow_ros.recordings.files import write_json
from training.datasets import FlowDataset, open_dataset
from training.distributed import Processes, join, leave
from training.evaluation import Evaluator, Record, SolveSetting, results, runs
from training.pairs import columns, open_pairs, to_array

SPLITS = {"chairs": "val", "things-clean": "test", "things-final": "test"}
"""The split with public ground truth that the literature evaluates on; "train" where it is not named here."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    line = CommandLine("python -m training.evaluate", __doc__)
    line.add_argument("--data", nargs="+", type=named_path, default=[], metavar="NAME=ROOT",
                      help="data sets, see docs/datasets.md")  # fmt: skip
    line.add_pairs("list of pairs in JSON, see training/pairs.py; each group is a data set")
    line.add_argument("--split", help="split of all data sets (default: the one the literature evaluates on)")
    line.add_number("--iterations", [12, 24], "numbers to compare", least=1, nargs="+")
    line.add_argument("--sequences", action="store_true", help="also warm, from the fixed point of the pair before")
    line.add_number("--tolerance-px", 0.05, "of the runs to a tolerance in --sequences", above=0)
    line.add_number("--limit", None, "only the first N pairs of each data set", least=1, kind=int, metavar="N")
    line.add_path("--out", "folder for metrics.json and pictures of the worst pairs", metavar="DIR")
    line.add_number("--worst", 5, "pictures per data set", least=0, metavar="N")
    add_solve(line)
    options = line.parse_args(arguments)
    if not options.data and not options.pairs:
        line.error("nothing to evaluate: give --data NAME=ROOT, or --pairs")
    if options.split and not options.data:
        line.error("--split is of the data sets of --data: the list of --pairs has none")
    names = [name for name, _ in options.data]
    if len(set(names)) != len(names):
        line.error(f"--data: expected each data set once, got {' '.join(names)}")
    return options


def add_solve(line: CommandLine) -> None:
    """The options that say with what, and how, pairs are solved."""
    line.add_model()
    coarse = "smaller resolutions that cold starts begin with; the node takes 2"
    line.add_number("--coarse-levels", 0, coarse, least=0, metavar="N")
    line.add_argument("--solver", default="picard", help="as picard or anderson")
    line.add_device()
    line.add_threads()


def settings(options: argparse.Namespace) -> list[SolveSetting]:
    """What to compare: cold at each number of iterations; with sequences also warm, and both to the tolerance."""
    counts = sorted(set(options.iterations))
    cold = [SolveSetting(count) for count in counts]
    if not options.sequences:
        return cold
    to_tolerance = [SolveSetting(counts[-1], warm, options.tolerance_px) for warm in (False, True)]
    return [*cold, *(SolveSetting(count, warm=True) for count in counts), *to_tolerance]


def open_all(options: argparse.Namespace) -> dict[str, FlowDataset]:
    """The data sets to evaluate on, by the name they have in the results."""
    splits = {name: options.split or SPLITS.get(name, "train") for name, _ in options.data}
    found = {name: open_dataset(name, root, split=splits[name]) for name, root in options.data}
    return found | {f"pairs/{group.name}": group for group in (open_pairs(options.pairs) if options.pairs else ())}


def evaluate(
    evaluator: Evaluator, dataset: FlowDataset, sequences: Sequence[Sequence[int]], processes: Processes, name: str
) -> list[Record]:
    """Measure this process's share of the runs; the records of all processes, in the order of the data set."""
    share = sequences[processes.rank :: processes.count]
    total, records = sum(len(run) for run in share), evaluator.records(dataset, share)
    bar = tqdm(records, total=total, desc=name, unit="pair", disable=not processes.writes, dynamic_ncols=True)
    return sorted((record for part in processes.gather(list(bar)) for record in part), key=lambda record: record.index)


def report(records: list[Record], evaluator: Evaluator) -> dict[str, Any]:
    """What metrics.json says of a data set."""
    entry: dict[str, Any] = {"pairs": len(records), "results": results(records, evaluator.settings)}
    if any(setting.warm for setting in evaluator.settings):
        following = [record for record in records if record.follows]
        entry["following"] = {"pairs": len(following), "results": results(following, evaluator.settings)}
    return entry


def write_worst(
    evaluator: Evaluator, dataset: FlowDataset, records: list[Record], number: int, folder: Path
) -> list[dict[str, Any]]:
    """Pictures of the pairs with the largest endpoint error, cold with the most iterations, solved anew for it."""
    setting = max((s for s in evaluator.settings if not s.warm and s.tolerance_px is None), key=lambda s: s.iterations)
    place = evaluator.settings.index(setting)
    errors = [(error, record) for record in records if (error := record.epe(place)) is not None]
    errors.sort(key=lambda pair: -pair[0])
    written = []
    for position, (error, record) in enumerate(errors[:number], 1):
        sample = dataset[record.index]
        assert sample.flow is not None  # it was measured
        flow = to_array(evaluator.solve(sample, setting).flow)
        path = folder / f"{position:02d}_{record.name.replace('/', '_')}.png"
        write_picture(path, error_strip(sample.image1, sample.flow, sample.valid, flow))
        written.append({"name": record.name, "epe_px": error, "picture": str(path)})
    return written


def print_report(console: Console, name: str, entry: dict[str, Any]) -> None:
    """Tables of a data set: all pairs cold; and of those that have a predecessor, cold beside warm."""
    cold = [row for row in entry["results"] if row["start"] == "cold" and row["tolerance_px"] is None]
    parts = [(f"{name}: {entry['pairs']} pairs", cold)]
    if following := entry.get("following"):
        parts.append((f"{name}: {following['pairs']} pairs that follow another", following["results"]))
    for title, rows in parts:
        table = Table(title=title)
        for label in ("iterations", "made", *(column.label for column in columns(name))):
            table.add_column(label, justify="left" if label == "iterations" else "right")
        for row in rows:
            setting = SolveSetting(row["iterations"], row["start"] == "warm", row["tolerance_px"])
            mean = "-" if row["mean_iterations"] is None else f"{row['mean_iterations']:.1f}"
            table.add_row(str(setting), mean, *(column.of(row["regions"]) for column in columns(name)))
        console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate; returns the exit status."""
    options = parse_arguments(arguments)

    def work() -> int:
        set_threads(options.threads)
        check_device(options.device)
        # A process with shorter sequences waits for the others, which may take hours.
        processes, device = join(options.device, patience=timedelta(days=7))
        try:
            run(options, processes, device, Console())
        finally:
            leave()
        return 0

    return exit_status(work)


def run(options: argparse.Namespace, processes: Processes, device: torch.device, console: Console) -> None:
    """Evaluate as one of these processes."""
    make_solver(options.solver)
    datasets = open_all(options)
    model = load_model(options.model, device)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    evaluator = Evaluator(model, settings(options), options.coarse_levels, options.solver)
    entries: dict[str, dict[str, Any]] = {}
    for name, dataset in datasets.items():
        sequences = runs(dataset, options.sequences, options.limit)
        records = evaluate(evaluator, dataset, sequences, processes, name)
        if not processes.writes:
            continue
        entries[name] = report(records, evaluator)
        print_report(console, name, entries[name])
        if options.out:
            folder = options.out / "worst" / name.replace("/", "_")
            entries[name]["worst"] = write_worst(evaluator, dataset, records, options.worst, folder)
    if options.out and processes.writes:
        summary = {
            "model": options.model,
            "solver": options.solver,
            "coarse_levels": options.coarse_levels,
            "device": options.device,
            "torch": torch.__version__,
            "data": {name: str(root) for name, root in options.data},
            "pairs": str(options.pairs) if options.pairs else None,
            "datasets": entries,
        }
        write_json(options.out / "metrics.json", summary)
        console.print(f"wrote {options.out / 'metrics.json'}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(main())
