# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs: what a runtime without PyTorch computes is what PyTorch computes, at any size."""

from pathlib import Path

import pytest
import torch
from exported_graphs import Exported, small_model

from training import export

pytest.importorskip("onnxscript", reason="the exporter needs onnxscript, which is a package for development")
onnxruntime = pytest.importorskip("onnxruntime", reason="no ONNX runtime to compare with")


def test_the_graphs_give_the_flow_of_the_model(exported: Exported) -> None:
    """Why: a size that became a constant while tracing gives flow that only looks right. Both sizes compared differ
    from the one traced; with GMA, whose attention has two dimensions that depend on the size.
    """
    model, folder = small_model(), exported.folder
    assert exported.difference_px < export.TOLERANCE_PX
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.onnx" for name in sorted(export.GRAPHS)]
    step = onnxruntime.InferenceSession(folder / "step.onnx")
    pair = onnxruntime.InferenceSession(folder / "pair.onnx")
    assert [o.name for o in pair.get_outputs()] == [i.name for i in step.get_inputs()][2:]
    assert [o.name for o in step.get_outputs()] == ["next_hidden", "next_flow", "update_px"]
    state = torch.rand(1, 16, 9, 11), torch.rand(1, 2, 9, 11)
    last = export.OnnxFlow(folder).run("upsample", hidden=state[0].numpy(), flow=state[1].numpy())
    torch.testing.assert_close(torch.from_numpy(last["uncertainty"]), model.upsample_uncertainty(state))
    # The comparison must see a difference where there is one: a flow head that is off by 0.01 cells.
    model.update_block.flow_head.conv2.bias += 0.01
    assert export.largest_difference(model, folder) > 0.1


def test_graphs_that_differ_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: a graph that is wrong must not end on a robot, nor replace one that is right."""
    (tmp_path / "step.onnx").write_bytes(b"old")
    monkeypatch.setattr(export, "export", lambda model, folder: (Path(folder) / "step.onnx").write_bytes(b"new"))
    monkeypatch.setattr(export, "largest_difference", lambda model, folder: float("nan"))
    with pytest.raises(ValueError, match="differ from PyTorch by nan px"):
        export.export_checked(small_model(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step.onnx"]
    assert (tmp_path / "step.onnx").read_bytes() == b"old"
    with pytest.raises(FileNotFoundError, match=r"encode\.onnx is missing"):
        export.OnnxFlow(tmp_path)


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: the command ends in one line, not in a traceback."""
    assert export.main(["vast", "--to", "onnx", "--out", str(tmp_path / "out")]) == 2
    assert "no weights 'vast'" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        export.main(["nano", "--to", "onnx", "--out", "graphs.onnx"])
    assert "must be a folder, got graphs.onnx" in capsys.readouterr().err
