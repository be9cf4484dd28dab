# SPDX-License-Identifier: Apache-2.0
"""The benchmark of warm starts: its sequences, its counts, and that a stream worse than a cold start is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from streams import frames

from benchmarks import sequences, warm_start
from benchmarks.sequences import CUTS, generated, listed, recorded
from benchmarks.warm_start import counted, cut_problems, first_below, summarise
from deq_flow_ros.recordings.flow_files import write_flow


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of four frames, 128x160 px, 4 px apart, one of them twice."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in enumerate(frames(4, 128, 160, step=4)):
        cv2.imwrite(str(folder / f"{2 * number}.png"), frame)
    cv2.imwrite(str(folder / "3.png"), cv2.imread(str(folder / "2.png")))
    return folder


@pytest.fixture
def few_textures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making them takes longer than all else."""
    monkeypatch.setattr(sequences, "PATTERNS", 4)


def row(start: str, pair: str, updates: list[float], **more: object) -> dict[str, object]:
    """A row of curves as the benchmark makes them, of a settled error of 0.5 px; 5 ms, and 10 for each iteration."""
    errors = more.pop("errors_px", [2.0, 1.0, 0.51, 0.5, 0.5])
    return {
        "group": "made", "pair": pair, "start": start, "truth": True, "update_px": updates,
        "error_px": {0: 2.0, 1: 1.0}, **counted(updates, errors, 0.5, 5.0, 10.0), **more,
    }  # fmt: skip


