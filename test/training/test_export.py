# SPDX-License-Identifier: Apache-2.0
"""The released key layout, read and written, and ``python -m training.export``."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from released_reference import formula_weights, needs_parity, reference_case
from torch import Tensor

from deq_flow_ros.model import SIZES, Architecture, DEQFlow, WeightsError, load_model, save_model
from deq_flow_ros.model.checkpoints import from_released, to_released
from training import export

StateDict = dict[str, Tensor]

PLAIN = SIZES["tiny"]
FULL = replace(PLAIN, update="gma", weight_norm=True)
GRU = "update_block.gru"


def assert_same(got: StateDict, expected: StateDict) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


@needs_parity
@pytest.mark.parametrize("case", ["tiny_wnorm_k1", "base_k6", "base_gma_wnorm_k6"])
def test_released_checkpoints_survive_the_round_trip_exactly(case: str, tmp_path: Path) -> None:
    """Why: whoever trains here must be able to go on there, and back, without losing a bit."""
    checkpoint = formula_weights(reference_case(case)["state_dict"])
    for name in checkpoint:
        if name.endswith("num_batches_tracked"):
            checkpoint[name] = torch.tensor(len(name))
    for name in checkpoint:  # two names of one parameter, for which the formula gives two values
        if ".norm3." in name:
            checkpoint[name] = checkpoint[name.replace(".norm3.", ".downsample.1.")]
    torch.save(checkpoint, tmp_path / "in.pth")
    for source, kind, target in (
        ("in.pth", "released", "out.pth"),
        ("out.pth", "safetensors", "own.safetensors"),
        ("own.safetensors", "released", "again.pth"),
    ):
        assert export.main([str(tmp_path / source), "--to", kind, "--out", str(tmp_path / target)]) == 0
    for name in ("out.pth", "again.pth"):
        assert_same(torch.load(tmp_path / name, weights_only=True), checkpoint)


@pytest.mark.parametrize(
    "architecture",
    [
        SIZES["tiny"],
        replace(SIZES["large"], update="gma"),
        replace(SIZES["huge"], weight_norm=True, flow_head_dim=256),
        replace(SIZES["gigantic"], update="gma", weight_norm=True),
    ],
    ids=["tiny", "large-gma", "huge-weight_norm-narrow_head", "gigantic-gma-weight_norm"],
)
def test_the_architecture_is_read_off_the_checkpoint(architecture: Architecture) -> None:
    """Why: a checkpoint says nowhere else what it is; the flow head's width differs between releases."""
    with torch.device("meta"):
        model = DEQFlow(architecture)
    read, tensors = from_released(to_released(model.to_empty(device="cpu")))
    assert read == architecture and tensors.keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("architecture", "remove", "add", "message"),
    [
        (PLAIN, ["mask.0.bias"], {}, r"missing: mask\.0\.bias"),
        (PLAIN, ["fnet.conv2.weight"], {}, r"not a checkpoint in the released layout: .* 'fnet\.conv2\.weight'"),
        (PLAIN, ["cnet.layer2.0.norm3.bias"], {}, r"missing: cnet\.layer2\.0\.norm3\.bias"),
        (PLAIN, [], {"more": (3,)}, "unexpected: more"),
        (PLAIN, [], {"mask.2.weight": (9, 256, 1, 1)}, r"mask\.2\.weight is \(9, 256, 1, 1\), expected \(576,"),
        (PLAIN, [], {"mask.0.weight": (256,)}, r"'mask\.0\.weight' of 4 dimensions, got \(256,\)"),
        (PLAIN, [], {f"{GRU}.convz1.weight": (32, 80, 1, 5)}, r"takes 80 channels, expected 96 \(or 128 with"),
        (PLAIN, [], {f"{GRU}.convq2.weight_g": (32, 1, 1, 1)}, r"unexpected: .*gru\.convq2\.weight_g"),
        (PLAIN, [], {"attn.to_qk.weight": (64, 32, 1, 1)}, r"unexpected: attn\.to_qk\.weight"),
        (PLAIN, [], {"update_block.gma.gamma": (1,)}, r"unexpected: update_block\.gma\.gamma"),
        (FULL, [f"{GRU}.convz1.weight_v"], {}, r"gru\.convz1\.weight_v' of 4 dimensions, got none"),
        (FULL, [f"{GRU}.convq2.weight_g"], {}, r"missing: .*gru\.convq2\.weight_g"),
        (
            FULL,
            [f"{GRU}.convq2.weight_g", f"{GRU}.convq2.weight_v"],
            {f"{GRU}.convq2.weight": (32, 128, 5, 1)},
            r"missing: .*gru\.convq2\.weight_g[\s\S]*unexpected: .*gru\.convq2\.weight",
        ),
        (FULL, ["update_block.gma.gamma"], {}, r"missing: update_block\.gma\.gamma"),
        (FULL, ["attn.to_qk.weight"], {}, r"missing: attn\.to_qk\.weight"),
    ],
)
def test_what_does_not_fit_is_named(
    architecture: Architecture, remove: list[str], add: dict[str, tuple[int, ...]], message: str
) -> None:
    """Why: a checkpoint that is nearly right must not be used as if it were, and the error must say what is not."""
    state = to_released(DEQFlow(architecture))
    for name in remove:
        del state[f"module.{name}"]
    state.update({f"module.{name}": torch.zeros(shape) for name, shape in add.items()})
    with pytest.raises(WeightsError, match=rf"^file\.pth[\s\S]*{message}"):
        from_released(state, "file.pth")


