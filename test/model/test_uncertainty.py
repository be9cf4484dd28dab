# SPDX-License-Identifier: Apache-2.0
"""The head that predicts how wrong the flow is: its distribution, files and training, and its way out of a stream."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_training as tiny
import torch
from streams import frames
from torch.distributions import Laplace

from deq_flow_ros.model import SIZES, DEQFlow, load_model, save_model
from deq_flow_ros.model.cells import UncertaintyHead, expected_error
from deq_flow_ros.model.checkpoints import from_released, to_released
from deq_flow_ros.streaming import FlowEstimator, UpdateRequest, update_together
from training.objective import blank, negative_log_likelihood
from training.run import Run
from training.samples import Clips, make_generator

WITH_HEAD = replace(SIZES["nano"], uncertainty_dim=8)


@pytest.fixture(scope="module")
def model() -> DEQFlow:
    torch.manual_seed(0)
    return DEQFlow(WITH_HEAD).eval().requires_grad_(False)


def test_the_expected_error_is_the_mean_length_of_the_error() -> None:
    """Why: it is published in px, so it has to be the mean of the distribution that was learnt."""
    share, scales = 0.3, (0.5, 4.0)
    torch.manual_seed(0)
    lengths = [Laplace(0.0, scale).sample((2, 400_000)).norm(dim=0).mean() for scale in scales]
    parameters = torch.tensor([share / (1 - share), *scales]).log().view(1, 3, 1, 1)
    expected = share * lengths[0] + (1 - share) * lengths[1]
    assert expected_error(parameters).item() == pytest.approx(expected.item(), rel=0.01)


def test_the_loss_is_the_likelihood_of_both_components() -> None:
    """Why: with another density the scales would not be those of the error, and the expected error not calibrated."""
    share, scales = 0.3, (0.5, 4.0)
    parameters = torch.tensor([share / (1 - share), *scales]).log().view(1, 3, 1, 1)
    error = torch.tensor([0.7, -2.0])
    densities = [Laplace(0.0, scale).log_prob(error).sum().exp() for scale in scales]
    expected = -torch.log(share * densities[0] + (1 - share) * densities[1])
    value = negative_log_likelihood(parameters, error.view(1, 2, 1, 1)) + np.log(4)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_weights_keep_their_head_and_go_without_one(model: DEQFlow, tmp_path: Path) -> None:
    """Why: weights without one stay as they are; those with one keep it through files and half precision."""
    image = 255 * torch.rand(1, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    result = model(image, image.roll(2, -1), max_iterations=2)
    assert result.uncertainty is not None and result.uncertainty.shape == (1, 1, 50, 70)
    assert (result.uncertainty > 0).all()
    save_model(model, tmp_path / "head.safetensors", precision="float16")
    hidden = torch.rand(1, 64, 6, 8, generator=torch.Generator().manual_seed(0))
    expected = model.upsample_uncertainty((hidden,))
    for precision, tolerance in (("float32", 0.005), ("bfloat16", 0.03)):
        loaded = load_model(tmp_path / "head.safetensors", precision=precision)
        again = loaded.upsample_uncertainty((hidden.to(loaded.mask[0].weight.dtype),))
        torch.testing.assert_close(again, expected, rtol=tolerance, atol=0)
    save_model(DEQFlow("nano"), tmp_path / "none.safetensors")
    without = load_model(tmp_path / "none.safetensors")
    assert without(image, image, max_iterations=1).uncertainty is None
    torch.manual_seed(0)
    normed = DEQFlow(replace(SIZES["tiny"], weight_norm=True, uncertainty_dim=8)).eval()
    assert torch.equal(normed.folded().uncertainty.conv1.weight, normed.uncertainty.conv1.weight)
    architecture, _ = from_released(to_released(normed))
    assert architecture == replace(normed.architecture, uncertainty_dim=0), "the released layout has no place for it"


def test_training_it_leaves_the_flow_as_it_is(tmp_path: Path) -> None:
    """Why: the head judges one flow. If that moved along, or the head of another flow were kept, it would be wrong."""
    torch.manual_seed(0)
    save_model(DEQFlow("nano"), tmp_path / "flow.safetensors")
    changes = (f"init={tmp_path / 'flow.safetensors'}", "model.uncertainty=8", "schedule.rate=0.02")
    run = Run(tiny.recipe(*changes), tmp_path / "run")
    clips = Clips(make_generator(tiny.recipe(), 0))
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    losses = [run.train_step(clips[[n]])["loss"] for n in (0, 1) * 8]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.2
    run.save()
    trained = load_model(tmp_path / "run" / "model.safetensors", fold=False).state_dict()
    moved = {name.split(".")[0] for name, tensor in trained.items() if not torch.equal(tensor, before[name])}
    assert moved == {"uncertainty"}
    flow = Run(tiny.recipe(f"init={tmp_path / 'run' / 'model.safetensors'}"), tmp_path / "flow")
    assert flow.model.uncertainty is None
    with pytest.raises(ValueError, match=r"model\.uncertainty: expected --init WEIGHTS"):
        tiny.recipe("model.uncertainty=8")


def test_blank_areas_have_no_texture_left() -> None:
    """Why: they are what teaches the head that nothing is known there; a leftover of the image would give it away."""
    images = 255 * torch.rand(1, 2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    spreads = [float(blank(images, np.random.default_rng(seed)).std((1, 3, 4)).mean()) for seed in range(12)]
    untouched = float(images.std((1, 3, 4)).mean())
    assert min(spreads) < 0.1 * untouched and max(spreads) > 0.5 * untouched, "everywhere, and in parts"


def test_a_stream_gives_it_where_it_is_asked_for(model: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: it takes time, so nothing is computed for those who did not ask, and those who did get it at full size."""
    calls = []
    original = UncertaintyHead.forward
    monkeypatch.setattr(UncertaintyHead, "forward", lambda *inputs: (calls.append(1), original(*inputs))[1])
    asking, other = FlowEstimator(model, max_iterations=2, uncertainty=True), FlowEstimator(model, max_iterations=2)
    first, second, third = frames(3, 50, 70, step=2)
    for stamp, frame in enumerate((first, second)):
        results = update_together([UpdateRequest(e, frame, stamp) for e in (asking, other)])
    assert results[0].uncertainty.shape == (50, 70) and results[0].uncertainty.dtype == np.float32
    assert results[1].uncertainty is None and len(calls) == 1
    assert other.update(third, 2).uncertainty is None and len(calls) == 1
    asking.change(uncertainty=False)
    assert asking.update(third, 2).uncertainty is None and len(calls) == 1
    with pytest.raises(ValueError, match="uncertainty must be False with these weights, which have no head"):
        FlowEstimator(DEQFlow("nano"), uncertainty=True)
    with pytest.raises(ValueError, match="uncertainty must be True or False, got 1"):
        asking.change(uncertainty=1)
