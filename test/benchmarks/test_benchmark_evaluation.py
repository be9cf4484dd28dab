# SPDX-License-Identifier: Apache-2.0
"""Evaluation on data sets: the figures are those of the model, cold and warm."""

import json
from pathlib import Path

import numpy as np
import pytest
from dataset_layouts import SIZE, write_chairs, write_kitti, write_middlebury, write_sintel, write_spring, write_things

from deq_flow_ros.model import load_model
from deq_flow_ros.model.cells import carry
from training import evaluate
from training.datasets import open_dataset
from training.evaluate import measure, model_flow, pair_error, summarise
from training.flow_dataset import open_pairs, to_array, to_tensor

ITERATIONS = ["--iterations", "2", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def sintel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sintel")
    write_sintel(root, scenes=("alley_1", "market_2", "temple_3"))
    return root


def metrics(out: Path, *arguments: str) -> dict:
    """metrics.json of a run of the command."""
    assert evaluate.main([*arguments, *ITERATIONS, "--out", str(out)]) == 0
    return json.loads((out / "metrics.json").read_text())


def test_the_figures_are_those_of_the_model_pair_by_pair(sintel: Path, tmp_path: Path) -> None:
    """Why: against the plainest loop there is."""
    entry = metrics(tmp_path, "--data", f"sintel-clean={sintel}")["datasets"]["sintel-clean"]
    dataset, flow = open_dataset("sintel-clean", sintel), model_flow(load_model("nano"), 3)
    samples = [dataset[index] for index in range(len(dataset))]
    errors = {s.name: pair_error(s, flow(s.image1, s.image2)) for s in samples}
    most = entry["results"][-1]
    assert (entry["pairs"], most["iterations"]) == (9, 3)
    assert most["pairs_epe_px"] == pytest.approx(errors)
    assert most["regions"]["all"]["epe_image_mean_px"] == pytest.approx(np.mean(list(errors.values())))
    assert most["regions"]["all"]["pixels"] == 9 * (SIZE[0] * SIZE[1] - 6 * 8)  # invalid is one corner of each
    hidden = sum(int((s.valid & s.occluded).sum()) for s in samples if s.occluded is not None)
    assert most["regions"]["unmatched"]["pixels"] == hidden > 0


def test_warm_pairs_start_from_the_fixed_point_of_the_pair_before(sintel: Path, tmp_path: Path) -> None:
    """Why: warm figures from the wrong state, or from another scene's, would look like any others."""
    warm = metrics(tmp_path, "--data", f"sintel-clean={sintel}", "--warm")["datasets"]["sintel-clean"]["results"][0]
    model, dataset, tallies = load_model("nano"), open_dataset("sintel-clean", sintel), []
    for run in dataset.sequences():
        state = None
        for sample in map(dataset.__getitem__, run):
            prediction = model(to_tensor(sample.image1), to_tensor(sample.image2), max_iterations=2, state=state)
            tallies.append(measure(to_array(prediction.flow), sample)["all"])
            state = carry(prediction.state)
    assert len(tallies) == 9
    assert warm["regions"]["all"] == pytest.approx(summarise(tallies))


def test_every_benchmark_has_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: the names of the columns are what a paper's table is filled from."""
    data = []
    for name, write in (
        ("chairs", write_chairs), ("things-final", write_things), ("kitti-2012", lambda r: write_kitti(r, 2012)),
        ("kitti-2015", write_kitti), ("spring", write_spring), ("middlebury", write_middlebury),
    ):  # fmt: skip
        write(tmp_path / name)
        data.append(f"{name}={tmp_path / name}")
    datasets = metrics(tmp_path / "out", "--data", *data, "--limit", "1")["datasets"]
    printed = capsys.readouterr().out
    for label in ("EPE", "Fl-all", "Fl-noc", "Out-noc", "1px"):
        assert label in printed
    assert set(datasets) == {entry.split("=")[0] for entry in data}
    for entry in datasets.values():
        assert entry["pairs"] == 1 and 0 < entry["results"][0]["regions"]["all"]["epe_px"] < 10
    kitti = datasets["kitti-2015"]["results"][0]["regions"]
    assert 0 < kitti["matched"]["pixels"] < kitti["all"]["pixels"] < SIZE[0] * SIZE[1]


def test_pairs_of_a_list_that_follow_each_other_are_sequences(sintel: Path, tmp_path: Path) -> None:
    """Why: warm starts shall be measurable on a handful of files, without a whole data set."""
    entries = [
        {
            "name": f"{group}/{number}",
            "image1": str(sintel / f"training/clean/alley_1/frame_{number:04d}.png"),
            "image2": str(sintel / f"training/clean/alley_1/frame_{number + 1:04d}.png"),
            "flow": str(sintel / f"training/flow/alley_1/frame_{number:04d}.flo"),
        }
        for group, numbers in (("a", (1, 2)), ("b", (1, 3)))
        for number in numbers
    ]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(entries))
    assert [group.sequences() for group in open_pairs(path)] == [[[0, 1]], [[0], [1]]]
    datasets = metrics(tmp_path / "out", "--pairs", str(path), "--limit", "1")["datasets"]
    assert [list(datasets[f"pairs/{g}"]["results"][0]["pairs_epe_px"]) for g in "ab"] == [["a/1"], ["b/1"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate"),
        (["--data", "sintel-clean"], "expected NAME=ROOT, got 'sintel-clean'"),
        (["--data", "pairs=list.json"], "a list of pairs is given as --pairs LIST.json"),
        (["--data", "spring=a", "spring=b"], "each data set once"),
        (["--data", "spring=a", "--limit", "0"], "--limit: expected at least 1, got 0"),
        (["--data", "spring=a", "--iterations", "0"], "--iterations: expected at least 1, got 0"),
    ],
)
def test_impossible_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: before anything is loaded, with what was expected."""
    with pytest.raises(SystemExit):
        evaluate.main(arguments)
    assert message in capsys.readouterr().err


def test_what_cannot_be_evaluated_is_named(sintel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: a wrong folder, name or split ends in one line that says which, not in a traceback."""
    for arguments, message in (
        (["--data", f"sintel-clean={tmp_path / 'none'}"], "none"),
        (["--data", f"sintel={sintel}"], "unknown data set 'sintel'"),
        (["--data", f"sintel-clean={sintel}", "--split", "test"], "has no ground truth"),
        (["--data", f"sintel-clean={sintel}", "--model", "vast"], "no weights 'vast'"),
    ):
        assert evaluate.main([*arguments, *ITERATIONS]) == 2
        assert message in capsys.readouterr().out
