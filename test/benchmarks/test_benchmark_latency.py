# SPDX-License-Identifier: Apache-2.0
"""The benchmark of latency compares what it says: the same function, each one's own time, and all of the work."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from released_reference import PARITY, formula_image, formula_weights, needs_parity, reference_case
from streams import frames

from benchmarks import latency
from benchmarks.latency import Method, Streamed, summarise, take_turns
from benchmarks.peers import as_released, unrolled
from benchmarks.peers import pairwise as in_pairs
from deq_flow_ros.model import DEQFlow, load_model

CPU = torch.device("cpu")


@needs_parity
@pytest.mark.parametrize("case", ["tiny_wnorm_k6", "base_gma_wnorm_k6"])
def test_the_pairwise_way_gives_the_released_flow(case: str, tmp_path: Path) -> None:
    """Why: it stands for the release in every ratio, so it has to compute what the release computes."""
    spec = reference_case(case)
    path = tmp_path / "weights.pth"
    torch.save(formula_weights(spec["state_dict"]), path)
    function = in_pairs(as_released(load_model(path, fold=False)), spec["iterations"])
    height, width = spec["image_height"], spec["image_width"]
    images = (formula_image(height, width, *place)[0].permute(1, 2, 0).numpy() for place in ((0, 0), (2.5, -1.25)))
    expected = np.load(PARITY / f"{case}.npz")["flow_up"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(function(*images), expected, atol=1e-3)


def test_all_ways_give_the_same_flow_of_the_same_weights() -> None:
    """Why: the ratios are of speed alone only if nothing is left out; also where frames have to be padded."""
    model = load_model("nano")
    released = as_released(load_model("nano", fold=False))
    earlier, later = frames(2, height=75, width=90, step=3)
    images = (torch.from_numpy(image).permute(2, 0, 1)[None] for image in (earlier, later))
    expected = model(*images, max_iterations=5).flow[0].permute(1, 2, 0).numpy()
    assert np.abs(expected).max() > 1
    for function in (in_pairs(released, 5), unrolled(model, 5)):
        flow = function(earlier, later)
        assert flow.shape == (75, 90, 2) and flow.dtype == np.float32
        np.testing.assert_allclose(flow, expected, atol=1e-3)


@pytest.mark.parametrize("way", ["stream", "unrolled", "pairwise"])
def test_every_way_in_half_precision_stays_near(way: str) -> None:
    """Why: --dtype is for speed alone. Flow must stay float32: bfloat16 knows 30 px to an eighth of a pixel only."""
    pictures = frames(3, height=64, width=80, step=3)
    flows = []
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = load_model("nano", precision=precision)
        released = as_released(load_model("nano", fold=False)).to(dtype)
        ways: dict[str, Method] = {"stream": Streamed(model, 2), "unrolled": unrolled(model, 2)}
        method = (ways | {"pairwise": in_pairs(released, 2)})[way]
        for earlier, later in pairwise(pictures):
            flow = method(earlier, later)
        assert flow is not None and flow.dtype == np.float32
        flows.append(flow)
    assert 0 < np.abs(flows[1] - flows[0]).mean() < 0.02 < np.abs(flows[0]).mean()


def test_a_cold_pair_of_a_stream_does_not_count() -> None:
    """Why: behind a cut the stream starts from smaller versions of the pair: that is not the time of a warm field."""
    stream = Streamed(load_model("nano"), 1)
    dim = [frame // 4 for frame in frames(3, height=64, width=80, seed=7)]
    pictures = [*frames(3, height=64, width=80), *dim]
    given = [stream(*pair) is not None for pair in pairwise(pictures)]
    assert given == [False, True, False, False, True], "the first, the cut, and the pair behind it"


def test_the_convolutions_of_the_pairwise_way_are_normalised_in_every_call() -> None:
    """Why: the release does so, and the work must not be left out because the weights that ship have none."""
    released = as_released(DEQFlow("nano"))
    method = in_pairs(released, 2)
    image = frames(1, height=64, width=64)[0]
    with torch.no_grad():
        before = method(image, image)
        released.update_block.flow_head.conv2.parametrizations.weight.original0.mul_(3)
        after = method(image, image)
    assert np.abs(after - before).max() > 1e-3


class _Fake(Streamed):
    """A stream that takes a set time and has a set error; one of 1 iteration begins anew at frames 4 and 5."""

    def __init__(self, now: list[float], iterations: int, ms: float, ahead_ms: float, error_px: float) -> None:
        self.iterations, self.stage_ms = iterations, {"encode": ms / 2, "solve": ms / 4}
        self.pairs: list[tuple[int, int]] = []
        self._now, self._ms, self._ahead_ms, self._error_px = now, ms, ahead_ms, error_px

    def __call__(self, earlier: np.ndarray, later: np.ndarray) -> np.ndarray | None:
        self.pairs.append((int(earlier[0, 0, 0]), int(later[0, 0, 0])))
        self._now[0] += self._ms / 1e3
        if self.iterations == 1 and later[0, 0, 0] in (4, 5):
            return None
        return np.full((*later.shape[:2], 2), self._error_px / np.sqrt(2), np.float32)

    def prepare(self) -> None:
        self._now[0] += self._ahead_ms / 1e3


def test_turns_and_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: each is held to its own time, work ahead included, on the same pairs."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    reference = _Fake(now, 24, ms=60, ahead_ms=0, error_px=0)
    methods = {
        "stream, 1": _Fake(now, 1, ms=5, ahead_ms=1, error_px=0.5),
        "stream, 2": _Fake(now, 2, ms=8, ahead_ms=2, error_px=0.05),
        "stream, 3": _Fake(now, 3, ms=12, ahead_ms=2, error_px=0.01),
        "pairwise": lambda earlier, later: reference(earlier, later),
    }
    pictures = [np.full((4, 6, 3), number, np.uint8) for number in range(8)]
    samples = take_turns(methods, pictures, warm_up=2, every=2, device=CPU)
    assert methods["stream, 1"].pairs == [(n, n + 1) for n in range(7)]
    assert reference.pairs == [(1, 2), (2, 3), (4, 5), (6, 7)]
    rows = summarise(samples, methods, "stream, 2")
    assert [rows["pairwise"][ratio] for ratio in ("work_by_ours", "latency_by_ours")] == pytest.approx([6, 7.5])
    assert [rows[name]["pairs"] for name in methods] == [3, 5, 5, 3] and rows["stream, 1"]["resets"] == 2
    assert samples.groupby("method").square_px2.count().to_list() == [2, 2, 2, 2]
    assert rows["stream, 2"]["fields_per_second"] == pytest.approx(100)
    assert rows["stream, 1"]["rms_px"] == pytest.approx(0.5) and rows["stream, 3"]["median_px"] == pytest.approx(0.01)
    assert rows["stream, 2"]["stage_ms"] == pytest.approx({"encode": 4, "iteration": 1, "rest": 2, "ahead": 2})


def test_it_runs_from_a_recording_to_its_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why: docs/speed.md quotes its tables."""
    torch.set_num_threads(1)
    folder, out = tmp_path / "frames", tmp_path / "out.json"
    folder.mkdir()
    for number, image in enumerate(frames(5, height=72, width=96)):
        cv2.imwrite(str(folder / f"{number}.png"), image)
    command = ["--input", str(folder), "--height", "64", "--width", "80", "--iterations", "2", "1", "--threads", "1"]
    monkeypatch.setattr(latency, "WARM_UP", 1)
    monkeypatch.setattr(latency, "EVERY", 2)
    assert latency.main([*command, "--frames", "3", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    rows = report["methods"]
    assert [rows[name]["pairs"] for name in ("stream, 1", "stream, 2", "DIS fast", "pairwise, 60")] == [3, 3, 2, 2]
    assert rows["pairwise, 60"]["rms_px"] == 0 and rows["Farneback"]["rms_px"] > 0
    assert report["ours"] == "stream, 2"
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 160 and "unrolled, 32" in said and "MiB" in said
    assert latency.main([*command, "--frames", "9"]) == 2
    assert "expected 11 frames" in " ".join(capsys.readouterr().out.split())  # a long path is wrapped


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--height", "48"], "--height: expected at least 64, got 48"),
        (["--frames", "0"], "--frames: expected at least 1, got 0"),
        (["--iterations", "2", "0"], "--iterations: expected at least 1, got 0"),
        (["--input", "/nowhere"], "/nowhere does not exist"),
        (["--model", "/nowhere.safetensors"], "/nowhere.safetensors"),
    ],
)
def test_what_cannot_be_measured_is_named(wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: a run takes minutes; what is wrong with it must be said before."""
    try:
        assert latency.main(["--threads", "1", "--height", "64", "--width", "64", *wrong]) == 2
    except SystemExit as stopped:  # by the parser
        assert stopped.code == 2
    assert message in "".join(capsys.readouterr())
