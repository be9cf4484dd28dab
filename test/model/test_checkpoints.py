# SPDX-License-Identifier: Apache-2.0
"""The safetensors format: the same files as its library writes and reads, and damage is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from deq_flow_ros.model.checkpoints import WeightsError, read_safetensors, to_safetensors

TENSORS = {
    "weight": torch.randn(3, 4),
    "count": torch.tensor(7),
    "half": torch.randn(5).bfloat16(),
    "mask": torch.tensor([True, False, True]),
    "none": torch.empty(0, 2, dtype=torch.float16),
}


def same(got: dict[str, torch.Tensor]) -> bool:
    return got.keys() == TENSORS.keys() and all(
        got[name].dtype == tensor.dtype and torch.equal(got[name], tensor) for name, tensor in TENSORS.items()
    )


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path: Path) -> None:
    """Why: weights go to and come from other programs."""
    (tmp_path / "ours").write_bytes(to_safetensors(TENSORS, {"note": "Übung"}))
    assert same(safetensors.torch.load_file(tmp_path / "ours"))
    with safetensors.safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"note": "Übung"}
    safetensors.torch.save_file(TENSORS, tmp_path / "theirs", {"note": "Übung"})
    tensors, metadata = read_safetensors(tmp_path / "theirs")
    assert same(tensors) and metadata == {"note": "Übung"}


def test_damage_is_an_error_wherever_it_is(tmp_path: Path) -> None:
    """Why: a header that is off by one tensor would give a model of other weights, not a failure."""
    (tmp_path / "whole").write_bytes(to_safetensors(TENSORS, {}))
    whole = (tmp_path / "whole").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])

    def with_header(**changes: object) -> bytes:
        text = json.dumps(header | {"weight": header["weight"] | changes}).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + length :]

    for damaged, message in (
        (b"", "0 bytes"),
        (whole[:20], "20 bytes"),
        (whole[:-1], "describes"),
        (whole + b"0", "describes"),
        (whole[:8] + b"[" + whole[9:], "header cannot be read"),
        (with_header(dtype="F99"), "header cannot be read"),
        (with_header(shape=[3, 5]), r"gives weight the shape \[3, 5\] and 48 bytes"),
        (with_header(shape=[-3, -4]), "expected counts"),
        (with_header(data_offsets=[0]), "header cannot be read"),
    ):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(WeightsError, match=message):
            read_safetensors(tmp_path / "damaged")
