# SPDX-License-Identifier: Apache-2.0
"""What is imported is declared: for rosdep in package.xml, for pip in setup.py and the files of requirements."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
INSTALLED = ("deq_flow_ros", "launch", "examples", "scripts")
"""Folders of what a robot gets; training and benchmarks stay in the repository."""
OURS = {"deq_flow_ros", "training", "benchmarks"} | {path.stem for path in (ROOT / "test").glob("*.py")}
KEYS = {"cv2": "python3-opencv", "PIL": "python3-pil", "yaml": "python3-yaml"} | {
    name: f"python3-{name}" for name in ("h5py", "jinja2", "matplotlib", "numpy", "pandas", "rich", "torch")
}
"""Keys of rosdep that apt has packages for. Modules of ROS have their own names as keys."""
PIP = {
    "PIL": "pillow", "backports": "backports.zstd", "catkin_pkg": "catkin-pkg",
    "cv2": "opencv-python-headless", "google": "protobuf", "yaml": "PyYAML",
}  # fmt: skip
"""Names on PyPI, where they are not those of the modules."""
NO_KEY = {"apsw", "av", "backports", "lz4", "rosbags"}
"""Rosdep knows these as packages of pip, or not at all, and a release by bloom may not depend on such."""
OPTIONAL = {"onnx", "onnxruntime", "onnxscript", "openvino"}
"""What is used where it is installed, and tried for in the code."""
COMMANDS = {"ros2launch"}
"""Not imported, but needed: `ros2 launch`."""


def imported(*folders: str) -> set[str]:
    """Names of the modules from elsewhere that the files of some folders import, anywhere in them."""
    found = set()
    for folder in folders:
        files = (ROOT / folder).iterdir() if folder == "scripts" else (ROOT / folder).rglob("*.py")
        for path in files:
            if not path.is_file():
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"compression"} - OURS


def of_ros(module: str) -> bool:
    return module in ROS or module.endswith(("_msgs", "_interfaces", "_srvs"))


ROS = {
    "ament_index_python", "bond", "cv_bridge", "launch", "launch_ros", "launch_testing", "message_filters", "rclpy",
    "sensor_msgs_py",
}  # fmt: skip


def declared(kind: str) -> set[str]:
    """The dependencies of one kind in package.xml."""
    return {str(element.text) for element in ElementTree.parse(ROOT / "package.xml").iter(kind)}


def names(text: str) -> set[str]:
    """Names of packages in the lines of requirements; versions, extras and comments are left out."""
    lines = (re.match(r"[A-Za-z0-9._-]+", line.strip().strip("\"'")) for line in text.splitlines())
    return {line.group() for line in lines if line}


def test_package_xml_names_what_a_robot_imports() -> None:
    """Why: a package that is missing there is missing on each robot that installs by rosdep or apt."""
    modules = imported(*INSTALLED) - OPTIONAL - NO_KEY
    assert len(modules) > 15  # else the imports were not found
    unknown = {module for module in modules if module not in KEYS and not of_ros(module)}
    assert not unknown, f"say in KEYS, NO_KEY or OPTIONAL how these are installed: {sorted(unknown)}"
    assert {KEYS.get(module, module) for module in modules} == declared("exec_depend") - COMMANDS
    assert {"python3-pytest", "launch_testing"} == declared("test_depend")


def test_pip_is_told_the_same() -> None:
    """Why: `pip install` and `make venv` must bring what the code imports, and nothing else."""
    modules = imported(*INSTALLED) - OPTIONAL
    expected = {PIP.get(module, module) for module in modules if not of_ros(module)}
    setup = (ROOT / "setup.py").read_text()
    found = re.search(r"install_requires=\[\n(.*?)\n    \]", setup, re.DOTALL)
    assert found and names(found[1].replace("'", '"')) == expected
    assert names((ROOT / "requirements.txt").read_text()) == expected


def test_what_tests_and_training_import_is_listed_too() -> None:
    """Why: it is on the machine of who wrote the import, and missing on all others."""
    extra = {PIP.get(module, module) for module in imported("training", "benchmarks", "test") if not of_ros(module)}
    listed = set().union(*(names(path.read_text()) for path in ROOT.glob("requirements*.txt")))
    assert extra - listed - OPTIONAL == set()


def test_each_requirement_has_a_tested_version() -> None:
    """Why: an unpinned package changes under everybody's feet."""
    pinned = names((ROOT / "constraints.txt").read_text())
    for path in ROOT.glob("requirements*.txt"):
        if path.name != "requirements-docs.txt":  # nothing runs with those
            assert names(path.read_text()) <= pinned, path.name
