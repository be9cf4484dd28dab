# SPDX-License-Identifier: Apache-2.0
"""Which number type a model computes in, and that it is what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from deq_flow_ros.evaluation.methods import Setting
from deq_flow_ros.model import choose_precision, load_model, weights


@pytest.mark.parametrize(
    ("flags", "device", "chosen"),
    [
        ("fpu avx2 avx512f avx512_bf16", "cpu", "bfloat16"),
        ("fpu avx2 amx_bf16", "cpu", "bfloat16"),
        ("fpu avx2 avx512f", "cpu", "float32"),
        ("fpu avx512_bf16", "cuda:0", "float16"),
        (None, "cpu", "float32"),
    ],
)
def test_half_precision_is_chosen_where_the_device_has_it(
    flags: str | None, device: str, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why: elsewhere PyTorch converts each product, which is several times slower than float32."""
    cpu_info = tmp_path / "cpuinfo"
    if flags is not None:
        cpu_info.write_text(f"model name\t: a processor with no avx512_bf16 in its name\nflags\t\t: {flags}\n")
    monkeypatch.setattr(weights, "_CPU_INFO", cpu_info)
    weights._cpu_flags.cache_clear()
    try:
        assert choose_precision("auto", device) == chosen
        assert choose_precision("float16", device) == "float16"
        assert Setting("main", device=device).network == ("nano", device, chosen)
    finally:
        weights._cpu_flags.cache_clear()


def test_a_precision_that_is_none_is_named() -> None:
    """Why: a misspelt one must not be float32 in silence."""
    with pytest.raises(ValueError, match=r"auto, float32, bfloat16, float16, int8, got 'fp16'"):
        load_model("nano", precision="fp16")
