# SPDX-License-Identifier: Apache-2.0
"""Train on the procedural generator: ``python -m training.train --out runs/nano --textures FOLDER``.

The rate is constant after a short warm-up. ``--cooldown N`` branches off: N steps of falling rate from the newest
constant-rate checkpoint, which itself stays as it is. So a run can be continued any number of times, with other
settings for the data if need be, and cooled down whenever weights are wanted.

OUT holds ``constant.pt`` and ``cooldown.pt`` (all that is needed to resume to the step), ``model.safetensors``
(averaged weights, for ``load_model``) and ``log.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from deq_flow_ros.model import SIZES, Architecture, DEQFlow, save_model
from deq_flow_ros.model.weights import check_device
from training.checkpoint import read_checkpoint, write_checkpoint
from training.generator import ProceduralGenerator
from training.objective import Objective, iteration_range
from training.pairs import group_means, model_flow, pair_errors, read_pairs
from training.rendering import Clip


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the run; one that has a checkpoint is resumed")
    add("--size", default="nano", choices=sorted(SIZES), help="model size (default nano)")
    add("--steps", type=int, default=20_000, help="constant-rate steps in all (default 20000)")
    add("--cooldown", type=int, default=0, metavar="N", help="then N steps with the rate falling to zero")
    add("--textures", type=Path, help="folder of photographs; without one all textures are procedural")
    add("--height", type=int, default=128, help="height of the clips, px, a multiple of 8")
    add("--width", type=int, default=192, help="width of the clips, px, a multiple of 8")
    add("--batch", type=int, default=4, help="clips per step")
    add("--frames", type=int, default=3, help="frames per clip; from the third on, pairs start warm")
    add("--max-displacement", type=float, help="px; default a quarter of the width")
    add("--cold-iterations", type=int, nargs=2, default=(6, 10), metavar=("LEAST", "MOST"))
    add("--warm-iterations", type=int, nargs=2, default=(2, 6), metavar=("LEAST", "MOST"))
    add("--gradient-steps", type=int, default=1, help="k of the phantom gradient (default 1)")
    add("--rate", type=float, default=5e-4, help="learning rate (default 5e-4)")
    add("--warmup", type=int, default=200, help="steps of rising rate at the start of the run (default 200)")
    add("--weight-decay", type=float, default=1e-4)
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (default 1)")
    add("--ema", type=float, default=0.999, help="decay of the averaged weights per step (default 0.999)")
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=1, help="threads of PyTorch on the CPU (default 1)")
    add("--workers", type=int, help="processes that generate clips ahead; default 1 on the CPU, 0 on CUDA (made there)")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"),
        help="auto: bf16 on CUDA, fp32 on a CPU (five times slower in bf16 without instructions for it)")  # fmt: skip
    add("--validate", type=Path, metavar="PAIRS_JSON", help="pairs to validate on while training")
    add("--validate-every", type=int, default=1000, metavar="STEPS")
    add("--checkpoint-every", type=float, default=120, metavar="SECONDS")
    options = parser.parse_args(arguments)
    for name in ("steps", "batch", "gradient_steps", "threads", "validate_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    for name in ("height", "width"):
        if getattr(options, name) % 8:
            parser.error(f"--{name}: expected a multiple of 8, got {getattr(options, name)}")
    return options


def learning_rate(options: argparse.Namespace, step: int) -> float:
    """Rate of the step that begins at ``step``: rising, constant, falling."""
    if step >= options.steps:
        return options.rate * max(0.0, 1 - (step - options.steps) / max(options.cooldown, 1))
    return options.rate * min(1.0, (step + 1) / max(options.warmup, 1))


def _leave_signals_to_the_parent(_: int) -> None:
    """A signal to the process group must not take the clip away that the last step waits for."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Clips(Dataset[Clip]):
    """The clips of the steps, for a ``DataLoader`` to make ahead in a process of its own."""

    def __init__(self, generator: ProceduralGenerator) -> None:
        self._generator = generator

    def __getitem__(self, index: int) -> Clip:
        return self._generator.batch(index)

    def loader(self, first: int, last: int, workers: int) -> DataLoader[Clip]:
        """Clips ``first`` to ``last - 1``, in order."""
        return DataLoader(
            self,
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            worker_init_fn=_leave_signals_to_the_parent,
        )


