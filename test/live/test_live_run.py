# SPDX-License-Identifier: Apache-2.0
"""`evaluate_bag` and its processes, for real: player and node over DDS, recorded, and none of them left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from deq_flow_ros.demo import SIDECAR, render_scene_bag
from deq_flow_ros.demo.scene import SceneSettings
from deq_flow_ros.evaluation.results import ResultFolder
from deq_flow_ros.imaging import frame_from_array
from deq_flow_ros.live.command import main, parse_options
from deq_flow_ros.model import DEQFlow, save_model
from deq_flow_ros.recordings import MediaError
from deq_flow_ros.recordings.bags import BagWriter, check_recording

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the right shape; what the flow looks like does not matter here."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "any.safetensors"
    save_model(DEQFlow("nano"), path)
    return path


@pytest.fixture
def own_model(model: Path, tmp_path: Path) -> Path:
    """A copy below `tmp_path`, so that the command line of the node names that, as those of the others do."""
    return Path(shutil.copy(model, tmp_path))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 pictures, 96x64, moving by 2 px."""
    folder = tmp_path_factory.mktemp("pictures")
    texture = np.random.default_rng(0).integers(0, 256, (16, 40, 3), np.uint8)
    texture = cv2.resize(texture, (160, 64), interpolation=cv2.INTER_CUBIC)
    for number in range(12):
        cv2.imwrite(str(folder / f"{number}.png"), texture[:, 2 * number : 2 * number + 96])
    return folder


def environment(tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "ROS_LOG_DIR": str(tmp_path / "ros"),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "FASTRTPS_DEFAULT_PROFILES_FILE": str(ROOT / "config" / "fastdds.xml"),
        "OMP_NUM_THREADS": "1",
    }


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "evaluate_bag"), "--live", *map(str, arguments)]


def processes_about(path: Path) -> list[str]:
    """Command lines of running processes that name a path."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(path) in line:
            lines.append(line)
    return lines


def test_the_demo_runs_without_input_and_accounts_for_every_frame(
    own_model: Path, pictures: Path, tmp_path: Path
) -> None:
    """What a bare `make demo` does, with a small scene: rendered, played, and held against its exact flow.

    Meanwhile another camera publishes under the usual name in the same ROS domain: it must not get mixed in.
    """
    out = tmp_path / "build" / "demo"
    script = f"""
import functools, sys
from deq_flow_ros.live import command
if __name__ == "__main__":  # the processes that render import this file as well
    command.SceneSettings = functools.partial(command.SceneSettings, width=96, height=72, frames=12)
    sys.exit(command.main(["--out", {str(out)!r}, "--model", {str(own_model)!r}, "--budget-ms", "2000",
                           "--max-iterations", "3"]))
