# SPDX-License-Identifier: Apache-2.0
"""What all tests share: one thread, a ROS domain of their own, and which of them may run side by side."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ros_environment import set_ros_environment

if TYPE_CHECKING:
    from exported_graphs import Exported

# Before any test module imports torch: one thread here and in each child process. The tests share the machine, and a
# second thread that waits for a busy core is slower than none.
os.environ["OMP_NUM_THREADS"] = "1"


@functools.cache
def uses_ros(path: Path) -> bool:
    """Whether a test file takes anything from ROS, or starts a program that does."""
    return re.search(r"\brclpy\b|\bdeq_flow_ros\.(ros|live)\b", path.read_text(encoding="utf-8")) is not None


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist writes the groups into the names of the tests
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that use ROS, and tell pytest-xdist which tests share a process.

    All tests with ROS do, so that no node ever runs beside one of another test: discovery and arrival times are what
    many of them look at. Every other file is a group of its own, so that its fixtures are made once.
    """
    for item in items:
        if uses_ros(item.path):
            item.add_marker("ros")
        if config.pluginmanager.hasplugin("xdist"):
            item.add_marker(pytest.mark.xdist_group("ros" if uses_ros(item.path) else item.path.stem))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """ONNX graphs of a small model, to read."""
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"exporting and comparing needs {package}")
    from exported_graphs import Exported, small_model

    from training.export import export_checked

    folder = tmp_path_factory.mktemp("graphs")
    return Exported(folder, export_checked(small_model(), folder))


@pytest.fixture(scope="session", autouse=True)
def ros_environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    """See `set_ros_environment`."""
    set_ros_environment(tmp_path_factory.mktemp("ros_log"))
