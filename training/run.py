# SPDX-License-Identifier: Apache-2.0
"""The state of a training run, its steps, its files, and what it is validated on."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deq_flow_ros.imaging.pictures import error_strip
from deq_flow_ros.model import Architecture, DEQFlow, load_model, save_model
from deq_flow_ros.model.weights import replace_file
from training.datasets import Sample
from training.generator import HELD_OUT_SEED, ProceduralGenerator
from training.objective import Objective
from training.pairs import clip_pairs, group_means, model_flow, pair_errors
from training.recipe import SYNTHETIC, Recipe
from training.rendering import Clip
from training.runtime import Processes
from training.samples import make_generator, open_source
from training.uncertainty import UncertaintyLoss

COUNTS = ("step", "samples", "clips", "use", "stage", "seconds", "tail", "best")
"""What ``Run`` counts, and a checkpoint has beside the tensors."""


def write_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; a crash or full disk leaves the old one whole. ``OSError`` if it cannot be written."""

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            torch.save(state, file)

    replace_file(path, write)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What ``Run.save`` wrote, tensors on the CPU; ``ValueError`` if the file is not such."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a complete training checkpoint: {str(error).splitlines()[0]}") from error
    needed = {*COUNTS, "model", "ema", "optimizer", "architecture"}
    if missing := needed - set(state) if isinstance(state, dict) else needed:
        raise ValueError(f"{path} is not a training checkpoint of this version: it has no {', '.join(sorted(missing))}")
    return state


MODEL, BEST = "model.safetensors", "best.safetensors"