def test_sequences_fit_and_keep_their_truth(pictures: Path, tmp_path: Path) -> None:
    """Why: a flow that is not scaled with its image, or a still frame, would spoil every figure without a word."""
    half = recorded(str(pictures), 8, (64, 160))
    assert [image.shape for image in half.frames] == [(64, 80, 3)] * 4, "the repeated frame is left out"
    assert half.first == 1 and half.pairs[0].flow is None
    later = recorded(str(pictures), 8, (64, 160), skip=1)
    np.testing.assert_array_equal(later.frames[0], half.frames[1])
    flow = np.tile(np.float32([-4, 2]), (128, 160, 1))
    flow[:2, :2] = np.nan  # no truth there
    write_flow(tmp_path / "flow.flo", flow)
    entries = [
        {"name": f"g/{name}", "image1": f"frames/{n}.png", "image2": f"frames/{n + 2}.png", "flow": "flow.flo"}
        for name, n in enumerate((0, 2, 0))
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    (sequence,) = listed(tmp_path / "pairs.json", (64, 160))
    assert (len(sequence.pairs), sequence.first) == (2, 1), "the third pair does not follow the second"
    pair = sequence.pairs[1]
    assert pair.flow is not None and not pair.valid[0, 0] and pair.valid.sum() == pair.valid.size - 1
    np.testing.assert_allclose(pair.flow[pair.valid], np.tile(np.float32([-2, 1]), (pair.valid.size - 1, 1)))
    with pytest.raises(ValueError, match=r"at least 3 frames that differ from the one before.*, got 2"):
        recorded(str(pictures), 2, (64, 160))


@pytest.mark.usefixtures("few_textures")
def test_generated_sequences_move_as_named_and_cuts_have_no_flow() -> None:
    """Why: they must be what the page calls them; what is reused behind a cut comes from a pair across it."""
    made = list(generated(1, 3, (64, 80)))
    assert [sequence.group for sequence in made] == ["slow", "fast", CUTS]
    motions = [np.linalg.norm(sequence.pairs[0].flow, axis=2).mean() for sequence in made[:2]]  # type: ignore[arg-type]
    assert motions[0] < motions[1]
    cut = made[2]
    assert cut.first == len(cut.pairs) - 1 == 3
    assert [pair.flow is None for pair in cut.pairs] == [False, False, True, False]
    for before, after in zip(cut.pairs, cut.pairs[1:], strict=False):
        np.testing.assert_array_equal(before.image2, after.image1)


def test_iterations_and_ratios_are_counted_per_pair() -> None:
    """Why: the ratio of warm to cold is the figure that is quoted; pairs that never get there must not flatter it."""
    assert (first_below([3.0, 0.2, 0.1], 0.2), first_below([3.0], 0.2)) == (2, float("inf"))
    assert row("zero", "a", [1.0, 0.04])["to_px"] == 2
    assert row("zero", "a", [1.0], errors_px=[0.52, 1.0])["to_error"] == 0, "the start itself is near enough"
    rows = [
        row("zero", "a", [1.0, 1.0, 1.0, 0.01]), row("zero", "b", [1.0] * 4), row("zero", "c", [1.0] * 4),
        row("full", "a", [0.01] * 4), row("full", "b", [1.0, 0.01, 1.0, 1.0]), row("full", "c", [1.0] * 4),
    ]  # fmt: skip
    rows += [{**cold, "start": "coarse"} for cold in rows[:3]]
    full = next(entry for entry in summarise(rows) if entry["start"] == "full")
    assert (full["to_px"], full["to_px_pairs"]) == (2, 2)
    assert full["to_px_of_zero"] == pytest.approx((1 / 4 + 2 / 4) / 2), "b: at most 2 of 4; c says nothing"


def test_iterations_to_the_settled_error_are_counted() -> None:
    """Why: what a warm start is worth is told by them; a start that never gets there must not flatter it."""
    cold = row("coarse", "a", [4.0, 1.0, 0.25, 0.125], errors_px=[9.0, 3.0, 0.6, 0.6, 0.52])
    never = row("full", "b", [4.0, 1.0, 0.5, 0.25], errors_px=[1.0] * 5)
    rows = [{**cold, "start": start, "pair": pair} for start in ("zero", "coarse") for pair in "ab"]
    rows += [row("full", "a", [1.0, 0.5, 0.25, 0.125]), never]
    made = {entry["start"]: entry for entry in summarise(rows)}
    assert (made["coarse"]["to_error"], made["coarse"]["to_error_pairs"]) == (4, 2)
    full = made["full"]
    assert (full["to_error"], full["to_error_pairs"]) == (3, 1)
    assert full["ms_of_coarse"] == pytest.approx((5 + 30) / (5 + 40))
    assert made["coarse"]["factors"] == pytest.approx([0.25, (0.125 / 1.0) ** 0.5])


def test_a_stream_worse_than_cold_behind_a_cut_is_named() -> None:
    """Why: it is promised never to be; the command must fail where it is."""
    cold = row("coarse", "a", [1.0], group=CUTS)
    good = row("stream", "a", [1.0], group=CUTS, noticed=True, error_px={1: 1.0})
    assert cut_problems([cold, good]) == []
    bad = {**good, "error_px": {1: 1.2}, "noticed": False}
    assert cut_problems([cold, bad]) == [
        "a, behind a cut (not noticed): error 1.20 px after 1 iterations, 1.00 px from a cold start"
    ]


@pytest.mark.usefixtures("few_textures")
def test_all_starts_are_measured(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why: docs/warm_start.md quotes its tables."""
    torch.set_num_threads(1)
    out = tmp_path / "out.json"
    values = {"CLIP_FRAMES": 3, "CARRIED": 3, "MARKS": (1, 2)}
    for name, value in values.items():
        monkeypatch.setattr(warm_start, name, value)
    command = ["--sequence", str(pictures), "--frames", "4", "--clips", "1", "--height", "64"]
    command += ["--width", "80", "--iterations", "3", "--reference", "6"]
    assert warm_start.main([*command, "--json", str(out)]) in (0, 1)
    report = json.loads(out.read_text())
    assert {entry["group"] for entry in report["summary"]} == {"frames", "slow", "fast", CUTS}
    by_start = {r["start"]: r for r in report["curves"] if r["group"] == "frames"}
    assert len(by_start["zero"]["update_px"]) == 3
    assert by_start["full, warped"]["error_px"]["0"] < by_start["zero"]["error_px"]["0"]
    assert set(by_start["stream"]["error_px"]) == {"1", "2"}
    assert "full, warped" in capsys.readouterr().out
    assert warm_start.main(["--clips", "0", "--sequence", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().out
