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
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from deq_flow_ros.command_line import CommandLine, exit_status, named_path, set_threads
from deq_flow_ros.equilibrium import State, make_solver
from deq_flow_ros.imaging.pictures import error_strip, write_picture
from deq_flow_ros.model import DEQFlow, Prediction, load_model
from deq_flow_ros.model.weights import check_device
from deq_flow_ros.recordings.files import write_json
from deq_flow_ros.streaming.warm_start import carry
from training.datasets import FlowDataset, Sample, open_dataset
from training.pairs import Tally, by_region, columns, measure, open_pairs, to_array, to_tensor
from training.runtime import Processes, joined


@dataclass(frozen=True)
class SolveSetting:
    """One way to solve a pair.

    :ivar iterations: evaluations of the update operator at most, the smaller resolutions of a cold start included.
    :ivar warm: start from the last pair's fixed point, moved along the motion; the first pair of a sequence has none.
    :ivar tolerance_px: stop when the RMS update of the flow is at or below this; None never stops early.
    """

    iterations: int
    warm: bool = False
    tolerance_px: float | None = None

    def __str__(self) -> str:
        count = str(self.iterations) if self.tolerance_px is None else f"to {self.tolerance_px:g} px"
        return f"{count} {'warm' if self.warm else 'cold'}"


class Solved(NamedTuple):
    """A pair, its number in the data set, whether the pair before it was solved as well, a prediction per setting."""

    number: int
    follows: bool
    sample: Sample
    predictions: list[Prediction]


class Record(NamedTuple):
    """What is measured of a pair. Per setting: iterations at full resolution, and the tallies by region."""

    number: int
    name: str
    follows: bool
    iterations: list[int]
    regions: list[dict[str, Tally]]

    def epe(self, place: int) -> float | None:
        """Mean endpoint error in px under the setting at this place; None without any valid pixel."""
        tally = self.regions[place]["all"]
        return tally.error_px / tally.pixels if tally.pixels else None


@dataclass(frozen=True)
class Evaluator:
    """A model with what stays the same for all pairs.

    :ivar settings: what to compare; not empty.
    :ivar coarse_levels: see ``DEQFlow.coarse_start``.
    """

    model: DEQFlow
    settings: Sequence[SolveSetting]
    coarse_levels: int = 0
    solver: str = "picard"

    def solve(self, sample: Sample, setting: SolveSetting, last: State | None = None) -> Prediction:
        """One pair. A warm setting begins with ``last``, the state of the pair before; without one it begins cold."""
        state, most = None, setting.iterations
        if setting.warm and last is not None:
            state = carry(last)
        elif setting.warm:  # a stream begins once: the pair without predecessor is solved as well as any
            most = max(each.iterations for each in self.settings)
        images = (to_tensor(image, self.model.device) for image in (sample.image1, sample.image2))
        return self.model(
            *images, max_iterations=most, solver=self.solver, tolerance_px=setting.tolerance_px, state=state,
            coarse_levels=self.coarse_levels,
        )  # fmt: skip

    def solved(self, dataset: FlowDataset, sequences: Sequence[Sequence[int]]) -> Iterator[Solved]:
        """Solve pairs, given as runs of indices that follow each other, under every setting."""
        order = [(index, place > 0) for run in sequences for place, index in enumerate(run)]
        states: dict[SolveSetting, State] = {}
        for (index, follows), sample in zip(order, read_ahead(dataset, [index for index, _ in order]), strict=True):
            if not follows:
                states.clear()
            predictions = [self.solve(sample, setting, states.get(setting)) for setting in self.settings]
            states = {s: p.state for s, p in zip(self.settings, predictions, strict=True) if s.warm}
            yield Solved(index, follows, sample, predictions)

    def records(self, dataset: FlowDataset, sequences: Sequence[Sequence[int]]) -> Iterator[Record]:
        """Solve pairs as ``solved`` does, and measure them."""
        for number, follows, sample, predictions in self.solved(dataset, sequences):
            regions = [measure(to_array(prediction.flow), sample) for prediction in predictions]
            yield Record(number, sample.name, follows, [int(each.iterations) for each in predictions], regions)


def read_ahead(dataset: FlowDataset, indices: Iterable[int], ahead: int = 2) -> Iterator[Sample]:
    """The samples of these indices, in order, decoded in the background while the one before is worked on."""
    with ThreadPoolExecutor(ahead) as pool:
        pending: deque[Future[Sample]] = deque()
        for index in indices:
            pending.append(pool.submit(dataset.__getitem__, index))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def runs(dataset: FlowDataset, as_sequences: bool, limit: int | None = None) -> list[list[int]]:
    """The pairs of a data set as runs to be solved in order: its sequences, or each pair for itself.

    :param limit: only so many pairs, from the first on; a sequence may be cut.
    """
    whole = dataset.sequences() if as_sequences else [[index] for index in range(len(dataset))]
    kept = [[index for index in run if limit is None or index < limit] for run in whole]
    return [run for run in kept if run]


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
    line.add_number("--coarse-levels", 0, "smaller resolutions that cold starts begin with; the node takes 2", least=0)
    line.add_argument("--solver", default="picard", help="as picard or anderson")
    line.add_device()
    line.add_threads()


