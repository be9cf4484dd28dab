# SPDX-License-Identifier: Apache-2.0
"""Submissions: the files that the servers expect, holding the flow of the model."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dataset_layouts import SIZE, write_kitti, write_sintel, write_spring

from deq_flow_ros.model import load_model
from deq_flow_ros.model.cells import carry
from deq_flow_ros.recordings.flow_files import read_flow
from training import submit
from training.datasets import open_dataset
from training.evaluate import model_flow
from training.flow_dataset import to_array, to_tensor

FEW = ["--iterations", "2", "--threads", "1"]
SPRING = {
    f"0003/flow_{direction}_{side}/flow_{direction}_{side}_000{number}.flo5"
    for side in ("left", "right")
    for direction, numbers in (("FW", (1, 2)), ("BW", (2, 3)))
    for number in numbers
}


@pytest.mark.parametrize(
    ("name", "write", "expected"),
    [
        ("sintel", write_sintel, {f"{p}/ambush_1/frame_000{n}.flo" for p in ("clean", "final") for n in (1, 2, 3)}),
        ("kitti-2012", lambda r: write_kitti(r, 2012), {"000000_10.png", "000001_10.png", "kitti-2012.zip"}),
        ("kitti-2015", write_kitti, {"flow/000000_10.png", "flow/000001_10.png", "kitti-2015.zip"}),
        ("spring", write_spring, SPRING),
    ],
)
def test_files_are_where_the_server_looks_for_them(
    tmp_path: Path, name: str, write: Callable[[Path], None], expected: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Why: a server that misses one file refuses all of them, and gives few tries."""
    write(tmp_path / "data")
    out = tmp_path / "out"
    assert submit.main(["--data", f"{name}={tmp_path / 'data'}", "--out", str(out), *FEW]) == 0
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == expected
    flows = {file for file in files if not file.endswith(".zip")}
    for file in flows:
        flow, valid = read_flow(out / file)
        assert flow.shape == (*SIZE, 2) and valid.all()
    if len(flows) < len(files):
        assert set(zipfile.ZipFile(out / f"{name}.zip").namelist()) == flows
    printed = capsys.readouterr().out
    assert f"wrote {len(flows)} flow fields" in printed and "the server will refuse this" in printed


def test_the_flow_is_that_of_the_pair_of_its_name(tmp_path: Path) -> None:
    """Why: a file under the wrong name is a wrong result that nobody sees; KITTI keeps it to 1/128 px."""
    write_kitti(tmp_path / "data")
    assert submit.main(["--data", f"kitti-2015={tmp_path / 'data'}", "--out", str(tmp_path / "out"), *FEW]) == 0
    flow = model_flow(load_model("nano"), 2)
    for sample in map(open_dataset("kitti-2015", tmp_path / "data", "test").__getitem__, range(2)):
        written, _ = read_flow(tmp_path / "out" / "flow" / f"{sample.name.split('/')[1]}.png")
        assert np.abs(written - flow(sample.image1, sample.image2)).max() <= 1 / 128 + 1e-4


def test_a_warm_submission_carries_the_state_through_a_scene(tmp_path: Path) -> None:
    """Why: the option must do what it says, and each pass must begin anew."""
    write_sintel(tmp_path / "data")
    command = ["--data", f"sintel={tmp_path / 'data'}", "--out", str(tmp_path / "out"), "--warm", *FEW]
    assert submit.main(command) == 0
    model = load_model("nano")
    for part in ("clean", "final"):
        dataset, state = open_dataset(f"sintel-{part}", tmp_path / "data", "test"), None
        for index in range(len(dataset)):
            sample = dataset[index]
            prediction = model(to_tensor(sample.image1), to_tensor(sample.image2), max_iterations=2, state=state)
            written, _ = read_flow(tmp_path / "out" / part / f"{sample.name.split('/', 1)[1]}.flo")
            assert np.abs(written - to_array(prediction.flow)).max() < 1e-4
            state = carry(prediction.state)


def test_no_file_of_another_submission_gets_among_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: results of two models in one folder are submitted as one."""
    write_kitti(tmp_path / "data")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.png").write_bytes(b"")
    assert submit.main(["--data", f"kitti-2015={tmp_path / 'data'}", "--out", str(tmp_path / "out"), *FEW]) == 2
    assert "is not empty; give a new folder" in capsys.readouterr().out


def test_what_the_format_cannot_hold_is_cut_and_counted(tmp_path: Path) -> None:
    """Why: a wild vector after hours of work must cost that vector, not the submission; NaN must stop it."""
    flow = np.zeros((2, 3, 2), np.float32)
    flow[0, 0], flow[1, 2] = (600, 1), (3, -700.5)
    assert submit.write_cut(tmp_path / "a.png", flow) == 2
    back, _ = read_flow(tmp_path / "a.png")
    assert back[0, 0].tolist() == [512 - 1 / 64, 1] and back[1, 2].tolist() == [3, -512]
    assert submit.write_cut(tmp_path / "a.flo", flow) == 0
    flow[0, 0] = np.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        submit.write_cut(tmp_path / "b.flo", flow)
    assert not (tmp_path / "b.flo").exists()