class Run:
    """Model, averaged weights, optimizer and step of one training run, with their files."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = check_device(options.device)
        torch.manual_seed(options.seed)
        self.model = DEQFlow(options.size).to(self.device).train()
        self.ema = DEQFlow(options.size).to(self.device).eval().requires_grad_(False)
        self.ema.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), options.rate, weight_decay=options.weight_decay)
        self.step = 0
        self.seconds = 0.0
        self.constant, self.cooldown = options.out / "constant.pt", options.out / "cooldown.pt"

    def resume(self) -> str:
        """Load the newest checkpoint that lies on this run's path; says what it did."""
        path = self.constant
        if self.options.cooldown and self.cooldown.is_file():
            state = read_checkpoint(self.cooldown, self.device)
            if state["steps"] == self.options.steps and state["cooldown"] == self.options.cooldown:
                path = self.cooldown
        if not path.is_file():
            return f"new run in {self.options.out}"
        state = read_checkpoint(path, self.device)
        if Architecture.from_dict(state["architecture"]) != self.model.architecture:
            raise ValueError(f"{path} holds a model of another size than --size {self.options.size}")
        if path == self.constant and state["step"] > self.options.steps:
            raise ValueError(f"{path} is at step {state['step']}, beyond --steps {self.options.steps}: raise it")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        return f"resumed from {path} at step {self.step}"

    def save(self) -> None:
        """Write the checkpoint of the present step; constant-rate and cool-down steps have files of their own."""
        state: dict[str, Any] = {
            "step": self.step, "seconds": self.seconds, "steps": self.options.steps, "cooldown": self.options.cooldown,
            "model": self.model.state_dict(), "ema": self.ema.state_dict(), "optimizer": self.optimizer.state_dict(),
            "architecture": self.model.architecture.to_dict(),
        }  # fmt: skip
        write_checkpoint(state, self.constant if self.step <= self.options.steps else self.cooldown)
        save_model(self.ema, self.options.out / "model.safetensors", {"step": str(self.step)})

    def train_step(self, clip: Clip, objective: Objective, autocast: torch.autocast) -> dict[str, float]:
        """One step on the clip that belongs to it; everything random is a function of the seed and the step."""
        rate = learning_rate(self.options, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with autocast:
            loss, measured = objective.loss(self.model, clip, np.random.default_rng([self.options.seed, self.step]))
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {self.step} is {loss.item()}; the last checkpoint is untouched. A lower --rate helps"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of step {self.step} is {norm.item()}; the last checkpoint is untouched. "
                "A lower --rate helps"
            )
        self.optimizer.step()
        self.step += 1
        # The average starts from what is learnt, not from the random start.
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for average, value in zip(self.ema.state_dict().values(), self.model.state_dict().values(), strict=True):
                if average.is_floating_point():
                    average.lerp_(value, 1 - decay)
                else:
                    average.copy_(value)
        return {
            "loss": float(loss.detach()), "gradient": float(norm), "rate": rate,
            **{k: float(v) for k, v in measured.items()},
        }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit status. SIGINT and SIGTERM end the run after the step, with a checkpoint."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    try:
        run = Run(options)
        print(run.resume(), flush=True)
        generator = ProceduralGenerator(
            options.height, options.width, batch_size=options.batch, frames=options.frames, textures=options.textures,
            device=run.device, seed=options.seed, max_displacement_px=options.max_displacement,
        )  # fmt: skip
        objective = Objective(
            iteration_range(options.cold_iterations), iteration_range(options.warm_iterations), options.gradient_steps
        )
        pairs = read_pairs(options.validate) if options.validate else []
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}")
        return 2
    workers = options.workers if options.workers is not None else int(run.device.type == "cpu")
    bf16 = options.precision == "bf16" or (options.precision == "auto" and run.device.type == "cuda")
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: stop.append(received))
    total, saved = options.steps + options.cooldown, time.monotonic()
    means: dict[str, float] = {}
    options.out.mkdir(parents=True, exist_ok=True)
    with (
        (options.out / "log.jsonl").open("a") as log,
        tqdm(total=total, initial=run.step, unit="step", mininterval=2, dynamic_ncols=True) as bar,
    ):
        clips = iter(Clips(generator).loader(run.step, total, workers))
        while run.step < total and not stop:
            began = time.perf_counter()
            clip = next(clips)
            generated = time.perf_counter()
            entry = run.train_step(clip, objective, torch.autocast(run.device.type, torch.bfloat16, enabled=bf16))
            seconds = time.perf_counter() - began
            run.seconds += seconds
            entry |= {"seconds": seconds, "waiting": (generated - began) / seconds}
            means = {k: v + 0.98 * (means.get(k, v) - v) for k, v in entry.items()}
            bar.update()
            bar.set_postfix(
                {k: f"{means[k]:.3g}" for k in ("epe_cold", "epe_warm", "matching") if k in means}, refresh=False
            )
            if run.step % 50 == 0:
                _log(log, {"step": run.step, **{k: round(v, 5) for k, v in means.items()}})
            if run.step == options.steps or time.monotonic() - saved > options.checkpoint_every:
                run.save()
                saved = time.monotonic()
            if pairs and (run.step % options.validate_every == 0 or run.step == total):
                function = model_flow(run.ema, iterations=12, coarse_levels=2)
                result = group_means((pair, pair_errors(pair, function(pair.image1, pair.image2))[0]) for pair in pairs)
                _log(log, {"step": run.step, "validation": {k: round(v, 3) for k, v in result.items()}})
                bar.write("  ".join([f"step {run.step}", *(f"{k} {v:.2f}" for k, v in result.items())]))
    run.save()
    print(f"step {run.step} of {total}, {run.seconds / 3600:.2f} h in all: {options.out / 'model.safetensors'}")
    return 128 + stop[0] if stop else 0


def _log(file: Any, entry: dict[str, Any]) -> None:
    if any(isinstance(v, float) and not math.isfinite(v) for v in entry.values()):
        raise FloatingPointError(f"not a finite figure in the log: {entry}")
    file.write(json.dumps(entry) + "\n")
    file.flush()


if __name__ == "__main__":
    raise SystemExit(main())
