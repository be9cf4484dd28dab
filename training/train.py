# SPDX-License-Identifier: Apache-2.0
"""Train a flow model by a recipe: ``python -m training.train --recipe synthetic --size nano --out runs/nano``.

A recipe (training/recipes/, or a YAML file of yours) says what is trained, on what and how; ``--set`` changes any value
of it. OUT gets ``recipe.yaml`` (the recipe as it was resolved), ``log.jsonl`` and ``tensorboard``, the checkpoints
that a run resumes from to the step, ``model.safetensors`` (averaged weights) and ``best.safetensors`` (those with the
lowest validation error). Started with ``torchrun``, all processes train one model. See docs/training.md.
"""

from __future__ import annotations

import argparse
import signal
import time
from pathlib import Path
from typing import Any

import torch

from deq_flow_ros.media import MediaError
from deq_flow_ros.model import SIZES
from deq_flow_ros.model.weights import check_device
from training.batches import default_workers, load_ahead, training_samples
from training.distributed import Processes, join, leave
from training.logs import Log
from training.recipe import Recipe, RecipeError, parse_change, read_recipe, recipe_names
from training.run import MODEL, Run
from training.validation import Validator

ERRORS = (OSError, ValueError, RuntimeError, MediaError, FloatingPointError)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the run; one that has a checkpoint is resumed")
    add("--recipe", default="synthetic", help=f"{', '.join(recipe_names())}, or a YAML file (default synthetic)")
    add("--size", choices=list(SIZES), help="model size (default: the recipe's)")
    add("--variant", help="of the recipe, as efficient: one-step gradient")
    add("--data", nargs="+", default=[], metavar="NAME=ROOT", help="where data sets lie, see docs/datasets.md; "
        "pairs=LIST.json for a list of pairs")  # fmt: skip
    add("--textures", help="folder of photographs for the generator; without one its textures are procedural")
    add(
        "--init", metavar="WEIGHTS", help="weights to start a new run from: a name or path, as of a released checkpoint"
    )
    add("--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", dest="changes",
        help="change any value of the recipe, as schedule.steps=1000 data.batch=2")  # fmt: skip
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--threads", type=int, default=1, help="threads of PyTorch on the CPU (default 1)")
    add("--workers", type=int, help="processes that make samples ahead (default: by data and machine)")
    add("--checkpoint-every", type=float, default=120, metavar="SECONDS")
    add("--log-every", type=int, default=50, metavar="STEPS")
    add("--no-tensorboard", action="store_true", help="write log.jsonl only")
    add("--show", action="store_true", help="print the resolved recipe and end")
    options = parser.parse_args(arguments)
    for name, least in (("threads", 1), ("log_every", 1), ("workers", 0), ("checkpoint_every", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    return options


def resolve(options: argparse.Namespace) -> Recipe:
    """The recipe that the command line asks for.

    :raises ValueError: for what is wrong with it.
    :raises FileNotFoundError: if there is no such recipe.
    """
    roots = dict(text.partition("=")[::2] for text in options.data)
    if not all(roots.values()):
        raise RecipeError(f"--data: expected NAME=ROOT, got {' '.join(options.data)}")
    flags: dict[str, Any] = {"data": {"roots": roots}} if roots else {}
    if options.textures:
        flags.setdefault("data", {})["textures"] = options.textures
    if options.init:
        flags["init"] = options.init
    changes = [flags, *(parse_change(text) for text in options.changes)]
    return read_recipe(options.recipe, size=options.size, variant=options.variant, changes=changes)


class Training:
    """One start of a run: the run, its samples and validation, and when to stop."""

    def __init__(self, options: argparse.Namespace, recipe: Recipe, processes: Processes, device: torch.device) -> None:
        self.options, self.recipe, self.processes, self.device = options, recipe, processes, device
        processes.share(range(recipe.data.batch))
        self.samples = training_samples(recipe, device)
        self.validator = Validator(recipe, processes)
        self.run = Run(recipe, options.out, device, processes)
        self.say(self.run.resume())
        if self.validator.left_out:
            self.say(f"no validation on {', '.join(self.validator.left_out)}: no --data for it")
        self.stop: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, _: self.stop.append(received))

    def say(self, text: str) -> None:
        """Print, once however many processes there are."""
        if self.processes.writes:
            print(text, flush=True)

    def train(self) -> int:
        """To the last step, or until a signal; returns the exit status."""
        run, recipe, options = self.run, self.recipe, self.options
        total, batch = recipe.schedule.total, recipe.data.batch
        if self.processes.writes:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "recipe.yaml").write_text(recipe.to_yaml())
        log = Log(
            options.out, run.step, total, options.log_every, not options.no_tensorboard, active=self.processes.writes
        )
        workers = default_workers(recipe, self.device) if options.workers is None else options.workers
        firsts = range(run.samples, run.samples + (total - run.step) * batch, batch)
        clips = load_ahead(self.samples, [self.processes.share(range(n, n + batch)) for n in firsts], workers)
        saved = time.monotonic()
        try:
            if run.step == 0:
                self.validate(log)
            while run.step < total and not self.processes.any(bool(self.stop), self.device):
                began = time.perf_counter()
                clip = next(clips)
                waited = time.perf_counter() - began
                figures = run.train_step(clip.to(self.device))
                seconds = time.perf_counter() - began
                run.seconds += seconds
                log.step(run.step, figures | {"seconds": seconds, "waiting": waited / seconds})
                if run.step % recipe.validation.every == 0 or run.step == total:
                    self.validate(log)
                if run.step == recipe.schedule.steps or time.monotonic() - saved > options.checkpoint_every:
                    run.save()
                    saved = time.monotonic()
            run.save()
        finally:
            log.close()
        self.say(f"step {run.step} of {total}, {run.seconds / 3600:.2f} h in all: {options.out / MODEL}")
        return 128 + self.stop[0] if self.stop else 0

    def validate(self, log: Log) -> None:
        """Measure the averaged weights, and keep them if they are the best."""
        if self.validator:
            errors, picture = self.validator(self.run.ema)
            log.validation(self.run.step, errors, self.run.keep_best(errors["mean"]), picture)


def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit status. SIGINT and SIGTERM end the run after the step, with a checkpoint."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    try:
        recipe = resolve(options)
        if options.show:
            print(recipe.to_yaml(), end="")
            return 0
        check_device(options.device)
        processes, device = join(options.device)
    except ERRORS as error:
        print(f"error: {error}")
        return 2
    try:
        training = Training(options, recipe, processes, device)
        return training.train()
    except ERRORS as error:
        print(f"error: {error}", flush=True)
        return 2
    finally:
        leave()


if __name__ == "__main__":
    raise SystemExit(main())
