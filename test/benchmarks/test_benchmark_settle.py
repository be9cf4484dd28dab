# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the fixed point: its starts, its distances, and what it writes. Its figures are not tested."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from streams import frames

from benchmarks import settle
from benchmarks.sequences import EncodedPair
from benchmarks.settle import STARTS, random_states, reversed_state, rows_of, summarise
from deq_flow_ros.model import DEQFlow, load_model, save_model
from deq_flow_ros.recordings.flow_files import write_flow
from training.flow_dataset import Sample


@pytest.fixture
def sample() -> Sample:
    """Two images, 64x96 px, that moved by 8 px to the left."""
    image1, image2 = frames(2, 64, 96, step=8)
    flow = np.tile(np.float32([-8, 0]), (64, 96, 1))
    return Sample("made/0", image1, image2, flow, np.ones((64, 96), bool), None)


def test_a_function_that_forgets_its_start_ends_in_one_place(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: distances between ends must be zero where there is one end, and tell of two where there are two."""
    model = DEQFlow("nano").eval().requires_grad_(False)
    monkeypatch.setattr(model.update_block, "forward", lambda hidden, flow, *_: (0 * hidden, 0 * flow + 0.5))
    options = Namespace(iterations=4, early=2, jacobian=False, solver="picard")
    rows = list(rows_of(model, [sample], options))
    assert [row["start"] for row in rows] == list(STARTS)
    assert all(row["apart_px"] == row["moved_px"] == row["distance_px"][4] == 0 for row in rows)
    # It says 4 px to the right and down, 8 px to the left are true.
    inner = pytest.approx(float(np.hypot(12, 4)), rel=0.2)  # at the border the upsampling mixes in zeros
    assert all(row["epe_px"] == {4: inner} for row in rows)
    monkeypatch.setattr(model.update_block, "forward", lambda hidden, flow, *_: (0 * hidden, flow.sign()))
    rows = list(rows_of(model, [sample], options))
    assert rows[0]["distance_px"][4] == rows[0]["moved_px"] == 0, "sign leaves zero where it is, and so does coarse"
    assert rows[-1]["distance_px"][4] > 1 and rows[0]["apart_px"] > 1


def test_starts_are_what_they_are_called(sample: Sample) -> None:
    """Why: docs/equilibrium.md says that the ends from these starts agree; zeros would be no test of that."""
    model = load_model("nano")
    with torch.inference_mode():
        starts = random_states(EncodedPair(model, sample))
        hidden, flow = reversed_state(model, sample)
    for state in starts.values():
        assert 8 * float(state[1].square().mean().sqrt()) == pytest.approx(8, rel=0.2)
        assert 0.3 < float(state[0].abs().mean()) < 1
    change = {name: float(state[1].diff(dim=-1).abs().mean()) for name, state in starts.items()}
    assert change["random"] < 0.5 * change["noise"], "a smooth motion"
    assert 8 * float(flow[:, 0].median()) == pytest.approx(-8, abs=1), "turned round: from image 1 to image 2"
    assert float(hidden.abs().mean()) > 0.01


def test_a_pair_starts_from_the_one_before_it(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: else *warm* would be something else than a stream's without a word."""
    reverses: list[str] = []
    monkeypatch.setattr(settle, "reversed_state", lambda _, s: reverses.append(s.name) or None)
    monkeypatch.setattr(settle, "carry", lambda state: state)
    made = lambda _, s, warm, __: ([{"pair": s.name, "warm": warm}], f"end of {s.name}")  # noqa: E731
    monkeypatch.setattr(settle, "rows_of_pair", made)
    following = replace(sample, name="made/1", image1=sample.image2, image2=sample.image1)
    stranger = replace(sample, name="other/0")
    rows = list(rows_of(DEQFlow("nano"), [sample, following, stranger, stranger], Namespace()))
    assert [row["warm"] for row in rows] == [None, "end of made/0", "end of made/1", None]
    assert reverses == ["made/0", "other/0"]


def test_settle_is_written_and_wrong_input_is_named(
    sample: Sample, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Why: README and docs/equilibrium.md quote its table and its picture."""
    for number, image in enumerate((sample.image1, sample.image2)):
        cv2.imwrite(str(tmp_path / f"{number}.png"), image)
    write_flow(tmp_path / "flow.flo", sample.flow)
    entry = {"name": "made/0", "image1": "0.png", "image2": "1.png", "flow": "flow.flo"}
    (tmp_path / "pairs.json").write_text(json.dumps([entry, {**entry, "name": "made/1"}]))
    out, picture = tmp_path / "out.json", tmp_path / "plot.png"
    command = ["--pairs", str(tmp_path / "pairs.json"), "--models", "nano", "--iterations", "7", "--early", "3"]
    command += ["--jacobian"]
    assert settle.main([*command, "--first", "1", "--threads", "1", "--json", str(out), "--plot", str(picture)]) == 0
    report = json.loads(out.read_text())
    assert "cores of" in report["machine"] and report["options"]["early"] == "3", "where the figures are from"
    assert [entry["start"] for entry in report["summary"]] == list(STARTS)
    assert {row["pair"] for row in report["curves"]} == {"made/0"} and cv2.imread(str(picture)) is not None
    assert report["curves"][0]["epe_px"].keys() == {"6", "7"} and len(report["curves"][0]["update_px"]) == 7
    of_coarse = next(row for row in report["curves"] if row["start"] == "coarse")
    assert 0.3 < of_coarse["spectral_radius"] < 1.2 and 0 < of_coarse["adjoint_residual"] < 0.5
    assert report["summary"] == json.loads(json.dumps(summarise(report["curves"]))), "the table is that of the curves"
    assert f"{of_coarse['still']:.1%}" in capsys.readouterr().out
    weights = [str(tmp_path / run / "model.safetensors") for run in ("a", "b")]  # of two runs of the trainer
    for path in weights:
        save_model(load_model("nano", fold=False), path)
    short = ["--first", "1", "--threads", "1", "--iterations", "4", "--early", "1", "--json", str(out)]
    assert settle.main([*command[:2], "--models", *weights, *short]) == 0
    assert {row["model"] for row in json.loads(out.read_text())["summary"]} == set(weights), "none in another's place"
    assert settle.main(["--pairs", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().out
    assert settle.main([*command, "--solver", "newton"]) == 2
    assert "unknown solver 'newton'; expected one of" in capsys.readouterr().out
    assert settle.main([]) == 2 and "expected --pairs or --sequence: without" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        settle.main(["--pairs", "x", "--early", "96"])
    with pytest.raises(SystemExit, match="2"):
        settle.main(["--pairs", "x", "--plot", "x.gif"])
    assert "ends in .png, .svg or .jpg, got x.gif" in capsys.readouterr().err, "said before the measurement"
