# SPDX-License-Identifier: Apache-2.0
"""A robot has what apt installs; packages of pip alone must not be needed until they are used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
from node_client import CAMERA_TOPIC, running_node

ROOT = Path(__file__).parents[2]
BLOCKER = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r} or name == "compression.zstd":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def without(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """In processes that are started from now on, these modules cannot be imported."""
    (folder / "sitecustomize.py").write_text(BLOCKER.format(names=names))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_node_computes_a_field_with_what_apt_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: an import that creeps in at the top of any module would end the node at its start, on robots alone."""
    names = ("rosbags", "apsw", "lz4", "backports", "av", "safetensors", "mcap")  # no keys of apt
    names += ("h5py", "pandas", "matplotlib", "jinja2", "tqdm")  # apt has them, the node has no need
    without(tmp_path, monkeypatch, *names)
    assert "No module named 'rosbags'" in run("-c", "import rosbags").stderr
    with running_node(tmp_path, f"~/image:={CAMERA_TOPIC}", model="nano") as (node, _):
        node.connect()
        node.send(node.image(), node.image())
        node.until(lambda: node.flow, "a field")
        assert node.flow[0].encoding == "32FC2"


def test_what_is_missing_is_said_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why: a traceback ends with the name of a module, which is often not the name of its package."""
    (tmp_path / "drive.mcap").touch()
    for command, module, remedy in (
        (("scripts/flow_node",), "torch", "pip install torch"),
        (("scripts/evaluate_bag", str(tmp_path / "drive.mcap")), "pandas", "apt install python3-pandas"),
        (("scripts/player", str(tmp_path / "drive.mcap")), "rosbags", "pip install rosbags"),
    ):
        without(tmp_path, monkeypatch, module)
        result = run(*command)
        assert result.returncode == 2
        # Kilted's middleware has a word about the name of an environment variable.
        told = [line for line in result.stderr.strip().splitlines() if "FASTRTPS_DEFAULT_PROFILES_FILE" not in line]
        assert f"needs the Python module {module}" in told[0] and remedy in told[0], result.stderr
        assert len(told) <= 3
