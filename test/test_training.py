# SPDX-License-Identifier: Apache-2.0
"""The trainer: it learns, resumes to the step, branches off a cool-down, and leaves its files whole."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from deq_flow_ros.media.flow_files import write_flow
from deq_flow_ros.model import load_model
from deq_flow_ros.model.correlation import CorrelationPyramid
from training import train
from training.generator import ProceduralGenerator
from training.objective import Objective, matching_loss
from training.pairs import read_pairs

AUTOCAST = torch.autocast("cpu", torch.bfloat16, enabled=False)


@pytest.fixture(scope="module")
def generator() -> ProceduralGenerator:
    return ProceduralGenerator(48, 64, batch_size=1, patterns=4, seed=3)


def options(out: Path, *more: str) -> train.argparse.Namespace:
    return train.parse_arguments(["--out", str(out), "--height", "48", "--width", "64", "--warmup", "1", *more])


def advance(run: train.Run, generator: ProceduralGenerator, steps: int) -> list[float]:
    objective = Objective((2, 3), (1, 2))
    return [run.train_step(generator.batch(run.step), objective, AUTOCAST)["loss"] for _ in range(steps)]


def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path: Path, generator: ProceduralGenerator) -> None:
    """Why: training goes on in pieces; optimizer, average, schedule and all that is random must come back exactly."""
    whole = train.Run(options(tmp_path / "whole"))
    losses = advance(whole, generator, 4)
    first = train.Run(options(tmp_path / "parts"))
    parts = advance(first, generator, 2)
    first.save()
    second = train.Run(options(tmp_path / "parts", "--seed", "0"))
    assert "at step 2" in second.resume()
    parts += advance(second, generator, 2)
    assert parts == losses
    for a, b in zip(whole.ema.state_dict().values(), second.ema.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_it_learns(tmp_path: Path, generator: ProceduralGenerator) -> None:
    """Why: gradients must reach everything: on one clip, seen again and again, the loss has to fall."""
    run = train.Run(options(tmp_path))
    clip, objective = generator.batch(1), Objective((4, 4), (2, 2))
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    losses = [run.train_step(clip, objective, AUTOCAST)["loss"] for _ in range(25)]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    still = [name for name, parameter in run.model.named_parameters() if torch.equal(before[name], parameter)]
    assert not still, still


def test_half_precision_gives_nearly_the_same_step(tmp_path: Path, generator: ProceduralGenerator) -> None:
    """Why: bf16 is the default on GPUs. Flow must stay fp32: bf16 knows 30 px to an eighth of a pixel only."""
    losses = [
        train.Run(options(tmp_path)).train_step(generator.batch(0), Objective((2, 2), (1, 1)), autocast)["loss"]
        for autocast in (AUTOCAST, torch.autocast("cpu", torch.bfloat16))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] != losses[1]


def test_a_cool_down_branches_off(tmp_path: Path, generator: ProceduralGenerator) -> None:
    """Why: the constant-rate checkpoint must stay as it is, so that training can go on from it another day."""
    cooling = train.Run(options(tmp_path, "--steps", "1", "--cooldown", "2"))
    advance(cooling, generator, 1)
    cooling.save()
    constant = (tmp_path / "constant.pt").read_bytes()
    advance(cooling, generator, 1)
    cooling.save()
    assert (tmp_path / "constant.pt").read_bytes() == constant
    resumed = train.Run(options(tmp_path, "--steps", "1", "--cooldown", "2"))
    assert "cooldown.pt at step 2" in resumed.resume()
    onwards = train.Run(options(tmp_path, "--steps", "5"))
    assert "constant.pt at step 1" in onwards.resume()
    rates = [train.learning_rate(options(tmp_path, "--steps", "10", "--cooldown", "4"), s) for s in (0, 9, 10, 12, 14)]
    assert rates == [5e-4, 5e-4, 5e-4, 2.5e-4, 0.0]


def test_a_failing_write_leaves_the_old_checkpoint(
    tmp_path: Path, generator: ProceduralGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why: a disk that fills up at hour ten must not cost the hours before."""
    run = train.Run(options(tmp_path))
    advance(run, generator, 1)
    run.save()

    def full(state: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run.save()
    assert "at step 1" in train.Run(options(tmp_path)).resume()
    assert not list(tmp_path.glob(".*"))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, generator: ProceduralGenerator) -> None:
    """Why: going on would overwrite good weights with NaN."""
    run = train.Run(options(tmp_path))
    clip = generator.batch(0)
    clip.images[:] = torch.nan
    with pytest.raises(FloatingPointError, match="the loss of step 0 is nan"):
        run.train_step(clip, Objective((1, 1), (1, 1)), AUTOCAST)
    assert run.step == 0


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path, generator: ProceduralGenerator) -> None:
    """Why: a finite loss can have an infinite gradient; one step along it and the next checkpoint is NaN."""
    run = train.Run(options(tmp_path))
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    run.model.mask[0].weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(FloatingPointError, match=r"the gradient of step 0 is (inf|nan)"):
        run.train_step(generator.batch(0), Objective((1, 1), (1, 1)), AUTOCAST)
    assert all(torch.equal(before[name], parameter) for name, parameter in run.model.named_parameters())


