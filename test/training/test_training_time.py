# SPDX-License-Identifier: Apache-2.0
"""Timed runs, stages, clips that are used again, and the workers that make them ahead."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import dataset_layouts as layouts
import forked
import numpy as np
import pytest
import tiny_training as tiny
import torch

from training import run as run_module
from training import train
from training.flow_dataset import Clip
from training.recipe import USES
from training.run import SECONDS, Run, Validator
from training.samples import Clips, choose_workers, load_ahead, make_generator, spare_cores, transform
from training.settings import Schedule, parse_duration

STAGES = (
    "stages=[{until: 0.5, data: {batch: 2, uses: 2}}, "
    "{until: 1.0, data: {batch: 1, crop: [40, 48]}, objective: {draw: log-uniform}}]"
)


class Time:
    """A clock that only work moves on: two seconds for each clip of a step, one for each validation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.rates: list[float] = []
        self.killed_at, self.kept = float("inf"), 0.0
        step, validate = Run.train_step, Validator.__call__

        def train_step(run: Run, clip: Clip, progress: float | None = None) -> dict[str, float]:
            if self.now > self.killed_at:
                self.now += 60.0  # a slow step, in the middle of which a SIGKILL would leave what is found now
                time.sleep(0.1)
                self.kept = float((run.out / SECONDS).read_text())
                raise RuntimeError("killed")
            figures = step(run, clip, progress)
            self.now += 2.0 * len(clip.images)
            self.rates.append(figures["rate"])
            return figures

        def validation(*arguments: object) -> object:
            self.now += 1.0
            return validate(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(Run, "train_step", train_step)
        monkeypatch.setattr(Validator, "__call__", validation)
        monkeypatch.setattr(train.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(run_module, "KEEPING_SECONDS", 0.01)


def test_a_killed_and_resumed_run_ends_on_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Why: machines are rented by the hour. Start, validation, files, and what a kill destroyed are in the time; at the
    end the rate has come down, so that the weights are finished whatever the machine did.
    """
    passing = Time(monkeypatch)
    changes = ("data.batch=4", "validation.sets=[{dataset: synthetic, limit: 1}]", "validation.every=4")
    arguments = [*tiny.arguments(tmp_path, *changes), "--for", "140s"]
    passing.killed_at = 1004.0
    assert train.main(arguments, began=passing.now - 2) == 2
    first, before = len(passing.rates), passing.now - 1000 + 2
    assert set(passing.rates) == {3.5e-4} and passing.kept == pytest.approx(before, abs=0.01)
    passing.now, passing.killed_at = 5000.0, float("inf")  # the time in between is not the run's
    assert train.main(arguments, began=passing.now - 2) == 0
    spent = before + passing.now - 5000 + 2
    assert spent == pytest.approx(140 - train.EXIT_SECONDS, abs=1)  # though a step takes eight seconds
    assert len(passing.rates) > first and passing.rates[-1] < 0.15 * passing.rates[0]
    assert np.all(np.diff(passing.rates[first:]) <= 0)
    entries = [entry for entry in tiny.log(tmp_path) if "loss" in entry]
    assert entries[-1]["elapsed"] == pytest.approx(spent - 1, abs=0.1)
    assert tiny.log(tmp_path)[-1]["step"] == entries[-1]["step"]  # the end is validated
    assert float((tmp_path / SECONDS).read_text()) == pytest.approx(spent, abs=0.1)
    assert "the time of the run, 140 s, is over: a longer --for goes on from here" in capsys.readouterr().out


def test_a_time_that_is_too_short_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: weights of step 0 that look like a result."""
    arguments = tiny.arguments(tmp_path)
    assert train.main([*arguments, "--for", "5s"], began=time.monotonic() - 4.5) == 2
    assert "5 s are too short" in capsys.readouterr().out


def test_the_time_is_kept_on_disk(tmp_path: Path) -> None:
    """Why: SIGKILL gives no time to write, and checkpoints are minutes apart. A damaged file must not end a run."""
    run = Run(tiny.recipe(), tmp_path)
    run.seconds = 12.0
    with run.keeping_seconds(lambda: 17.0):
        assert run.kept_seconds() == 17.0
    (tmp_path / SECONDS).write_text("")
    assert run.kept_seconds() == 12.0
    run.seconds, written = 0.0, (tmp_path / SECONDS).write_text("17.0")
    assert written and run.kept_seconds() == 0.0  # of an earlier run in this folder


def test_rates_of_a_time() -> None:
    """Why: warm-up in steps, everything else in shares of the time: a slow machine must reach the end, too."""
    timed = Schedule("trapezoid", seconds=60, rate=1e-3, warmup=10, stable=0.6)
    assert [timed.rate_at(step, p) for step, p in ((0, 0.0), (99, 0.6), (99, 0.8), (99, 1.0))] == pytest.approx(
        [1e-4, 1e-3, 5e-4, 0.0]
    )
    stepped = Schedule("trapezoid", steps=100, rate=1e-3, warmup=10, stable=0.6)
    assert [stepped.rate_at(step) for step in (0, 60, 80, 100)] == pytest.approx([1e-4, 1e-3, 5e-4, 0.0])
    cycle = Schedule("one-cycle", seconds=60, rate=1e-3, rise=0.1)
    assert cycle.rate_at(7, 0.1) == 1e-3 and cycle.rate_at(7, 1.0) < 1e-8


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("28m", 1680), ("1.5h", 5400), ("5", None), ("0m", None)])
def test_times_have_a_unit(text: str, seconds: float | None) -> None:
    """Why: 28 could be seconds or hours."""
    if seconds is not None:
        assert parse_duration(text) == seconds
    else:
        with pytest.raises(ValueError, match=r"expected a time above 0 as 90s, 28m or 1\.5h"):
            parse_duration(text)


