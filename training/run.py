# SPDX-License-Identifier: Apache-2.0
"""The state of a training run, its steps, its files, and what it is validated on."""

from __future__ import annotations

import dataclasses
import io
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deq_flow_ros.host import replacing
from deq_flow_ros.model import Architecture, DEQFlow, load_model, save_model
from deq_flow_ros.model.weights import replace_file
from training.evaluate import group_means, model_flow, pair_error
from training.flow_dataset import Clip, FlowDataset, Sample
from training.generator import HELD_OUT_SEED
from training.objective import Objective, UncertaintyLoss
from training.recipe import SYNTHETIC, Recipe
from training.samples import make_generator, open_source
from training.settings import SCHEDULES

COUNTS = ("step", "samples", "clips", "use", "stage", "seconds", "tail", "best")  # of ``Run``, kept in checkpoints
MODEL, BEST, SECONDS = "model.safetensors", "best.safetensors", "seconds.txt"
KEEPING_SECONDS = 1.0  # from one writing of the time to the next


def write_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; a crash or full disk leaves the old one whole. ``OSError`` if it cannot be written."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    replace_file(path, buffer.getbuffer())


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

    def __init__(self, recipe: Recipe, out: Path, device: torch.device | str = "cpu") -> None:
        self._whole, self.recipe, self.out, self.device = recipe, recipe.in_stage(0), out, torch.device(device)
        self.checkpoint = self._checkpoint_of(recipe.schedule.kind)
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

    def _checkpoint_of(self, schedule: str) -> Path:
        return self.out / f"{schedule.replace('-', '_')}.pt"

    def resume(self) -> str:
        """Load the checkpoint of this run, if there is one; says what it did.

        :raises ValueError: if it is damaged, of another schedule or architecture, or beyond the last step.
        """
        schedule, path = self.recipe.schedule, self.checkpoint
        if not path.is_file():
            if other := next((name for name in map(self._checkpoint_of, SCHEDULES) if name.is_file()), None):
                raise ValueError(
                    f"{other} is of another schedule than {schedule.kind}, with which it cannot go on; "
                    f"give another --out, and --init {self.out / MODEL} to start from its weights"
                )
            return f"new run in {self.out}"
        state = read_checkpoint(path)
        if Architecture.from_dict(state["architecture"]) != self.model.architecture:
            raise ValueError(f"{path} holds a model of another architecture than the recipe's, {self.recipe.model}")
        if schedule.seconds is None and state["step"] > schedule.steps:
            raise ValueError(f"{path} is at step {state['step']}, beyond schedule.steps={schedule.steps}: raise it")
        for name in ("model", "ema", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        for name in COUNTS:
            setattr(self, name, state[name])
        self.stage = min(self.stage, max(len(self._whole.stages) - 1, 0))
        self.recipe = self._whole.in_stage(self.stage)
        self.use %= self.recipe.data.uses  # which may be fewer now
        return f"resumed from {path} at step {self.step}"

    def save(self) -> None:
        """Write the checkpoint of the present step, and the averaged weights."""
        state: dict[str, Any] = {name: getattr(self, name) for name in COUNTS}
        state |= {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer")}
        write_checkpoint(state | {"architecture": dataclasses.asdict(self.model.architecture)}, self.checkpoint)
        save_model(self.ema, self.out / MODEL, {"step": str(self.step)})

    @contextmanager
    def keeping_seconds(self, seconds: Callable[[], float]) -> Iterator[None]:
        """Within it, how long the run has taken is written once a second, whatever the run does meanwhile.

        For a kill: until then the run has taken longer than its last checkpoint says.
        """

        def write() -> None:
            if not self.seconds:
                return  # without a checkpoint, a run that is killed begins anew
            with suppress(OSError), replacing(self.out / SECONDS, flush=False) as temporary:
                temporary.write_text(f"{seconds():.2f}\n")  # a full disk is for the next checkpoint to report

        def keep() -> None:
            while not ended.wait(KEEPING_SECONDS):
                write()

        ended, thread = threading.Event(), threading.Thread(target=keep, daemon=True)
        write()
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            write()

    def kept_seconds(self) -> float:
        """The time that was last written, or that of the checkpoint if it is later; 0 if there is no checkpoint."""
        try:
            return max(self.seconds, float((self.out / SECONDS).read_text())) if self.seconds else 0.0
        except (OSError, ValueError):
            return self.seconds

    @property
    def seen(self) -> int:
        """Different clips trained on so far."""
        return self.clips + (self.recipe.data.batch if self.use else 0)

    def enter(self, stage: int) -> None:
        """Go on in this stage of the recipe; the batch in use is left behind."""
        self.clips, self.use = self.seen, 0
        self.stage, self.recipe = stage, self._whole.in_stage(stage)

    def keep_best(self, error: float) -> bool:
        """Keep the averaged weights as the best if the validation error, px, is the lowest so far."""
        if self.best is not None and error >= self.best:
            return False
        self.best = error
        save_model(self.ema, self.out / BEST, {"step": str(self.step), "validation_epe_px": f"{error:.4f}"})
        return True

    def train_step(self, clip: Clip, progress: float | None = None) -> dict[str, float]:
        """One step on a batch; everything random is a function of the seed and the step.

        :param progress: share of the time that has passed, for a timed schedule.
        :returns: the figures to log.
        :raises FloatingPointError: if loss or gradient are not finite; nothing is changed then.
        """
        recipe, clip = self.recipe, clip.to(self.device)
        rate = recipe.schedule.rate_at(self.step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rng = np.random.default_rng([recipe.seed, self.step])
        torch.manual_seed(int(np.random.default_rng([recipe.seed, self.step, 0]).integers(2**62)))
        with self._autocast:
            loss, measured = self._loss(recipe.objective, self.model, clip, rng)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.optimization.clip)
        for name, value in (("loss", loss), ("gradient", norm)):
            if not torch.isfinite(value):
                raise FloatingPointError(
                    f"the {name} of step {self.step} is {value.item()}; the last checkpoint is untouched. A lower "
                    "schedule.rate helps"
                )
        self.optimizer.step()
        self.step += 1
        self.samples += len(clip.images)
        self.use += 1
        if self.use >= recipe.data.uses:
            self.clips, self.use = self.seen, 0
        self._update_average()
        return {"rate": rate, **{n: v.item() for n, v in {"gradient": norm, "loss": loss, **measured}.items()}}

    @torch.no_grad()
    def _update_average(self) -> None:
        # The average starts from what is learnt, not from the random start.
        decay = min(self.recipe.optimization.ema, (1 + self.step) / (10 + self.step))
        for average, value in zip(self.ema.state_dict().values(), self.model.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)


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
            f"match it.\nexpected {expected}\ngot      {model.architecture}"
        )
    initial = DEQFlow(found)
    flow = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("uncertainty.")}
    initial.load_state_dict(initial.state_dict() | flow)
    return initial


