# SPDX-License-Identifier: Apache-2.0
"""Train a flow model by a recipe: ``python -m training.train --recipe synthetic --for 28m --out runs/nano``.

A recipe (training/recipes/, or a YAML file of yours) says what is trained, on what and how; ``--set`` changes any value
of it. OUT gets ``recipe.yaml`` (the recipe as it was resolved), ``log.jsonl``, the checkpoint that a run resumes from,
``model.safetensors`` (averaged weights) and ``best.safetensors`` (those with the lowest validation error). See
docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from deq_flow_ros import INTERRUPTED
from deq_flow_ros.command_line import CommandLine, exit_status, named_path
from deq_flow_ros.host import StopRequest
from deq_flow_ros.model import SIZES
from deq_flow_ros.model.weights import check_device
from training import STARTED
from training.recipe import Recipe, read_recipe, recipe_names
from training.run import MODEL, Run, Validator
from training.samples import choose_workers, load_ahead, spare_cores, training_samples, transform
from training.settings import parse_change, parse_duration

MEASURED_BATCHES = 4  # made and trained on in turns, at the start of a stage
EXIT_SECONDS = 1.5  # for the end of the workers and of the process
CHECKPOINTS = 20  # of a timed run, at least: a kill costs no more than this part of it
SHOWN = ("epe_cold", "epe_warm", "matching", "waiting")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    line = CommandLine("python -m training.train", __doc__)
    add = line.add_argument
    line.add_path("--out", "folder of the run; one that has a checkpoint is resumed", required=True)
    add("--recipe", default="synthetic", help=f"{', '.join(recipe_names())}, or a YAML file (default synthetic)")
    add("--size", choices=list(SIZES), help="model size (default: the recipe's)")
    add("--variant", help="of the recipe, as efficient: one-step gradient")
    add("--data", nargs="+", type=named_path, default=[], metavar="NAME=ROOT", help="where data sets lie, see "
        "docs/datasets.md; pairs=LIST.json for a list of pairs")  # fmt: skip
    add("--textures", help="folder of photographs for the generator; without one its textures are procedural")
    add("--init", metavar="WEIGHTS", help="weights to start a new run from: a name or path")
    add("--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", dest="changes",
        help="change any value of the recipe, as schedule.steps=1000 data.batch=2")  # fmt: skip
    add("--for", metavar="TIME", dest="duration", help="train for this time, as 90s, 28m or 1.5h, over all starts, "
        "instead of the recipe's number of steps")  # fmt: skip
    add("--device", default="cpu", choices=("cpu", "cuda"), help="to train on")
    line.add_threads(1, "threads of PyTorch on the CPU")
    line.add_number("--workers", None, "processes that make samples ahead (default: as many as measurement finds "
                    "useful and the machine has cores to spare)", least=0, kind=int)  # fmt: skip
    line.add_number("--checkpoint-every", 120.0, "time between checkpoints", least=0, metavar="SECONDS")
    line.add_number("--log-every", 50, "steps between lines of log.jsonl", least=1, metavar="STEPS")
    add("--show", action="store_true", help="print the resolved recipe and end")
    return line.parse_args(arguments)


def resolve(options: argparse.Namespace) -> Recipe:
    """The recipe that the command line asks for; errors as ``read_recipe``."""
    changes: list[dict[str, Any]] = [{"data": {"roots": {name: str(root) for name, root in options.data}}}]
    if options.textures:
        changes.append({"data": {"textures": options.textures}})
    if options.duration:
        changes.append({"schedule": {"seconds": parse_duration(options.duration)}})
    if options.init:
        changes.append({"init": options.init})
    changes += map(parse_change, options.changes)
    return read_recipe(options.recipe, size=options.size, variant=options.variant, changes=changes)


class Training:
    """One start of a run: samples, validation, log, and when to stop.

    :param seconds: time of the run up to now, over all its starts; the time in between does not count.
    """

    def __init__(self, options: argparse.Namespace, recipe: Recipe, run: Run, seconds: Callable[[], float]) -> None:
        self.options, self.recipe, self.run, self.seconds = options, recipe, run, seconds
        self.timed = recipe.schedule.seconds
        self.samples = training_samples(run.recipe)
        self.validator = Validator(recipe)
        if self.validator.left_out:
            print(f"no validation on {', '.join(self.validator.left_out)}: no --data for it", flush=True)
        self.reached = self.step_seconds = self.saving = 0.0
        self.validating, self.validated = self.run.tail, self.run.step
        self.workers: int | None = options.workers
        self.stop = StopRequest(insist=True)

    def train(self) -> int:
        """To the end, or until a signal; returns the exit status. ``ValueError`` if there is no time for a step."""
        run, recipe, options = self.run, self.recipe, self.options
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "recipe.yaml").write_text(recipe.to_yaml())
        total = None if self.timed else recipe.schedule.steps
        log = Log(options.out, run.step, total, options.log_every)
        with closing(log), self.stop:
            if run.step == 0:
                self.validate(log)
                if self.timed:
                    self.save()  # from now on, time that is spent counts
            while self.position() < 1:
                self.train_stage(log)
            if self.timed and run.step == 0 and not self.stop.requested:
                raise ValueError(f"{self.timed:.0f} s are too short: start and validation use them up")
            if not self.stop.requested and self.validated != run.step:
                self.validate(log)
            self.save()
        of, spent = f" of {total}" if total else "", timedelta(seconds=round(run.seconds))
        print(f"step {run.step}{of}, {spent} in all: {options.out / MODEL}", flush=True)
        if self.stop.requested:
            print("interrupted: the same command goes on from here", flush=True)
            return INTERRUPTED
        if self.timed:
            print(f"the time of the run, {self.timed:g} s, is over: a longer --for goes on from here", flush=True)
        return 0

    def train_stage(self, log: Log) -> None:
        """Train to the end of the present stage, of the run, or of the measurement that the workers are chosen by."""
        run, stage = self.run, self.recipe.stage_at(self.position())
        if stage != run.stage:
            run.enter(stage)
            self.samples = training_samples(run.recipe)
            self.workers = self.options.workers
        clip = None
        measured: list[tuple[float, float]] = []
        with closing(load_ahead(self.samples, run.clips, run.recipe.data.batch, self.workers or 0)) as clips:
            while (progress := self.position()) < 1 and self.recipe.stage_at(progress) == stage:
                began = self.seconds()
                if clip is None:
                    clip = next(clips).to(run.device)
                    making = self.seconds() - began
                waited = self.seconds() - began
                share = self.share_of_batch()
                part = transform(clip, run.use).first(math.ceil(share * run.recipe.data.batch))
                figures = run.train_step(part, progress if self.timed else None)
                seconds = self.seconds() - began
                if share == 1:
                    self.step_seconds = 0.9 * (self.step_seconds or seconds) + 0.1 * seconds
                self.after_step(log, figures | {"seconds": seconds, "waiting": waited / seconds})
                if run.use:
                    continue
                clip = None
                measured.append((making, run.recipe.data.uses * (seconds - waited)))
                if self.workers is None and len(measured) == MEASURED_BATCHES:
                    making, training = (statistics.median(column) for column in zip(*measured, strict=True))
                    spare = spare_cores(self.options.threads)
                    self.workers = choose_workers(making, training, spare)
                    took = f"{making:.2f} s to make and {training:.2f} s to train on"
                    print(f"{self.workers} workers: a batch takes {took}, and {spare} cores are to spare", flush=True)
                    return

    def position(self) -> float:
        """Share of the run that is done; 1 at its end, and after a signal."""
        if self.stop.requested:
            return 1.0
        done = self.run.step / self.recipe.schedule.steps
        if self.timed:
            # The last step is on one clip, and may end half of its time early or late.
            spent, late = self.seconds(), self.step_seconds / self.run.recipe.data.batch / 2
            end = spent + self.left() - late
            done = min(1.0, spent / end) if end > 0 else 1.0
        # What is reserved for the end changes; a stage that has begun does not go back.
        self.reached = max(self.reached, done)
        return self.reached

    def left(self) -> float:
        """Seconds for steps; after them come the last validation, the files and the exit of the process."""
        return (self.timed or math.inf) - self.run.tail - EXIT_SECONDS - self.seconds()

    def share_of_batch(self) -> float:
        """How much of a batch the next step takes: less and less in the last two steps of a timed run.

        On a CPU a step takes many seconds, and some take twice as long as others: whole ones would end far from the
        time of the run.
        """
        steps = self.left() / self.step_seconds if self.step_seconds else math.inf
        return min(1.0, max(steps / 2, 1 / self.run.recipe.data.batch))

    def after_step(self, log: Log, figures: dict[str, float]) -> None:
        """Log, validate and save as it is time."""
        run, spent = self.run, self.seconds()
        left = str(timedelta(seconds=round(max(0.0, self.timed - spent)))) if self.timed else ""
        counts = {"clips": run.seen, "samples": run.samples, "stage": run.stage, "elapsed": round(spent, 1)}
        log.step(run.step, figures, counts, left)
        if run.step % self.recipe.validation.every == 0:
            self.validate(log)
        if spent - run.seconds > min(self.options.checkpoint_every, (self.timed or math.inf) / CHECKPOINTS):
            self.save()

    def save(self) -> None:
        """Write the checkpoint."""
        self.run.seconds = self.seconds()
        self.run.save()
        self.saving = self.seconds() - self.run.seconds
        self.run.tail = self.validating + self.saving

    def validate(self, log: Log) -> None:
        """Measure the averaged weights, and keep them if they are the best."""
        began = self.seconds()
        self.validated = self.run.step
        if self.validator.sets:
            errors = self.validator(self.run.ema)
            log.validation(self.run.step, errors, self.run.keep_best(errors["mean"]))
        self.validating = self.seconds() - began
        self.run.tail = self.validating + self.saving


class Log:
    """The figures of a run: ``log.jsonl``, and a bar of the last means.

    :param step, total: where the run stands, and where it ends; None if it is the time that ends it.
    :param every: steps from one line of their means to the next.
    """

    def __init__(self, out: Path, step: int, total: int | None, every: int) -> None:
        self._every, self._file = every, (out / "log.jsonl").open("a", buffering=1)
        self._since_last: list[dict[str, float]] = []
        self._shown: dict[str, str] = {}
        self._bar = tqdm(total=total, initial=step, unit="step", mininterval=2, dynamic_ncols=True, disable=None)

    def step(self, step: int, figures: dict[str, float], counts: dict[str, float], left: str) -> None:
        """The ``figures`` of a step, of which means are written; ``counts``, as they are; the time left, in words."""
        self._since_last.append(figures)
        self._bar.set_postfix(self._shown | ({"left": left} if left else {}), refresh=False)
        self._bar.update()
        if step % self._every == 0:
            means = {k: float(np.mean([entry[k] for entry in self._since_last])) for k in figures}
            self._since_last = []
            self._shown = {k: f"{means[k]:.3g}" for k in SHOWN if k in means}
            self._write({"step": step, **counts, **{k: float(f"{v:.7g}") for k, v in means.items()}})

    def validation(self, step: int, errors: dict[str, float], best: bool) -> None:
        """Endpoint errors in px per set, and whether they are the best so far."""
        self._write({"step": step, "validation": {k: round(v, 4) for k, v in errors.items()}, "best": best})
        text = "  ".join(f"{name} {error:.2f}" for name, error in errors.items())
        self._bar.write(f"step {step}  endpoint error, px: {text}{'  (best so far)' if best else ''}", file=sys.stdout)

    def close(self) -> None:
        """End the bar, and close the file."""
        self._bar.close()
        self._file.close()

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")


def main(arguments: list[str] | None = None, began: float | None = None) -> int:
    """Train; returns the exit status. Ctrl-C and SIGTERM end the run after the step, with a checkpoint; twice, at once.

    :param began: when the time of the run began, by ``time.monotonic``; None: now.
    """
    began = time.monotonic() if began is None else began
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    if options.device == "cuda":  # TF32 for what is not in bf16 anyway; newer CPUs would round as well
        torch.set_float32_matmul_precision("high")

    def work() -> int:
        recipe = resolve(options)
        if options.show:
            print(recipe.to_yaml(), end="")
            return 0
        check_device(options.device)
        run = Run(recipe, options.out, options.device)
        found = run.resume()
        start = began - run.kept_seconds()

        def seconds() -> float:
            return time.monotonic() - start

        with run.keeping_seconds(seconds):
            training = Training(options, recipe, run, seconds)
            print(found, flush=True)
            return training.train()

    return exit_status(work)


if __name__ == "__main__":
    raise SystemExit(main(began=STARTED))