def settings(options: argparse.Namespace) -> list[SolveSetting]:
    """What to compare: cold at each number of iterations; with sequences also warm, and both to the tolerance."""
    counts, starts = sorted(set(options.iterations)), (False, True) if options.sequences else (False,)
    found = [SolveSetting(count, warm) for warm in starts for count in counts]
    if options.sequences:
        found += [SolveSetting(counts[-1], warm, options.tolerance_px) for warm in starts]
    return found


def report(records: list[Record], settings: Sequence[SolveSetting]) -> dict[str, Any]:
    """What metrics.json says of a data set, see docs/evaluation.md."""

    def entry(some: list[Record]) -> dict[str, Any]:
        rows = [
            {
                "start": "warm" if setting.warm else "cold", "iterations": setting.iterations,
                "tolerance_px": setting.tolerance_px,
                "mean_iterations": float(np.mean([r.iterations[place] for r in some])) if some else None,
                "regions": by_region([record.regions[place] for record in some]),
                "pairs_epe_px": {record.name: record.epe(place) for record in some},
            }
            for place, setting in enumerate(settings)
        ]  # fmt: skip
        return {"pairs": len(some), "results": rows}

    if not any(setting.warm for setting in settings):
        return entry(records)
    return {**entry(records), "following": entry([record for record in records if record.follows])}


def write_worst(
    evaluator: Evaluator, dataset: FlowDataset, records: list[Record], number: int, folder: Path
) -> list[dict[str, Any]]:
    """Pictures of the pairs with the largest endpoint error, cold with the most iterations; solved anew for them."""
    setting = max((s for s in evaluator.settings if not s.warm and s.tolerance_px is None), key=lambda s: s.iterations)
    errors = [(record.epe(evaluator.settings.index(setting)), record) for record in records]
    worst = sorted(((error, record) for error, record in errors if error is not None), key=lambda pair: -pair[0])
    written = []
    for position, (error, record) in enumerate(worst[:number], 1):
        sample = dataset[record.number]
        assert sample.flow is not None  # it was measured
        flow = to_array(evaluator.solve(sample, setting).flow)
        path = folder / f"{position:02d}_{record.name.replace('/', '_')}.png"
        write_picture(path, error_strip(sample.image1, sample.flow, sample.valid, flow))
        written.append({"name": record.name, "epe_px": error, "picture": str(path)})
    return written


def print_report(console: Console, name: str, entry: dict[str, Any]) -> None:
    """Tables of a data set: all pairs cold; and of those that have a predecessor, cold beside warm."""
    parts = [(f"{name}: {entry['pairs']} pairs", [row for row in entry["results"] if row["start"] == "cold"])]
    if following := entry.get("following"):
        parts.append((f"{name}: {following['pairs']} pairs that follow another", following["results"]))
    for title, rows in parts:
        table = Table("iterations", title=title)
        for label in ("made", *(column.label for column in columns(name))):
            table.add_column(label, justify="right")
        for row in rows:
            setting = SolveSetting(row["iterations"], row["start"] == "warm", row["tolerance_px"])
            mean = "-" if row["mean_iterations"] is None else f"{row['mean_iterations']:.1f}"
            table.add_row(str(setting), mean, *(column.of(row["regions"]) for column in columns(name)))
        console.print(table)


def run(options: argparse.Namespace, processes: Processes, device: torch.device) -> None:
    """Evaluate as one of these processes, each on its share of the pairs."""
    make_solver(options.solver)
    console, entries = Console(), dict[str, dict[str, Any]]()
    splits = {name: options.split or SPLITS.get(name, "train") for name, _ in options.data}
    datasets: dict[str, FlowDataset] = {n: open_dataset(n, root, split=splits[n]) for n, root in options.data}
    datasets |= {f"pairs/{group.name}": group for group in (open_pairs(options.pairs) if options.pairs else ())}
    model = load_model(options.model, device)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    evaluator = Evaluator(model, settings(options), options.coarse_levels, options.solver)
    for name, dataset in datasets.items():
        share = runs(dataset, options.sequences, options.limit)[processes.rank :: processes.count]
        own, total = evaluator.records(dataset, share), sum(map(len, share))
        bar = tqdm(own, total=total, desc=name, unit="pair", disable=not processes.writes, dynamic_ncols=True)
        records = sorted((record for part in processes.gather(list(bar)) for record in part), key=lambda r: r.number)
        if not processes.writes:
            continue
        entries[name] = report(records, evaluator.settings)
        print_report(console, name, entries[name])
        if options.out:
            folder = options.out / "worst" / name.replace("/", "_")
            entries[name]["worst"] = write_worst(evaluator, dataset, records, options.worst, folder)
    if options.out and processes.writes:
        summary = {
            "model": options.model, "solver": options.solver, "coarse_levels": options.coarse_levels,
            "device": options.device, "torch": torch.__version__,
            "data": {name: str(root) for name, root in options.data},
            "pairs": str(options.pairs) if options.pairs else None, "datasets": entries,
        }  # fmt: skip
        write_json(options.out / "metrics.json", summary)
        console.print(f"wrote {options.out / 'metrics.json'}", markup=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate; returns the exit status."""
    options = parse_arguments(arguments)

    def work() -> int:
        set_threads(options.threads)
        check_device(options.device)
        with joined(options.device, patience=timedelta(days=7)) as (processes, device):  # others may take hours
            run(options, processes, device)
        return 0

    return exit_status(work)


if __name__ == "__main__":
    raise SystemExit(main())
