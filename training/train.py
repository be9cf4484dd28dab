# SPDX-License-Identifier: Apache-2.0
"""Train a flow model by a recipe: ``python -m training.train --recipe synthetic --for 28m --out runs/nano``.

A recipe (training/recipes/, or a YAML file of yours) says what is trained, on what and how; ``--set`` changes any value
of it. OUT gets ``recipe.yaml`` (the recipe as it was resolved), ``log.jsonl`` and ``tensorboard``, the checkpoints
that a run resumes from to the step, ``model.safetensors`` (averaged weights) and ``best.safetensors`` (those with the
lowest validation error). Started with ``torchrun``, all processes train one model. See docs/training.md.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import signal
import statistics
import sys
import time
from datetime import timedelta
from typing import Any

import torch

from deq_flow_ros.command_line import CommandLine, exit_status, named_path
from deq_flow_ros.model import SIZES
from deq_flow_ros.model.weights import check_device
from training.recipe import Recipe, read_recipe, recipe_names
from training.run import MODEL, Run, Validator
from training.runtime import (
    Log,
    Processes,
    choose_workers,
    joined,
    keep_seconds,
    kept_seconds,
    loading,
    process_age,
    spare_cores,
)
from training.samples import training_samples, transform
from training.settings import parse_change, parse_duration

MEASURED_BATCHES = 4  # made and trained on in turns, at the start of a stage
EXIT_SECONDS = 1.0  # for the end of the workers and of the process
CHECKPOINTS = 20  # of a timed run, at least: a kill costs no more than this part of it


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
    add("--no-tensorboard", action="store_true", help="write log.jsonl only")
    add("--show", action="store_true", help="print the resolved recipe and end")
    return line.parse_args(arguments)


def resolve(options: argparse.Namespace) -> Recipe:
    """The recipe that the command line asks for; errors as ``read_recipe``."""
    roots = {name: str(root) for name, root in options.data}
    flags: dict[str, Any] = {"data": {"roots": roots}} if roots else {}
    if options.textures:
        flags.setdefault("data", {})["textures"] = options.textures
    if options.duration:
        flags["schedule"] = {"seconds": parse_duration(options.duration)}
    if options.init:
        flags["init"] = options.init
    changes = [flags, *(parse_change(text) for text in options.changes)]
    return read_recipe(options.recipe, size=options.size, variant=options.variant, changes=changes)


class Training:
    """One start of a run: the run, its samples and validation, and when to stop.

    :param began: when this start began, by ``time.monotonic``.
    """

    def __init__(
        self, options: argparse.Namespace, recipe: Recipe, processes: Processes, device: torch.device, began: float
    ) -> None:
        self.options, self.recipe, self.processes, self.device = options, recipe, processes, device
        for stage in range(max(1, len(recipe.stages))):
            processes.share(range(recipe.in_stage(stage).data.batch))
        self.run = Run(recipe, options.out, device, processes)
        found = self.run.resume()
        self.samples = training_samples(self.run.recipe)
        self.validator = Validator(recipe, processes)
        self.say(found)
        if self.validator.left_out:
            self.say(f"no validation on {', '.join(self.validator.left_out)}: no --data for it")
        # Of a run that is resumed the folder knows what its last checkpoint does not: a kill comes later than that.
        before = max(self.run.seconds, kept_seconds(options.out)) if self.run.seconds else 0.0
        self.began, self.kept = began - processes.from_first(before), 0.0
        self.workers: int | None = options.workers
        self.validated, self.reached = self.run.step, 0.0
        self.step_seconds, self.validating, self.saving = 0.0, self.run.tail, 0.0
        self.stop: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, _: self.stop.append(received))

    def say(self, text: str) -> None:
        """Print, once however many processes there are."""
        if self.processes.writes:
            print(text, flush=True)

    def seconds(self) -> float:
        """Time of the run up to now, over all its starts; the time in between does not count."""
        return time.monotonic() - self.began

    def keep_seconds(self) -> None:
        """Write the time, at most once a second: a kill loses what was trained, but not the time that it took."""
        if self.processes.writes and self.seconds() >= self.kept + 1:
            self.kept = self.seconds()
            keep_seconds(self.options.out, self.kept)

    def train(self) -> int:
        """To the end, or until a signal; returns the exit status. ``ValueError`` if there is no time for a step."""
        run, recipe, options = self.run, self.recipe, self.options
        timed = recipe.schedule.seconds is not None
        if self.processes.writes:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "recipe.yaml").write_text(recipe.to_yaml())
            self.keep_seconds()
        total = None if timed else recipe.schedule.steps
        log = Log(
            options.out, run.step, total, options.log_every, not options.no_tensorboard, active=self.processes.writes
        )
        try:
            if run.step == 0:
                self.validate(log)
                if timed:
                    self.save()  # from now on, time that is spent counts
            while self.position() < 1:
                self.train_stage(log)
            if timed and run.step == 0 and not self.stop:
                raise ValueError(f"{recipe.schedule.seconds:.0f} s are too short: start and validation use them up")
            if not self.stop and self.validated != run.step:
                self.validate(log)
            self.save()
        finally:
            log.close()
            self.kept = 0.0
            self.keep_seconds()
        of = f" of {total}" if total else ""
        self.say(f"step {run.step}{of}, {run.seconds / 3600:.2f} h in all: {options.out / MODEL}")
        return 128 + self.stop[0] if self.stop else 0

    def train_stage(self, log: Log) -> None:
        """Train to the end of the present stage, of the run, or of the measurement that the workers are chosen by."""
        run, stage = self.run, self.recipe.stage_at(self.position())
        if stage != run.stage:
            run.enter(stage)
            self.samples = training_samples(run.recipe)
            self.workers = self.options.workers
        batch = run.recipe.data.batch
        measured: list[tuple[float, float]] = []
        numbers = (self.processes.share(range(n, n + batch)) for n in itertools.count(run.clips, batch))
        with loading(self.samples, numbers, self.workers or 0) as next_clip:
            clip = None
            while (progress := self.position()) < 1 and self.recipe.stage_at(progress) == stage:
                began = self.seconds()
                if clip is None:
                    clip = next_clip().to(self.device)
                    drawn = self.processes.share(range(run.clips, run.clips + batch))
                    making = self.seconds() - began
                waited = self.seconds() - began
                timed = progress if self.recipe.schedule.seconds is not None else None
                figures = run.train_step(transform(clip, run.use, drawn), timed)
                seconds = self.seconds() - began
                self.step_seconds = 0.9 * (self.step_seconds or seconds) + 0.1 * seconds
                self.after_step(log, figures | {"seconds": seconds, "waiting": waited / seconds})
                if run.use:
                    continue
                clip = None
                measured.append((making, seconds - waited))
                if self.workers is None and len(measured) == MEASURED_BATCHES:
                    self.choose_workers(measured)
                    return

    def choose_workers(self, measured: list[tuple[float, float]]) -> None:
        """Set the number of workers by the seconds that each batch took to make and, once, to train on."""
        making, training = (statistics.median(column) for column in zip(*measured, strict=True))
        training *= self.run.recipe.data.uses
        spare = spare_cores(self.options.threads)
        self.workers = choose_workers(making, training, spare)
        took = f"{making:.2f} s to make and {training:.2f} s to train on"
        self.say(f"{self.workers} workers: a batch takes {took}, and {spare} cores are to spare")

    def position(self) -> float:
        """Share of the run that is done, the same in all processes; 1 at its end, and after a signal."""
        schedule = self.recipe.schedule
        if schedule.seconds is None:
            done = self.run.step / schedule.steps
        else:
            # The last step may end half a step early or late; then come the validation and the files.
            end = schedule.seconds - self.run.tail - self.step_seconds / 2 - EXIT_SECONDS
            done = min(1.0, self.seconds() / end) if end > 0 else 1.0
        # What is reserved for the end changes; a stage that has begun does not go back.
        self.reached = max(self.reached, self.processes.largest(1.0 if self.stop else done, self.device))
        return self.reached

    def after_step(self, log: Log, figures: dict[str, float]) -> None:
        """Log, validate and save as it is time."""
        run, schedule = self.run, self.recipe.schedule
        spent = self.seconds()
        left = "" if schedule.seconds is None else str(timedelta(seconds=round(max(0.0, schedule.seconds - spent))))
        counts = {"clips": run.seen, "samples": run.samples, "stage": run.stage, "elapsed": round(spent, 1)}
        log.step(run.step, figures, counts, left)
        self.keep_seconds()
        if run.step % self.recipe.validation.every == 0:
            self.validate(log)
        every = min(self.options.checkpoint_every, (schedule.seconds or math.inf) / CHECKPOINTS)
        if spent - run.seconds > every:
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
        if self.validator:
            errors, picture = self.validator(self.run.ema)
            log.validation(self.run.step, errors, self.run.keep_best(errors["mean"]), picture)
        self.validating = self.seconds() - began
        self.run.tail = self.validating + self.saving


def main(arguments: list[str] | None = None, age: float = 0.0) -> int:
    """Train; returns the exit status. SIGINT and SIGTERM end the run after the step, with a checkpoint.

    :param age: seconds that have been taken before this call and count as time of the run.
    """
    began = time.monotonic() - age
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
        with joined(options.device) as (processes, device):
            return Training(options, recipe, processes, device, began).train()

    return exit_status(work)


if __name__ == "__main__":
    status = main(age=process_age())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all is written; to take PyTorch apart would take seconds on a busy machine