class Validator:
    """The pairs on which a model is validated while it trains.

    :ivar sets: data sets or generated pairs, with the indices of those to validate on.
    :ivar left_out: the sets of the recipe that nobody gave a folder for.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._settings = recipe.validation
        self.left_out: list[str] = []
        self.sets: list[tuple[FlowDataset | list[Sample], Sequence[int]]] = []
        for source in recipe.validation.sets:
            if source.dataset == SYNTHETIC:
                generator, numbers = make_generator(recipe, recipe.seed + HELD_OUT_SEED), range(source.limit or 16)
                self.sets.append(([generator.pairs(SYNTHETIC, number)[0] for number in numbers], numbers))
            elif recipe.root(source.dataset) is None:
                self.left_out.append(source.dataset)
            else:
                for dataset in open_source(recipe, source):
                    count = min(source.limit or len(dataset), len(dataset))
                    self.sets.append((dataset, [i * len(dataset) // count for i in range(count)]))

    def __call__(self, model: DEQFlow) -> dict[str, float]:
        """Mean endpoint error in px per set, and their mean as ``mean``."""
        flow = model_flow(model, self._settings.iterations, self._settings.coarse_levels)
        pairs = (dataset[index] for dataset, indices in self.sets for index in indices)
        return group_means((pair.name, pair_error(pair, flow(pair.image1, pair.image2))) for pair in pairs)