def test_stages_and_uses_resume_to_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: a run that is killed between two uses of a clip, or where a stage begins, must go on as if nothing had been:
    five steps of two clips used twice, the last use left out at the end of the stage, then five of one.
    """
    changes = ("schedule.steps=10", STAGES)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(tiny.arguments(whole, *changes)) == 0
    step = Run.train_step

    def killed(run: Run, clip: Clip, progress: float | None = None) -> dict[str, float]:
        if run.step - started == 2:
            raise RuntimeError("killed")
        return step(run, clip, progress)

    monkeypatch.setattr(Run, "train_step", killed)
    for started in range(0, 10, 2):
        status = train.main([*tiny.arguments(parts, *changes), "--checkpoint-every", "0"])
        assert status == (0 if started == 8 else 2)
    assert tiny.losses(parts) == tiny.losses(whole) and len(tiny.losses(whole)) == 10
    counts = [(entry["stage"], entry["clips"], entry["samples"]) for entry in tiny.log(whole)]
    assert counts == [
        (0, 2, 2),
        (0, 2, 4),
        (0, 4, 6),
        (0, 4, 8),
        (0, 6, 10),
        *((1, 6 + n, 10 + n) for n in range(1, 6)),
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """Why: Ctrl-C and a machine that shuts down must cost no step. Whoever insists does not wait for a slow one."""
    step, before, raised = Run.train_step, signal.getsignal(number), 1

    def train_step(run: Run, clip: Clip, progress: float | None = None) -> dict[str, float]:
        for _ in range(raised):
            signal.raise_signal(number)
        return step(run, clip, progress)

    monkeypatch.setattr(Run, "train_step", train_step)
    arguments = tiny.arguments(tmp_path, "schedule.steps=500")
    assert train.main(arguments) == 130 and list(tiny.losses(tmp_path)) == [1]
    assert "at step 1" in Run(tiny.recipe(), tmp_path).resume()
    assert "interrupted: the same command goes on from here" in capsys.readouterr().out
    raised = 2
    assert train.main(arguments) == 130 and list(tiny.losses(tmp_path)) == [1]
    assert signal.getsignal(number) is before


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """Why: machines are taken away without a word. SIGKILL in mid-run, resumed: the same losses, the same weights."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    endless = [*tiny.arguments(killed, "schedule.steps=500"), "--checkpoint-every", "0"]
    process = forked.start(train.main, endless, tmp_path / "log")
    deadline = time.monotonic() + 120
    while not (killed / "trapezoid.pt").is_file():
        assert time.monotonic() < deadline and process.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.01)
    process.kill()
    process.join()
    reached = max(tiny.losses(killed))
    assert reached < 500
    for out in (killed, whole):
        assert train.main(tiny.arguments(out, f"schedule.steps={reached + 1}")) == 0
    assert tiny.losses(killed) == tiny.losses(whole)
    ours, theirs = (torch.load(out / "trapezoid.pt", weights_only=True) for out in (killed, whole))
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part])


