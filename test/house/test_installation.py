# SPDX-License-Identifier: Apache-2.0
"""What an installation holds: `ros2 run` and `ros2 launch` find nodes, launch files and configuration by place."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from installed_package import ROOT, SHARE, install

LAUNCH_FILES = sorted((ROOT / "launch").glob("*.launch.py"))


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation of the tree."""
    return install(tmp_path_factory.mktemp("prefix"))


def test_everything_is_where_ros_looks_for_it(prefix: Path) -> None:
    """A file left out of `setup.py` is missed only by those who install, never in the source tree."""
    assert (prefix / "share/ament_index/resource_index/packages/deq_flow_ros").is_file()
    assert ElementTree.parse(prefix / SHARE / "package.xml").findtext("name") == "deq_flow_ros"
    assert (prefix / SHARE / "LICENSE").is_file()
    for folder in ("launch", "config"):
        expected = {path.name for path in (ROOT / folder).iterdir() if path.is_file()}
        assert {path.name for path in (prefix / SHARE / folder).iterdir()} == expected, folder
    examples = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert {path.name for path in (prefix / SHARE / "examples").iterdir()} == examples
    assert {"flow.launch.py", "replay.launch.py"} <= {path.name for path in LAUNCH_FILES}
    assert {"flow.yaml", "fastdds.xml"} <= {path.name for path in (prefix / SHARE / "config").iterdir()}
    assert (prefix / "modules/deq_flow_ros/py.typed").is_file()
    for name in ("flow_node", "flow_view", "player", "evaluate_bag", "motion_mask"):
        assert os.access(prefix / "lib/deq_flow_ros" / name, os.X_OK), name
    for folder in ("deq_flow_ros/evaluation", "deq_flow_ros/evaluation/templates", "deq_flow_ros/ros/view/page"):
        expected = {path.name for path in (ROOT / folder).iterdir() if path.is_file()}
        assert expected <= {path.name for path in (prefix / "modules" / folder).iterdir()}, folder
    weights = prefix / "modules/deq_flow_ros/model/weights"
    for name in ("nano", "base"):
        assert (weights / f"{name}.safetensors").stat().st_size > 100_000 and (weights / f"{name}.md").is_file()


def test_an_installed_node_starts_from_its_wrapper(prefix: Path) -> None:
    """The wrappers are what `ros2 run` and launch files execute; nothing else here runs them."""
    pytest.importorskip("rclpy", reason="needs ROS 2")
    command = [sys.executable, str(prefix / "lib/deq_flow_ros/player"), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(prefix / "modules")}
    result = subprocess.run(command, env=environment, cwd=prefix, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "--wait-for-subscribers" in result.stdout, result.stderr


def test_setup_reads_no_file_that_is_not_installed(tmp_path: Path) -> None:
    """Why: `colcon build --symlink-install` runs it in a folder with links to what is installed, and nothing else."""
    for name in ("setup.py", "setup.cfg", "package.xml", "LICENSE", "deq_flow_ros"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "setup.py", "--version"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout.strip()[:1].isdigit(), result.stderr


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_launch_files_are_valid_python(path: Path) -> None:
    """Without launch_ros at hand, a slip in them would show only on a robot."""
    assert "generate_launch_description" in compile(path.read_text(), str(path), "exec").co_names
