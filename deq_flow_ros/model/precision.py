# SPDX-License-Identifier: Apache-2.0
"""The number types of weights and features, and which of them suits a processor."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = ("auto", *DTYPES)
_CPU_INFO = Path("/proc/cpuinfo")


def choose_precision(precision: str, device: str | torch.device) -> str:
    """The name of a type in ``DTYPES``: the given one, or the one that "auto" stands for on this device.

    "auto" is float16 on CUDA, bfloat16 on a CPU with instructions for it, and float32 on other CPUs.
    The flow itself is always float32. The flow of the two types differs by about 0.02 px on average (docs/speed.md).

    :raises ValueError: for an unknown name.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"expected a precision out of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision != "auto":
        return precision
    if str(device) != "cpu":
        return "float16"
    return "bfloat16" if cpu_has_bfloat16() else "float32"


@lru_cache(maxsize=1)
def cpu_has_bfloat16() -> bool:
    """Whether this processor can multiply bfloat16 matrices (AVX512-BF16 or AMX). If not, PyTorch converts them."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return "avx512_bf16" in flags or "amx_bf16" in flags