def _difference(clip: Clip, i: int) -> float:
    """How far the flow of a clip's first pair misses, in grey levels where it is seen."""
    image1, image2 = (image.permute(1, 2, 0).contiguous().numpy() for image in clip.images[i, :2])
    flow, visible = clip.flow[i, 0].permute(1, 2, 0).contiguous().numpy(), clip.valid[i, 0] & ~clip.occluded[i, 0]
    return layouts.mean_difference(image1, image2, flow, visible.numpy())


def test_a_use_of_a_clip_is_true() -> None:
    """Why: a sign or an axis mixed up would train on wrong flow in half of all steps."""
    recipe = tiny.recipe("data.photometric=false", "data.particle_share=0", "data.crop=[64, 96]")
    clips = Clips(make_generator(recipe, 0))
    numbers = range(6)
    clip = clips[numbers]
    seen = {clip.images[0].numpy().tobytes()}
    for use in range(1, USES):
        again = transform(clip, use)
        seen.add(again.images[0].numpy().tobytes())
        for i in numbers:
            assert _difference(again, i) == pytest.approx(_difference(clip, i), abs=0.3), (use, i)
            images = again.images[i]
            assert torch.equal(images.sum(1).flatten().sort()[0], clip.images[i].sum(1).flatten().sort()[0])
            assert not torch.equal(images.flatten(2).sum((0, 2)), clip.images[i].flatten(2).sum((0, 2)))
        alone = transform(clips[[3]], use)
        assert torch.equal(alone.images[0], again.images[3]) and torch.equal(alone.flow[0], again.flow[3])
    assert len(seen) == USES and transform(clip, 0) is clip


class Slow:
    """Samples that take their time."""

    def __getitem__(self, numbers: Sequence[int]) -> Clip:
        time.sleep(0.1 * len(numbers))
        return Clip(*(torch.tensor(list(numbers)) for _ in range(4)))


def test_workers_end_soon_and_keep_the_order() -> None:
    """Why: what is still to be made ahead would hold up the end of a timed run, and each change of stage."""
    with closing(load_ahead(Slow(), 3, batch=10, workers=2)) as clips:  # type: ignore[arg-type]
        got = [next(clips).images.tolist() for _ in range(3)]
        began = time.monotonic()
    assert got == [list(range(n, n + 10)) for n in (3, 13, 23)]
    assert time.monotonic() - began < 0.5  # the batches in hand take a second
    assert not multiprocessing.active_children()


def test_workers_are_as_many_as_it_takes() -> None:
    """Why: too few let the training wait, too many take memory and, on a CPU, its cores."""
    assert choose_workers(making=1.0, training=0.2, spare=14) == 7
    assert choose_workers(making=1.0, training=0.01, spare=14) == 14
    assert choose_workers(making=0.1, training=3.0, spare=1) == 1
    assert choose_workers(making=1.0, training=0.2, spare=0) == 0


def test_the_number_of_workers_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: without --workers, the start of each stage measures; the samples must be the same whatever it finds."""
    measured: list[tuple[float, float, int]] = []

    def choose(making: float, training: float, spare: int) -> int:
        measured.append((making, training, spare))
        return 1

    monkeypatch.setattr(train, "choose_workers", choose)
    changes = ("schedule.steps=10", "data.uses=2")
    arguments = tiny.arguments(tmp_path / "measured", *changes)
    assert train.main([a for a in arguments if a not in ("--workers", "0")]) == 0
    ((making, training, spare),) = measured
    assert making > 1e-4 and training > 1e-3 and spare == spare_cores(1)
    assert train.main(tiny.arguments(tmp_path / "given", *changes)) == 0
    assert len(measured) == 1
    assert tiny.losses(tmp_path / "measured") == tiny.losses(tmp_path / "given")
