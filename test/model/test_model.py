# SPDX-License-Identifier: Apache-2.0
"""The flow model on images of all sizes, and its weights files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deq_flow_ros.model import (
    SIZES,
    Architecture,
    DEQFlow,
    WeightsError,
    crop,
    load_model,
    pad_to_multiple,
    save_model,
    usable_levels,
)


class _Code:
    """Runs when it is unpickled by anything that runs code."""

    ran = False

    def __reduce__(self) -> tuple:
        return setattr, (_Code, "ran", True)


@pytest.fixture(scope="module")
def nano() -> DEQFlow:
    torch.manual_seed(0)
    return DEQFlow("nano").eval()


def test_nano_is_small_and_its_encoder_a_minor_part() -> None:
    """Why: it is the model for robots: about a million parameters, and not most of them in the encoder."""
    model = DEQFlow("nano")
    total = sum(p.numel() for p in model.parameters())
    assert 0.8e6 < total < 1.3e6
    assert sum(p.numel() for p in model.encoder.parameters()) < 0.5 * total


@pytest.mark.parametrize("size", ["nano", "base", replace(SIZES["tiny"], update="gma")], ids=["nano", "base", "gma"])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 41), (60, 100)])
def test_any_image_from_16_pixels_up(size: str | Architecture, height: int, width: int) -> None:
    """Why: cameras and regions of interest have any size; nothing may come out NaN or of another size."""
    torch.manual_seed(0)
    model = DEQFlow(size).eval()
    image = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    prediction = model(image, image.flip(-1), max_iterations=2)
    assert prediction.flow.shape == (2, 2, height, width) and prediction.flow.isfinite().all()
    assert prediction.residual.shape == (2, 1, height, width) and prediction.residual.isfinite().all()
    assert prediction.iterations.tolist() == [2, 2]


def test_padding_is_undone_exactly() -> None:
    """Why: flow must belong to the pixel it is written to."""
    image = torch.rand(1, 3, 17, 43)
    padded, padding = pad_to_multiple(image)
    assert padded.shape[-2:] == (24, 48)
    assert torch.equal(crop(padded, padding), image)


def test_stopping_tolerance_is_in_pixels_and_per_sample(nano: DEQFlow) -> None:
    """Why: a tolerance in full-resolution pixels means the same for every image; each sample is held to it alone."""
    torch.manual_seed(0)
    image = 255 * torch.rand(2, 3, 48, 64)
    free = nano(image, image.roll(2, -1), max_iterations=8)
    loose = nano(image, image.roll(2, -1), max_iterations=8, tolerance_px=float(free.residual_px.max()) * 1.0001)
    assert (loose.iterations <= 8).all() and all(r.value == "converged" for r in loose.stop_reasons)
    update = 8 * (free.state[1] - nano(image, image.roll(2, -1), max_iterations=7).state[1])
    torch.testing.assert_close(free.residual_px, update.square().sum(1).mean((1, 2)).sqrt(), rtol=1e-3, atol=1e-4)


def test_a_solve_can_be_continued(nano: DEQFlow) -> None:
    """Why: warm starts rest on it: 3 + 4 iterations are the same as 7."""
    image = 255 * torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    first = nano(image, image.roll(1, -1), max_iterations=3)
    second = nano(image, image.roll(1, -1), max_iterations=4, state=first.state)
    whole = nano(image, image.roll(1, -1), max_iterations=7)
    torch.testing.assert_close(second.flow, whole.flow, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="start state does not fit"):
        nano(image[..., :32], image[..., :32], state=first.state)


@pytest.mark.parametrize(
    ("shape1", "shape2", "message"),
    [
        ((3, 32, 32), (3, 32, 32), r"\(B, 3, H, W\), .* got shape \(3, 32, 32\)"),
        ((1, 1, 32, 32), (1, 1, 32, 32), r"got shape \(1, 1, 32, 32\)"),
        ((1, 3, 8, 32), (1, 3, 8, 32), r"at least 16x16 px, got shape \(1, 3, 8, 32\)"),
        ((1, 3, 32, 32), (1, 3, 32, 40), "must have one shape"),
    ],
)
def test_what_is_no_pair_of_images_is_refused(nano: DEQFlow, shape1: tuple, shape2: tuple, message: str) -> None:
    """Why: the error must say what was expected and what was got."""
    with pytest.raises(ValueError, match=message):
        nano(torch.zeros(shape1), torch.zeros(shape2))


def test_weights_survive_a_round_trip(nano: DEQFlow, tmp_path: Path) -> None:
    """Why: what was trained is what is loaded."""
    save_model(nano, tmp_path / "nano.safetensors", {"note": "test"})
    loaded = load_model(tmp_path / "nano.safetensors")
    for name, tensor in nano.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


@pytest.mark.parametrize("precision", ["float16", "bfloat16", None])
def test_weights_stored_in_half_precision_are_read(precision: str | None, tmp_path: Path) -> None:
    """Why: a file of half the size is written from a model in float32, or is what a model in half precision leaves."""
    model, path = DEQFlow("nano"), tmp_path / "half.safetensors"
    save_model(model, tmp_path / "whole.safetensors")
    with torch.no_grad():
        model.update_block.flow_head.conv1.weight[0, 0, 0, 0] = 1e5  # beyond float16
    save_model(model if precision else model.bfloat16(), path, precision=precision)
    assert path.stat().st_size < 0.6 * (tmp_path / "whole.safetensors").stat().st_size
    loaded = load_model(path, fold=False).state_dict()
    for name, tensor in model.float().state_dict().items():
        assert loaded[name].dtype == torch.float32
        torch.testing.assert_close(loaded[name], tensor, rtol=0.004, atol=1e-6, msg=name)
    assert next(load_model(path, precision="bfloat16").parameters()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="float32, bfloat16, float16, got 'half'"):
        save_model(model, path, precision="half")


def test_unusable_weights_are_named(nano: DEQFlow, tmp_path: Path) -> None:
    """Why: missing, truncated, foreign and misfitting files each need another remedy, so each has its own message."""
    with pytest.raises(FileNotFoundError, match="neither a file nor a model of this package"):
        load_model(tmp_path / "none.safetensors")
    whole = tmp_path / "whole.safetensors"
    save_model(nano, whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:5000])
    damaged = bytearray(whole.read_bytes())
    damaged[-5000:-1000] = 4000 * b"\xff"
    (tmp_path / "nan.safetensors").write_bytes(damaged)
    (tmp_path / "text.pth").write_text("root:x:0:0:root:/root:/bin/bash")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 nothing")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "foreign.pth")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "nested.pth")
    torch.save({1: torch.zeros(1)}, tmp_path / "numbers.pth")
    torch.save({"a": _Code()}, tmp_path / "code.pth")
    for name, message in (
        ("cut.safetensors", "not a whole safetensors file"),
        ("nan.safetensors", "is damaged: . of its tensors hold NaN or infinity"),
        ("text.pth", "not a whole PyTorch checkpoint: it is not in PyTorch's format"),
        ("cut.pth", "not a whole PyTorch checkpoint"),
        ("foreign.safetensors", "safetensors file of something else"),
        ("foreign.pth", "not a checkpoint in the released layout"),
        ("nested.pth", r"must hold a mapping of names to tensors .*it holds a mapping with \['state_dict'\]"),
        ("numbers.pth", r"must hold a mapping of names to tensors .*it holds a mapping with \['1'\]"),
        ("code.pth", "not a whole PyTorch checkpoint: .*contains more than tensors"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_model(tmp_path / name)
    assert not _Code.ran


def test_weights_that_may_not_be_read_are_not_said_to_be_damaged(
    nano: DEQFlow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why: who reads that a file is damaged makes or copies it anew."""
    save_model(nano, tmp_path / "nano.safetensors")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(WeightsError, match=r"nano\.safetensors may not be read: this user lacks the permission"):
        load_model(tmp_path / "nano.safetensors")


def test_cuda_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, nano: DEQFlow, tmp_path: Path) -> None:
    """Why: a silent fall back to the CPU is what users of other nodes complain about."""
    save_model(nano, tmp_path / "nano.safetensors")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="sees no CUDA device"):
        load_model(tmp_path / "nano.safetensors", "cuda")


def test_a_coarse_start_counts_its_iterations_and_fits_any_size(nano: DEQFlow) -> None:
    """Why: it may only change where the solve starts: not the number of iterations in all, not the result's size."""
    for height, width in ((130, 270), (60, 100), (16, 16)):
        image = 255 * torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
        prediction = nano(image, image.roll(1, -1), max_iterations=6, coarse_levels=2)
        assert prediction.flow.shape == (1, 2, height, width) and prediction.flow.isfinite().all()
        levels = min(2, usable_levels(height + -height % 8, width + -width % 8))
        assert int(prediction.iterations) == 6 - levels * (6 // (levels + 1))
    assert [usable_levels(127, 999), usable_levels(128, 999), usable_levels(480, 640)] == [0, 1, 2]