"""
    (tmp_path / "demo.py").write_text(script)
    other = [sys.executable, "-m", "deq_flow_ros.ros.player", str(pictures), "--loop", "--ros-args"]
    camera = subprocess.Popen(
        [*other, "-r", "~/image:=/camera/image_raw"], env=environment(tmp_path), stdout=subprocess.DEVNULL
    )
    try:
        result = subprocess.run(
            [sys.executable, tmp_path / "demo.py"],
            cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert camera.poll() is None
    finally:
        camera.kill()
        camera.wait()
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "build" / "scene" / SIDECAR).is_file()
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["version"] == 2 and metrics["mode"] == "live" and metrics["problems"] == []
    transport, (streamed, cold) = metrics["transport"], metrics["settings"]
    frames, measures = streamed["frames"], streamed["measures"]
    assert transport["published"] == transport["received"] == frames["all"] == 12 and frames["first"] == 1
    assert frames["processed"] + frames["first"] + frames["dropped"] == 12
    assert frames["processed"] == transport["recorded"] == measures["photometric"]["pairs"] > 3
    assert streamed["iterations"]["max"] == 3 and cold["frames"]["processed"] > 0
    assert measures["epe_px"]["pairs"] == measures["epe_visible_px"]["pairs"] == frames["processed"]
    assert 0.01 < measures["epe_still_px"]["mean"] <= measures["epe_still_px"]["max"] < 20, "a slow drive, in px"
    assert len((out / "frames.csv").read_text().splitlines()) == 1 + 12 + cold["frames"]["processed"]
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert cv2.VideoCapture(str(out / "flow.mp4")).read()[0]
    assert processes_about(tmp_path) == []


def test_a_node_that_cannot_start_is_quoted(pictures: Path, tmp_path: Path) -> None:
    """The reason stands in a child's log: the user must see it at once, not an endless wait."""
    out, missing = tmp_path / "out", tmp_path / "missing.safetensors"
    result = subprocess.run(
        command(pictures, "--out", out, "--model", missing),
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 3, result.stdout + result.stderr
    assert "flow_node ended with status 1" in result.stdout and "missing.safetensors" in result.stdout
    assert not (out / "report.html").exists() and processes_about(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_behind(own_model: Path, pictures: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, and even a killed parent: players that publish on would disturb every later run."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(pictures, "--out", out, "--model", own_model, "--rate", "0.01"),
        cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, text=True,
        # Of tests that a shell runs in the background, Ctrl-C is ignored, and would be by this as well.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while "ros.player" not in "".join(processes_about(tmp_path)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        found = "".join(processes_about(tmp_path))
        assert [name for name in ("/evaluate_bag", ".flow_node", ".player") if name not in found] == []
        process.send_signal(number)
        assert process.wait(timeout=90) == (130 if number == signal.SIGINT else -signal.SIGKILL)
        deadline = time.monotonic() + 20
        while processes_about(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert processes_about(tmp_path) == []
        ResultFolder(out, {}, overwrite=True)  # and the next run is not asked to move half a recording away
        assert (out / "recording").exists() == (number == signal.SIGINT)
    finally:
        process.kill()


def test_a_live_input_is_recorded_with_its_images(model: Path, pictures: Path, tmp_path: Path) -> None:
    """A camera cannot be read again: what the report compares with has to be in the recording."""
    code = f"""
import json
from pathlib import Path
from deq_flow_ros.recordings import open_source
from deq_flow_ros.live import run as live_run
parameters = {{"model": {str(model)!r}, "latency_budget_ms": "2000.0", "warm_up_width": "96", "warm_up_height": "64"}}
parameters |= {{"qos_reliability": "reliable", "qos_depth": "10"}}
options = live_run.RunOptions(
    [{str(pictures)!r}, "--rate", "0.2", "--max-frames", "8"], True, parameters, Path("bag"), Path("logs"), "sqlite3"
)
published = live_run.run_live(options, lambda line: None)
frames = list(open_source("bag", live_run.bags.IMAGE_TOPIC).frames())
print(json.dumps([published.stamps_ns, [frame.stamp_ns for frame in frames], published.seconds]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    published, recorded, seconds = json.loads(result.stdout.splitlines()[-1])
    assert published == recorded and len(published) == 8
    assert seconds == pytest.approx(8 / 30 / 0.2, rel=0.2)


def test_wrong_inputs_and_options_end_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither needs a process to be started; the status tells wrong use from a failed run."""
    for arguments, message in (
        (("--rate", "0"), "--rate: expected above 0, got 0"),
        (("--seconds", "-1"), "--seconds: expected at least 0, got -1"),
        (("--param", "threads=2"), "expected --param NAME:=VALUE, got 'threads=2'"),
        (("--param", "direction:=backward"), "expected --direction for the parameter direction"),
        (("--param", "latency_budget_ms:=5.0"), "expected --budget-ms for the parameter latency_budget_ms"),
        (("--param", "model:=other"), "expected --model for the parameter model"),
        (("--param", "units:=normalized_per_second"), "expected no --param units (the measures are of pixels)"),
        (("--param", "roi:=[0, 0, 64]"), "expected --param roi:=[X,Y,WIDTH,HEIGHT]"),
        (("--param", "output_scale:=0.5"), "expected no --param output_scale (flow of another size"),
        (("--param", "cameras:=[left, right]"), "expected no --param cameras (one camera is played"),
        (("--param", "device:=cuda"), "expected --device for the parameter device"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parse_options(arguments)
        assert message in capsys.readouterr().err
    result = subprocess.run(
        command(tmp_path / "nowhere", "--out", tmp_path / "out"),
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 2 and "nowhere does not exist" in result.stdout


def write_bag(path: Path, *topics: str) -> Path:
    with BagWriter(path) as writer:
        for topic in topics:
            writer.write_frame(topic, frame_from_array(np.zeros((8, 8, 3), np.uint8), 1, 1, "camera"))
    return path


@pytest.mark.parametrize("name", ["recording", "recording/recording.mcap", "flow.mp4"])
def test_an_input_that_would_be_overwritten_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Whoever looks at an old recording again must not lose it, however its path is written."""
    (tmp_path / "demo").mkdir()
    write_bag(tmp_path / "demo" / "recording", "/flow_node/flow")
    (tmp_path / "demo" / "flow.mp4").write_bytes(b"a film")
    (tmp_path / "link").symlink_to("demo")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    for given in (f"demo/{name}", f"link/../demo/{name}", f"link/{name}", str(tmp_path / "demo" / name)):
        assert main([given, "--out", "demo"]) == 2
        assert "lie inside of each other" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["elsewhere", "--out", "demo"]) == 2
    assert "holds flow.mp4, recording, which no evaluation is known to have written" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_only_what_is_ours_is_deleted(tmp_path: Path) -> None:
    """With `--out .`, what is called like a result may be anything."""
    ours = write_bag(tmp_path / "ours", "/flow_node/flow")
    with BagWriter(tmp_path / "empty"):
        pass
    for path in (ours, tmp_path / "empty", tmp_path / "nothing"):
        check_recording(path)

    write_bag(tmp_path / "camera", "/camera/image_raw")
    write_bag(tmp_path / "robot", "/flow_node/flow", "/camera/image_raw", "/odom_image")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("text")
    (tmp_path / "broken").symlink_to("nowhere")
    out = tmp_path / "out"
    with ResultFolder(out, {}) as folder:
        folder.begin()
    for name, why in (
        ("camera", "is a bag of /camera/image_raw, not of flow"),
        ("robot", "is a bag of /camera/image_raw, /flow_node/flow, /odom_image, not of flow"),
        ("papers", "has no metadata.yaml"),
        ("file", "is not a directory"),
        ("broken", "is not a directory"),
    ):
        (tmp_path / name).rename(out / "recording")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(MediaError, match=f"{why}.* is left alone"):
            ResultFolder(out, {}, overwrite=True)
        with pytest.raises(MediaError, match=r"not a rendered scene .+ and is left alone"):
            render_scene_bag(out / "recording", SceneSettings(width=64, height=48, frames=2))
        assert sorted(tmp_path.rglob("*")) == before
        (out / "recording").rename(tmp_path / name)
    ours.rename(out / "recording")
    with ResultFolder(out, {}, overwrite=True) as folder:
        folder.begin()
    assert not (out / "recording").exists()
