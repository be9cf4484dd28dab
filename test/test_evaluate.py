# SPDX-License-Identifier: Apache-2.0
"""`evaluate_bag` and its processes, for real: player, node and recorder over DDS, and none of them left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from deq_flow_ros.model import DEQFlow, save_model
from deq_flow_ros.ros.evaluate_bag import parse_options

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the right shape; what the flow looks like does not matter here."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "any.safetensors"
    save_model(DEQFlow("nano"), path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 pictures, 96x64, moving by 2 px."""
    folder = tmp_path_factory.mktemp("pictures")
    texture = np.random.default_rng(0).integers(0, 256, (16, 40, 3), np.uint8)
    texture = cv2.resize(texture, (160, 64), interpolation=cv2.INTER_CUBIC)
    for number in range(12):
        cv2.imwrite(str(folder / f"{number}.png"), texture[:, 2 * number : 2 * number + 96])
    return folder


def environment(tmp_path: Path, domain: int) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "ROS_LOG_DIR": str(tmp_path / "ros"),
        "ROS_DOMAIN_ID": str(domain),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "FASTRTPS_DEFAULT_PROFILES_FILE": str(ROOT / "config" / "fastdds.xml"),
        "OMP_NUM_THREADS": "1",
    }


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "deq_flow_ros.ros.evaluate_bag", *(str(argument) for argument in arguments)]


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


def test_a_stream_goes_through_and_is_reported(model: Path, pictures: Path, tmp_path: Path) -> None:
    """The whole path that `make demo INPUT=...` takes: every frame accounted for, flow stamped by the header rule.

    Meanwhile another camera publishes under the usual name in the same ROS domain: it must not get mixed in.
    """
    out = tmp_path / "out"
    other = [sys.executable, "-m", "deq_flow_ros.ros.player", str(pictures), "--loop", "--ros-args"]
    camera = subprocess.Popen(
        [*other, "-r", "~/image:=/camera/image_raw"], env=environment(tmp_path, 71), stdout=subprocess.DEVNULL
    )
    try:
        result = subprocess.run(
            command(pictures, "--out", out, "--model", model, "--budget-ms", "2000", "--param", "max_iterations:=3"),
            cwd=tmp_path, env=environment(tmp_path, 71), capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert camera.poll() is None
    finally:
        camera.kill()
        camera.wait()
    assert result.returncode == 0, result.stdout + result.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    account = metrics["account"]
    assert account["published"] == account["received"] == 12 and account["problems"] == []
    assert account["processed"] + account["first"] + account["dropped"] == 12 and account["first"] == 1
    assert account["processed"] == account["flow_messages"] == len(metrics["pairs"]) > 3
    assert metrics["iterations"]["max"] == 3 and metrics["cold_against_warm"]["pairs"] > 0
    assert all(pair["flow"]["photometric"] is not None for pair in metrics["pairs"])
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert cv2.VideoCapture(str(out / "flow.mp4")).read()[0]
    assert processes_about(out) == []


def test_a_node_that_cannot_start_is_quoted(pictures: Path, tmp_path: Path) -> None:
    """The reason stands in a child's log: the user must see it at once, not an endless wait."""
    out, missing = tmp_path / "out", tmp_path / "missing.safetensors"
    result = subprocess.run(
        command(pictures, "--out", out, "--model", missing),
        cwd=tmp_path, env=environment(tmp_path, 72), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 3, result.stdout + result.stderr
    assert "flow_node could not start" in result.stdout and "missing.safetensors" in result.stdout
    assert not (out / "report.html").exists() and processes_about(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_behind(model: Path, pictures: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, and even a killed parent: players that publish on would disturb every later run."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(pictures, "--out", out, "--model", model, "--rate", "0.01"),
        cwd=tmp_path, env=environment(tmp_path, 73), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while "player" not in "".join(processes_about(out)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        assert len(processes_about(out)) >= 3
        process.send_signal(number)
        assert process.wait(timeout=30) == (130 if number == signal.SIGINT else -signal.SIGKILL)
        deadline = time.monotonic() + 20
        while processes_about(out) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert processes_about(out) == []
    finally:
        process.kill()


def test_a_live_input_is_recorded_with_its_images(model: Path, pictures: Path, tmp_path: Path) -> None:
    """A camera cannot be read again: what the report compares with has to be in the recording."""
    code = f"""
import json
from pathlib import Path
from deq_flow_ros.media import open_source
from deq_flow_ros.ros import live_run
parameters = {{"model": {str(model)!r}, "latency_budget_ms": "2000.0", "warm_up_width": "96", "warm_up_height": "64"}}
parameters |= {{"qos_reliability": "reliable", "qos_depth": "10"}}
options = live_run.RunOptions(
    {str(pictures)!r}, None, 0.2, 8, True, parameters, Path("bag"), Path("logs"), "sqlite3"
)
published = live_run.run(options, lambda progress: None)
frames = list(open_source("bag", live_run.IMAGE_TOPIC).frames())
print(json.dumps([published.stamps_ns, [frame.stamp_ns for frame in frames], published.seconds]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(tmp_path, 74),
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
        (("--rate", "0"), "expected --rate above 0, got 0.0"),
        (("--seconds", "-1"), "expected --seconds of at least 0, got -1.0"),
        (("--param", "threads=2"), "expected --param NAME:=VALUE, got 'threads=2'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parse_options(arguments)
        assert message in capsys.readouterr().err
    result = subprocess.run(
        command(tmp_path / "nowhere", "--out", tmp_path / "out"),
        cwd=tmp_path, env=environment(tmp_path, 75), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 2 and "nowhere does not exist" in result.stdout
