# SPDX-License-Identifier: Apache-2.0
"""The trainer: it learns, resumes to the step, and leaves its files whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_training as tiny
import torch

from deq_flow_ros.model import DEQFlow, load_model, save_model
from deq_flow_ros.model.correlation import CorrelationPyramid
from deq_flow_ros.recordings.flow_files import write_flow
from training import train
from training.flow_dataset import Clip, read_pairs
from training.objective import Objective, matching_loss
from training.run import Run
from training.samples import Clips, make_generator
from training.settings import Schedule


@pytest.fixture(scope="module")
def clips() -> Clips:
    return Clips(make_generator(tiny.recipe(), 0))


def advance(run: Run, clips: Clips, steps: int) -> list[float]:
    return [run.train_step(clips[range(run.clips, run.clips + run.recipe.data.batch)])["loss"] for _ in range(steps)]


def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path: Path, clips: Clips) -> None:
    """Why: training goes on in pieces; optimizer, average, schedule and all that is random must come back exactly."""
    whole, first, second = (Run(tiny.recipe(), tmp_path / name) for name in ("whole", "parts", "parts"))
    expected = advance(whole, clips, 4)
    parts = advance(first, clips, 2)
    first.keep_best(3.5)
    first.save()
    assert "at step 2" in second.resume() and second.best == 3.5
    parts += advance(second, clips, 2)
    assert parts == expected
    for a, b in zip(whole.ema.state_dict().values(), second.ema.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_gradients_reach_everything(tmp_path: Path, clips: Clips) -> None:
    """Why: a part that gets none stays random: on one clip, seen again and again, the loss has to fall, all moving."""
    run = Run(tiny.recipe(), tmp_path)
    clip = clips[[1]]
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    losses = [run.train_step(clip)["loss"] for _ in range(25)]
    assert np.mean(losses[-3:]) < 0.75 * np.mean(losses[:3])
    still = [name for name, parameter in run.model.named_parameters() if torch.equal(before[name], parameter)]
    assert not still, still


def test_half_precision_gives_nearly_the_same_step(tmp_path: Path, clips: Clips) -> None:
    """Why: bf16 is the default on GPUs. Flow must stay fp32: bf16 knows 30 px to an eighth of a pixel only."""
    losses = [
        Run(tiny.recipe(f"optimization.precision={precision}"), tmp_path).train_step(clips[[0]])["loss"]
        for precision in ("fp32", "bf16")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] != losses[1]


def test_a_run_of_another_schedule_is_not_started_over(tmp_path: Path, clips: Clips) -> None:
    """Why: a new run in its folder would write over the weights of the old one."""
    run = Run(tiny.recipe(), tmp_path)
    run.save()
    with pytest.raises(ValueError, match=r"trapezoid\.pt is of another schedule than one-cycle.*--init .*model"):
        Run(tiny.recipe("schedule.kind=one-cycle"), tmp_path).resume()
    run.checkpoint.rename(tmp_path / "a file of somebody else.pt")
    assert Run(tiny.recipe(), tmp_path).resume().startswith("new run")


def test_rates_are_as_published() -> None:
    """Why: the one-cycle runs are comparable with the literature only if their rates are; the yardstick is PyTorch."""
    cycle = Schedule("one-cycle", steps=200, rate=4e-4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 4e-4, 200, pct_start=0.05, cycle_momentum=False, anneal_strategy="linear"
    )
    for step in range(200):
        assert cycle.rate_at(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-9, abs=1e-15), step
        optimizer.step()
        if step < 199:
            reference.step()


def test_a_checkpoint_that_lacks_something_is_refused(tmp_path: Path, clips: Clips) -> None:
    """Why: what is not known, as the clips that were seen, would have to be guessed."""
    run = Run(tiny.recipe(), tmp_path)
    run.save()
    state = torch.load(tmp_path / "trapezoid.pt", weights_only=True)
    del state["clips"], state["use"]
    torch.save(state, tmp_path / "trapezoid.pt")
    with pytest.raises(ValueError, match="not a training checkpoint of this version: it has no clips, use"):
        run.resume()


def test_a_failing_write_leaves_the_old_checkpoint(
    tmp_path: Path, clips: Clips, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why: a disk that fills up at hour ten must not cost the hours before."""
    run = Run(tiny.recipe(), tmp_path)
    advance(run, clips, 1)
    run.save()

    def full(path: Path, content: memoryview) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"cannot write .*trapezoid\.pt.*untouched.*No space left"):
        run.save()
    assert "at step 1" in Run(tiny.recipe(), tmp_path).resume()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run(tmp_path: Path, clips: Clips, what: str) -> None:
    """Why: one step along it, and the next checkpoint is NaN."""
    run = Run(tiny.recipe(), tmp_path)
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    clip = clips[[0]].to("cpu")
    if what == "loss":
        clip.images[:] = torch.nan
    else:
        run.model.mask[0].weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(FloatingPointError, match=rf"the {what} of step 0 is (inf|nan)"):
        run.train_step(clip)
    assert run.step == 0
    assert all(torch.equal(before[name], parameter) for name, parameter in run.model.named_parameters())