def test_prefixes_and_types_are_not_mixed() -> None:
    """Why: two tensors of one name, or counts in place of weights, mean that something went wrong with a file."""
    state = to_released(DEQFlow(PLAIN))
    bare = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    assert from_released(bare)[1].keys() == from_released(state)[1].keys()
    with pytest.raises(WeightsError, match=r"unexpected: module\.mask\.0\.bias"):
        from_released({**bare, "module.mask.0.bias": bare["mask.0.bias"]})
    with pytest.raises(WeightsError, match=r"wrong type: mask\.0\.bias is torch\.int64, expected torch\.float32"):
        from_released({**bare, "mask.0.bias": bare["mask.0.bias"].long()})


def test_what_the_released_layout_cannot_hold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: a file that nobody can read is worse than none, and one that is there must stay."""
    out = tmp_path / "out.pth"
    out.write_text("old")
    for architecture, message in (
        (
            SIZES["nano"],
            "has two encoders, this model one of kind 'shared'; it has 4 levels of correlation with radius 4",
        ),
        (replace(PLAIN, correlation_levels=3), "this model 3 with radius 4"),
    ):
        save_model(DEQFlow(architecture), tmp_path / "model.safetensors")
        assert export.main([str(tmp_path / "model.safetensors"), "--to", "released", "--out", str(out)]) == 2
        assert message in capsys.readouterr().out
    assert export.main([str(tmp_path / "none.pth"), "--to", "released", "--out", str(out)]) == 2
    assert "no weights" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        export.main(["nano", "--to", "safetensors", "--out", str(out)])
    assert "must end in .safetensors, got" in capsys.readouterr().err
    assert out.read_text() == "old" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("kind", "ending"), [("released", "pth"), ("safetensors", "safetensors")])
def test_a_full_disk_leaves_the_old_file(
    kind: str, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Why: what cannot be written must cost nothing that was there, and be said without a stack of calls."""
    save_model(DEQFlow(PLAIN), tmp_path / "own.safetensors")
    out = tmp_path / f"out.{ending}"
    out.write_text("old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        assert export.main([str(tmp_path / "own.safetensors"), "--to", kind, "--out", str(out)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert f"cannot write {out}, what was there before is untouched: " in capsys.readouterr().out
    assert out.read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_what_is_exported_from_a_model_in_training_is_loaded_again(tmp_path: Path) -> None:
    """Why: the way back into the released layout is for models trained here, which never were in it."""
    torch.manual_seed(0)
    model = DEQFlow(FULL).eval()
    save_model(model, tmp_path / "own.safetensors")
    assert export.main([str(tmp_path / "own.safetensors"), "--to", "released", "--out", str(tmp_path / "a.pth")]) == 0
    loaded = load_model(tmp_path / "a.pth", fold=False)
    assert loaded.architecture == model.architecture
    assert_same(loaded.state_dict(), model.state_dict())