def test_the_command_trains_validates_and_writes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: the one line that users type, from the procedural clips to weights that load."""
    pairs = tmp_path / "pairs.json"
    _write_pair(pairs)
    arguments = ["--out", str(tmp_path / "run"), "--height", "32", "--width", "48", "--batch", "1", "--steps", "2"]
    arguments += ["--workers", "0", "--cooldown", "1", "--validate", str(pairs), "--validate-every", "2"]
    assert train.main(arguments) == 0
    assert "step 3 of 3" in capsys.readouterr().out
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "validation" in entry] == [2, 3]
    assert set(log[-1]["validation"]) == {"made", "mean"}
    assert (
        load_model(tmp_path / "run" / "model.safetensors").architecture
        == train.Run(options(tmp_path)).model.architecture
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--height", "50"], "--height: expected a multiple of 8, got 50"),
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--size", "giant"], "invalid choice: 'giant'"),
    ],
)
def test_impossible_options_are_refused(
    tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Why: before hours are spent, not after."""
    with pytest.raises(SystemExit):
        options(tmp_path, *more)
    assert message in capsys.readouterr().err


def test_missing_textures_end_the_command_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: a wrong path must not fall back to procedural textures in silence."""
    assert train.main(["--out", str(tmp_path), "--textures", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().out


def test_matching_loss_rewards_the_true_match() -> None:
    """Why: its target must be where the flow points: one cell off is worse, and what is not visible does not count."""
    features = torch.nn.functional.one_hot(torch.arange(48), 48).float().view(1, 6, 8, 48).permute(0, 3, 1, 2) * 60
    correlation = CorrelationPyramid(features, features.roll(1, -1), levels=1, radius=1)
    visible = torch.ones(1, 48, 64, dtype=torch.bool)
    visible[..., -8:] = False  # the content of the last column of cells left the image
    right, wrong = torch.zeros(1, 2, 48, 64), torch.zeros(1, 2, 48, 64)
    right[:, 0] = 8.0
    assert float(matching_loss(correlation, right, visible)) < 0.01
    assert float(matching_loss(correlation, wrong, visible)) > 10
    assert float(matching_loss(correlation, wrong, torch.zeros_like(visible))) == 0


def test_a_list_of_pairs_that_does_not_fit_is_named(tmp_path: Path) -> None:
    """Why: a benchmark on the wrong files gives figures that look real."""
    path = tmp_path / "pairs.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_pairs(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="non-empty array"):
        read_pairs(path)
    path.write_text('[{"name": "a", "image1": "b"}]')
    with pytest.raises(ValueError, match="has no flow, image2"):
        read_pairs(path)
    _write_pair(path)
    (tmp_path / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.png is missing or not an image"):
        read_pairs(path)


def _write_pair(path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(path.parent / name), image)
    write_flow(path.parent / "flow.flo", np.zeros((40, 56, 2), np.float32))
    path.write_text(json.dumps([{"name": "made/1", "image1": "a.png", "image2": "b.png", "flow": "flow.flo"}]))