class Run:
    """Model, averaged weights, optimizer and step of one training run, with their files.

    :ivar recipe: the recipe of the run, in its present stage.
    :ivar clips, use: number of the first clip, or pair, of the next batch; how often that batch was used before.
    :ivar samples: clips trained on so far, each counted as often as it was used.
    :ivar stage: of the recipe, as an index.
    :ivar seconds: time of the run up to the last checkpoint.
    :ivar tail: seconds that the last validation and the last checkpoint took.
    :ivar best: lowest validation error so far, px; None before the first.
    """

    def __init__(
        self, recipe: Recipe, out: Path, device: torch.device | str = "cpu", processes: Processes | None = None
    ) -> None:
        self._whole, self.recipe, self.out = recipe, recipe.in_stage(0), out
        self.device, self.processes = torch.device(device), processes or Processes()
        torch.manual_seed(recipe.seed)
        self.model = initial_model(recipe).to(self.device).requires_grad_(not recipe.model.uncertainty).train()
        if self.model.uncertainty is not None:
            self.model.uncertainty.requires_grad_(True)
        if recipe.optimization.freeze_batch_norm or recipe.model.uncertainty:
            for module in self.model.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()
        self.ema = DEQFlow(self.model.architecture).to(self.device).eval().requires_grad_(False)
        self.ema.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), recipe.schedule.rate, weight_decay=recipe.optimization.weight_decay
        )
        self._loss = UncertaintyLoss() if recipe.model.uncertainty else Objective.loss
        bf16 = recipe.optimization.precision in (("bf16", "auto") if self.device.type == "cuda" else ("bf16",))
        self._autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        self.step = self.samples = self.clips = self.use = self.stage = 0
        self.seconds = self.tail = 0.0
        self.best: float | None = None

    def resume(self) -> str:
        """Load the checkpoint of this run, if there is one; says what it did.

        :raises ValueError: if it is damaged, of another schedule or architecture, or beyond the last step.
        """
        schedule = self.recipe.schedule
        path = self.out / schedule.checkpoint_name
        state = self.processes.from_first(self._read(path) if self.processes.writes else None)
        if state is None:
            return f"new run in {self.out}"
        if Architecture.from_dict(state["architecture"]) != self.model.architecture:
            raise ValueError(f"{path} holds a model of another architecture than the recipe's, {self.recipe.model}")
        if schedule.seconds is None and state["step"] > schedule.steps:
            raise ValueError(f"{path} is at step {state['step']}, beyond schedule.steps={schedule.steps}: raise it")
        self.stage = min(state["stage"], max(len(self._whole.stages) - 1, 0))
        self.recipe = self._whole.in_stage(self.stage)
        for name in ("model", "ema", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        for name in set(COUNTS) - {"stage"}:
            setattr(self, name, state[name])
        self.use %= self.recipe.data.uses  # which may be fewer now
        return f"resumed from {path} at step {self.step}"

    def _read(self, path: Path) -> dict[str, Any] | None:
        if path.is_file():
            return read_checkpoint(path)
        for other in (self.out / name for name in ("trapezoid.pt", "one_cycle.pt", "constant.pt", "cooldown.pt")):
            if other.is_file():
                raise ValueError(
                    f"{other} is of another schedule than {self.recipe.schedule.kind}, with which it cannot go on; "
                    f"give another --out, and --init {self.out / MODEL} to start from its weights"
                )
        return None

    def save(self) -> None:
        """Write the checkpoint of the present step, and the averaged weights; in rank 0 alone."""
        if not self.processes.writes:
            return
        state: dict[str, Any] = {name: getattr(self, name) for name in COUNTS}
        state |= {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer")}
        state["architecture"] = self.model.architecture.to_dict()
        write_checkpoint(state, self.out / self.recipe.schedule.checkpoint_name)
        save_model(self.ema, self.out / MODEL, {"step": str(self.step)})

    @property
    def seen(self) -> int:
        """Different clips trained on so far."""
        return self.clips + (self.recipe.data.batch if self.use else 0)

    def enter(self, stage: int) -> None:
        """Go on in this stage of the recipe; the batch in use is left behind."""
        if stage != self.stage:
            self.clips, self.use = self.seen, 0
            self.stage, self.recipe = stage, self._whole.in_stage(stage)

    def keep_best(self, error: float) -> bool:
        """Keep the averaged weights as the best if the validation error, px, is the lowest so far."""
        if self.best is not None and error >= self.best:
            return False
        self.best = error
        if self.processes.writes:
            metadata = {"step": str(self.step), "validation_epe_px": f"{error:.4f}"}
            save_model(self.ema, self.out / BEST, metadata)
        return True

    def train_step(self, clip: Clip, progress: float | None = None) -> dict[str, float]:
        """One step on this process's share of the batch; everything random is a function of the seed and the step.

        :param progress: share of the time that has passed, for a timed schedule.
        :returns: the figures to log, means over all processes.
        :raises FloatingPointError: if loss or gradient are not finite; nothing is changed then, and the clip is saved.
        """
        recipe, clip = self.recipe, clip.to(self.device)
        rate = recipe.schedule.rate_at(self.step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(int(np.random.default_rng([recipe.seed, self.step, self.processes.rank]).integers(2**62)))
        with self._autocast:
            rng = np.random.default_rng([recipe.seed, self.step])
            loss, measured = self._loss(recipe.objective, self.model, clip, rng)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        figures = {name: value.detach().float() for name, value in {"loss": loss, **measured}.items()}
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        # Batch statistics are each process's own; what is stored of them is their mean.
        statistics = [b for b in self.model.buffers() if b.is_floating_point()]
        self.processes.average([*gradients, *statistics, *figures.values()])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.optimization.clip)
        for name, value in (("loss", figures["loss"]), ("gradient", norm)):
            if not torch.isfinite(value):
                raise FloatingPointError(
                    f"the {name} of step {self.step} is {value.item()}; the last checkpoint is untouched, and the "
                    f"batch is in {self._save_batch(clip)}. A lower schedule.rate helps"
                )
        self.optimizer.step()
        self.step += 1
        self.samples += recipe.data.batch
        self.use += 1
        if self.use >= recipe.data.uses:
            self.clips, self.use = self.seen, 0
        self._update_average()
        return {"rate": rate, "gradient": float(norm), **{name: float(value) for name, value in figures.items()}}

    def _update_average(self) -> None:
        # The average starts from what is learnt, not from the random start.
        decay = min(self.recipe.optimization.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for average, value in zip(self.ema.state_dict().values(), self.model.state_dict().values(), strict=True):
                if average.is_floating_point():
                    average.lerp_(value, 1 - decay)
                else:
                    average.copy_(value)

    def _save_batch(self, clip: Clip) -> Path:
        path = self.out / f"not_finite_step_{self.step}_rank_{self.processes.rank}.pt"
        self.out.mkdir(parents=True, exist_ok=True)  # of another machine than that of rank 0
        write_checkpoint({"step": self.step, "model": self.model.state_dict(), **vars(clip.to("cpu"))}, path)
        return path


def initial_model(recipe: Recipe) -> DEQFlow:
    """A model with random weights, or with those of ``recipe.init``.

    A head for the uncertainty starts anew, or is left out where the flow is trained: it knows the errors of one flow.

    :raises ValueError: if the weights are of another architecture than the recipe's.
    """
    expected = recipe.model.architecture
    if recipe.init is None:
        return DEQFlow(expected)
    model = load_model(recipe.init, fold=False)
    # Released checkpoints of one size differ in the width of the flow head: there, the weights decide.
    found = dataclasses.replace(model.architecture, uncertainty_dim=expected.uncertainty_dim)
    if dataclasses.replace(found, flow_head_dim=expected.flow_head_dim) != expected:
        raise ValueError(
            f"{recipe.init} does not fit the recipe's model. Choose --size, model.update and model.weight_norm to "
            "match it.\n"
            f"expected {expected}\ngot      {model.architecture}"
        )
    initial = DEQFlow(found)
    flow = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("uncertainty.")}
    initial.load_state_dict(initial.state_dict() | flow)
    return initial


def _generated(generator: ProceduralGenerator, number: int) -> Sample:
    return clip_pairs(f"{SYNTHETIC}/{number}", generator.clips([number]))[0]


class Validator:
    """The pairs on which a model is validated while it trains, shared among the processes.

    :ivar left_out: the sets of the recipe that nobody gave a folder for.
    """

    def __init__(self, recipe: Recipe, processes: Processes) -> None:
        self._settings, self._processes = recipe.validation, processes
        self.left_out: list[str] = []
        self._pairs: list[Callable[[], Sample]] = []
        for source in recipe.validation.sets:
            if source.dataset == SYNTHETIC:
                generator = make_generator(recipe, recipe.seed + HELD_OUT_SEED)
                self._pairs += [partial(_generated, generator, number) for number in range(source.limit or 16)]
            elif recipe.root(source.dataset) is None:
                self.left_out.append(source.dataset)
            else:
                for dataset in open_source(recipe, source):
                    count = min(source.limit or len(dataset), len(dataset))
                    indices = (i * len(dataset) // count for i in range(count))
                    self._pairs += [partial(dataset.__getitem__, index) for index in indices]

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def __call__(self, model: DEQFlow) -> tuple[dict[str, float], np.ndarray | None]:
        """Mean endpoint error in px per set, and their mean as ``mean``; and a picture of the first pair, in rank 0."""
        function = model_flow(model, self._settings.iterations, self._settings.coarse_levels)
        measured, picture = [], None
        for number in range(self._processes.rank, len(self._pairs), self._processes.count):
            pair = self._pairs[number]()
            flow = function(pair.image1, pair.image2)
            measured.append((number, pair.name, pair_errors(pair, flow)[0]))
            if number == 0 and pair.flow is not None:
                picture = error_strip(pair.image1, pair.flow, pair.valid, flow)
        everything = sorted(entry for part in self._processes.gather(measured) for entry in part)
        return group_means((name, error) for _, name, error in everything), picture
