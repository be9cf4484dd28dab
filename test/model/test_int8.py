# SPDX-License-Identifier: Apache-2.0
"""The encoder of 8-bit integers: near the encoder of float32, and refused where it cannot run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deq_flow_ros.demo.scene import Scene, SceneSettings
from deq_flow_ros.model import DEQFlow, choose_precision, load_model, weights
from deq_flow_ros.model.encoders import Int8Encoder

try:
    choose_precision("int8", "cpu")
    missing = ""
except ValueError as error:
    missing = str(error)
needs_int8 = pytest.mark.skipif(bool(missing), reason=missing)


@needs_int8
def test_features_and_flow_are_near_those_of_float32() -> None:
    """Why: a limit, scale or zero point that is wrong by a little gives features that look plausible."""
    scene = Scene(SceneSettings(160, 120))
    pair = [torch.from_numpy(scene.render(number)).permute(2, 0, 1)[None] for number in (20, 21)]
    exact, quick = load_model("nano"), load_model("nano", precision="int8")
    assert isinstance(quick.encoder, Int8Encoder)
    for got, expected in zip(quick.encode(pair[0]), exact.encode(pair[0]), strict=True):
        assert got.dtype == next(quick.parameters()).dtype
        assert (got.float() - expected).norm() < 0.06 * expected.norm()
    again = quick.encode(pair[0].float() + 0.3)  # images that were made smaller are not whole numbers
    torch.testing.assert_close(again.features, quick.encode(pair[0]).features, rtol=0, atol=0)
    flows = [model(*pair, max_iterations=4).flow.numpy() for model in (quick, exact)]
    assert np.linalg.norm(flows[0] - flows[1], axis=1).mean() < 0.05


@needs_int8
def test_pixels_of_a_batch_are_encoded_each_by_itself() -> None:
    """Why: several cameras are one batch."""
    quick = load_model("nano", precision="int8")
    images = torch.randint(0, 256, (2, 3, 64, 72), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    both = quick.encode(images)
    for i in range(2):
        for got, alone in zip(both, quick.encode(images[i : i + 1]), strict=True):
            torch.testing.assert_close(got[i : i + 1], alone)


@needs_int8
def test_another_encoder_is_refused() -> None:
    """Why: values behind batch norm have no known variance, so the limits would not fit."""
    with pytest.raises(ValueError, match=r"int8 is for models with a shared encoder \(nano\)"):
        Int8Encoder(DEQFlow("tiny").encoder, torch.float32)


@pytest.mark.parametrize(
    ("flags", "device", "words"),
    [
        ("avx2 avx512f avx512_bf16", "cpu", "needs a processor with AVX512-VNNI, AVX-VNNI or AMX"),
        ("avx512_vnni", "cuda:0", "computes on a CPU alone, got the device cuda:0"),
        ("avx512_vnni", "cpu", r"needs oneDNN's onednn::qconv2d_pointwise, which PyTorch .* here lacks"),
    ],
)
def test_what_is_missing_is_named(
    flags: str, device: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why: without the instructions int8 is slower than float32, and without the operation nothing would run."""
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(weights, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    weights._cpu_flags.cache_clear()
    try:
        with pytest.raises(ValueError, match=words):
            choose_precision("int8", device)
    finally:
        weights._cpu_flags.cache_clear()