def test_frozen_batch_norm_keeps_its_statistics(tmp_path: Path, clips: Clips) -> None:
    """Why: after the first stage, small batches of large crops would spoil them (RAFT, arXiv 2003.12039)."""
    for frozen in (True, False):
        run = Run(tiny.recipe("model.size=tiny", f"optimization.freeze_batch_norm={frozen}"), tmp_path)
        before = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
        run.train_step(clips[[0]])
        changed = [name for name, buffer in run.model.named_buffers() if not torch.equal(before[name], buffer)]
        assert bool(changed) != frozen, changed


def test_warm_starts_are_disturbed_alike_in_any_company(clips: Clips) -> None:
    """Why: noise that depended on the batch would change with it; no noise would teach nothing."""
    model = DEQFlow("nano")
    objective = replace(tiny.recipe().objective, cold_iterations=(2, 2), warm_iterations=(1, 1))

    def warm(clip: Clip, objective: Objective = objective) -> float:
        return float(objective.loss(model, clip, np.random.default_rng(0))[1]["epe_warm"])

    together, alone = warm(clips[[4, 5]]), [warm(clips[[number]]) for number in (4, 5)]
    assert together == pytest.approx(np.mean(alone), rel=1e-5)
    assert abs(warm(clips[[4, 5]], replace(objective, perturbation_px=0.0)) - together) > 1e-3


def test_iterations_are_mostly_few_when_drawn_log_uniformly() -> None:
    """Why: a fixed point must hold far out, but a step should take little time: each doubling is as likely."""
    objective, rng = Objective(draw="log-uniform"), np.random.default_rng(0)
    drawn = np.array([objective.draw_iterations((4, 31), rng) for _ in range(3000)])
    assert set(drawn) == set(range(4, 32))
    for least in (4, 8, 16):
        assert np.mean((drawn >= least) & (drawn < 2 * least)) == pytest.approx(1 / 3, abs=0.03)


def test_the_command_trains_validates_and_writes_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: the one line that users type, from weights and procedural clips to weights that load, and what it tells."""
    pairs, start, out = tmp_path / "pairs.json", tmp_path / "start.safetensors", tmp_path / "run"
    _write_pair(pairs)
    torch.manual_seed(5)
    save_model(DEQFlow("nano"), start)
    arguments = [*tiny.arguments(out, "schedule.steps=3", "validation.every=2")]
    arguments += ["validation.sets=[{dataset: synthetic, limit: 2}, {dataset: pairs}, {dataset: hd1k}]"]
    arguments += ["--data", f"pairs={pairs}", "--init", str(start)]
    assert train.main(arguments) == 0
    said = capsys.readouterr().out
    assert "step 3 of 3" in said and "no validation on hd1k: no --data for it" in said
    entries = {entry["step"]: entry for entry in tiny.log(out) if "validation" in entry}
    assert list(entries) == [0, 2, 3]
    assert set(entries[3]["validation"]) == {"synthetic", "made", "mean"}
    best = min(entries, key=lambda step: entries[step]["validation"]["mean"])
    assert [step for step in entries if entries[step]["best"]][-1] == best
    assert load_model(out / "best.safetensors").architecture == load_model(out / "model.safetensors").architecture
    again = train.resolve(train.parse_arguments(["--recipe", str(out / "recipe.yaml"), "--out", str(out)]))
    assert again == train.resolve(train.parse_arguments(arguments))


def test_initial_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    """Why: loading what fits and leaving the rest random would look like training."""
    save_model(DEQFlow("tiny"), tmp_path / "tiny.safetensors")
    with pytest.raises(ValueError, match=r"does not fit the recipe's model. Choose --size"):
        Run(tiny.recipe(f"init={tmp_path / 'tiny.safetensors'}"), tmp_path)


def test_missing_textures_end_the_command_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: a wrong path must not fall back to procedural textures in silence."""
    assert train.main(["--out", str(tmp_path), "--textures", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().out


def test_the_smoke_recipe_learns(tmp_path: Path) -> None:
    """Why: all parts may work and yet nothing be learnt. Shortened to 60 steps: on clips that it never saw, the error
    must fall to 0.8 of what it was, and the matching loss, log(96) = 4.6 by chance, to less than half of that.
    """
    arguments = ["--recipe", "smoke", "--out", str(tmp_path), "--workers", "0", "--log-every", "20"]
    assert train.main([*arguments, "--set", "schedule.steps=60"]) == 0
    log = tiny.log(tmp_path)
    before, after = (entry["validation"]["mean"] for entry in log if "validation" in entry)
    assert after < 0.8 * before
    matching = [entry["matching"] for entry in log if "matching" in entry]
    assert matching[-1] < 2.3 and matching[-1] < 0.8 * matching[0]


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
    pair = '{"name": "g/a", "image1": "b", "image2": "b", "flow": "b"}'
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "non-empty array"),
        ('[{"name": "a", "image1": "b"}]', "has no flow, image2"),
        (f"[{pair}, {pair}]", "expected each name once, got several pairs of the name g/a"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_pairs(path)
    _write_pair(path)
    (tmp_path / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.png is missing"):
        read_pairs(path)


def _write_pair(path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(path.parent / name), image)
    write_flow(path.parent / "flow.flo", np.zeros((40, 56, 2), np.float32))
    path.write_text(json.dumps([{"name": "made/1", "image1": "a.png", "image2": "b.png", "flow": "flow.flo"}]))
