# SPDX-License-Identifier: Apache-2.0
"""Evaluation on data sets: the figures are those of the model, cold and warm, however many processes share the work."""

import json
from pathlib import Path

import cv2
import forked
import numpy as np
import pytest
from dataset_layouts import SIZE, write_chairs, write_kitti, write_middlebury, write_sintel, write_spring, write_things

from deq_flow_ros.model import load_model
from deq_flow_ros.recordings import MediaError
from deq_flow_ros.streaming.warm_start import carry
from training import evaluate
from training.datasets import open_dataset
from training.evaluate import read_ahead, runs
from training.pairs import measure, model_flow, open_pairs, pair_errors, summarise, to_array, to_tensor

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
    """Why: against the plainest loop there is; and the pictures must show the pairs that are really the worst."""
    entry = metrics(tmp_path, "--data", f"sintel-clean={sintel}", "--worst", "2")["datasets"]["sintel-clean"]
    dataset, flow = open_dataset("sintel-clean", sintel), model_flow(load_model("nano"), 3)
    samples = [dataset[index] for index in range(len(dataset))]
    errors = {s.name: pair_errors(s, flow(s.image1, s.image2))[0] for s in samples}
    most = entry["results"][-1]
    assert (entry["pairs"], most["start"], most["iterations"], most["mean_iterations"]) == (9, "cold", 3, 3)
    assert most["pairs_epe_px"] == pytest.approx(errors)
    assert most["regions"]["all"]["epe_image_mean_px"] == pytest.approx(np.mean(list(errors.values())))
    assert most["regions"]["all"]["pixels"] == 9 * (SIZE[0] * SIZE[1] - 6 * 8)  # invalid is one corner of each
    hidden = sum(int((s.valid & s.occluded).sum()) for s in samples if s.occluded is not None)
    assert most["regions"]["unmatched"]["pixels"] == hidden > 0
    assert [worst["name"] for worst in entry["worst"]] == sorted(errors, key=lambda name: -errors[name])[:2]
    picture = cv2.imread(entry["worst"][0]["picture"])
    assert picture.shape[0] == SIZE[0] and picture.shape[1] >= 4 * SIZE[1]


def test_sequences_start_from_the_fixed_point_of_the_pair_before(sintel: Path, tmp_path: Path) -> None:
    """Why: warm figures from the wrong state, or from another scene's, would look like any others."""
    arguments = ("--data", f"sintel-clean={sintel}", "--sequences", "--tolerance-px", "0.5", "--worst", "0")
    following = metrics(tmp_path, *arguments)["datasets"]["sintel-clean"]["following"]
    model, dataset, tallies = load_model("nano"), open_dataset("sintel-clean", sintel), []
    for run in dataset.sequences():
        state = None
        for index in run:
            sample = dataset[index]
            images = to_tensor(sample.image1), to_tensor(sample.image2)
            prediction = model(*images, max_iterations=3 if state is None else 2, state=state)
            if state is not None:
                tallies.append(measure(to_array(prediction.flow), sample)["all"])
            state = carry(prediction.state)
    warm = next(row for row in following["results"] if (row["start"], row["iterations"]) == ("warm", 2))
    assert following["pairs"] == len(tallies) == 6
    assert warm["regions"]["all"] == pytest.approx(summarise(tallies))
    for row in following["results"][-2:]:
        assert row["tolerance_px"] == 0.5 and 1 <= row["mean_iterations"] <= 3


def test_two_processes_give_the_figures_of_one(sintel: Path, tmp_path: Path) -> None:
    """Why: shares of unequal length (two scenes and one) must neither lose a pair nor count one twice, bit for bit."""
    arguments = ["--data", f"sintel-final={sintel}", "--sequences", "--worst", "1"]
    alone = metrics(tmp_path / "one", *arguments)["datasets"]
    said = forked.together(evaluate.main, [*arguments, *ITERATIONS, "--out", tmp_path / "two"], tmp_path / "log")
    together = json.loads((tmp_path / "two" / "metrics.json").read_text())["datasets"]
    for datasets in (alone, together):
        for worst in datasets["sintel-final"]["worst"]:
            assert Path(worst.pop("picture")).is_file()
    assert together == alone
    assert said.count("wrote ") == 1


def test_every_benchmark_has_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: the names of the columns are what a paper's table is filled from."""
    data = []
    for name, write in (
        ("chairs", write_chairs), ("things-final", write_things), ("kitti-2012", lambda r: write_kitti(r, 2012)),
        ("kitti-2015", write_kitti), ("spring", write_spring), ("middlebury", write_middlebury),
    ):  # fmt: skip
        write(tmp_path / name)
        data.append(f"{name}={tmp_path / name}")
    datasets = metrics(tmp_path / "out", "--data", *data, "--limit", "1", "--worst", "1")["datasets"]
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
    datasets = metrics(tmp_path / "out", "--pairs", str(path), "--sequences", "--worst", "0")["datasets"]
    assert [datasets[name]["following"]["pairs"] for name in ("pairs/a", "pairs/b")] == [1, 0]
    assert datasets["pairs/b"]["following"]["results"][0]["regions"] == {}


def test_a_limit_cuts_sequences(sintel: Path) -> None:
    """Why: a short look at a data set must still be made of pairs that follow each other."""
    dataset = open_dataset("sintel-clean", sintel)
    assert runs(dataset, True, limit=4) == [[0, 1, 2], [3]]
    assert runs(dataset, False, limit=2) == [[0], [1]]
    assert [index for run in runs(dataset, True) for index in run] == list(range(9))


def test_reading_ahead_keeps_the_order_and_hands_on_errors(sintel: Path, tmp_path: Path) -> None:
    """Why: images are decoded by other threads; a sample in the wrong place would be measured with another's state."""
    write_sintel(tmp_path, scenes=("alley_1",))
    dataset = open_dataset("sintel-clean", tmp_path)
    assert [sample.name for sample in read_ahead(dataset, [2, 0, 1, 2])] == [dataset[i].name for i in (2, 0, 1, 2)]
    (tmp_path / "training/flow/alley_1/frame_0002.flo").write_bytes(b"PIEH")
    with pytest.raises(MediaError, match=r"frame_0002\.flo"):
        list(read_ahead(dataset, range(3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate"),
        (["--data", "sintel-clean"], "expected NAME=ROOT, got 'sintel-clean'"),
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
    """Why: a wrong folder, name, solver or split ends in one line that says which, not in a traceback."""
    for arguments, message in (
        (["--data", f"sintel-clean={tmp_path / 'none'}"], "none"),
        (["--data", f"sintel={sintel}"], "unknown data set 'sintel'"),
        (["--data", f"sintel-clean={sintel}", "--solver", "newton"], "unknown solver 'newton'"),
        (["--data", f"sintel-clean={sintel}", "--split", "test"], "has no ground truth"),
        (["--data", f"sintel-clean={sintel}", "--model", "vast"], "no weights 'vast'"),
    ):
        assert evaluate.main([*arguments, *ITERATIONS]) == 2
        assert message in capsys.readouterr().out
