# SPDX-License-Identifier: Apache-2.0
"""Break central lines one at a time, in a copy of the tree, and say which tests notice; not collected by pytest.

    python test/mutate.py

Exit status: 0 each fault was noticed, 1 one was not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FAULTS = [
    # what, file below deq_flow_ros, line, broken line, test files
    ("order of levels", "model/correlation.py", "enumerate(self.levels, ", "enumerate(self.levels[::-1], ", "model"),
    ("upsampling", "model/upsampling.py", "reshape(cells, 2, 9)", "reshape(cells, 2, 9).flip(2)", "formulas"),
    ("gate fusion", "model/update.py", "sigmoid_().chunk(2, 1)", "sigmoid_().chunk(2, 1)[::-1]", "formulas"),
    ("fixed part of the gates", "model/update.py", "context, weight[:, h:c]", "context, -weight[:, h:c]", "formulas"),
    ("direction of carrying", "streaming/warm_start.py", "state[1] if direction", "-state[1] if direction", "formulas"),
    ("deadline", "equilibrium/stopping.py", "cost_ns <= deadline_ns", "cost_ns >= deadline_ns", "equilibrium"),
    ("tolerance", "equilibrium/stopping.py", "measured <= self.tol", "measured >= self.tol", "equilibrium"),
    ("account of drops", "ros/accounts.py", '["lost"] += lost_before', '["lost"] -= lost_before', "accounts"),
    ("frames received", "ros/accounts.py", '["received"] += 1', '["received"] += 2', "accounts"),
]  # fmt: skip


def main() -> int:
    """Run the command; returns its exit status."""
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        if (ROOT.parent / "shared").is_dir():  # reference data of test_parity.py
            (Path(folder) / "shared").symlink_to(ROOT.parent / "shared")
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "build"))
        for what, name, line, broken, tests in FAULTS:
            path = tree / "deq_flow_ros" / name
            right = path.read_text(encoding="utf-8")
            if right.count(line) != 1:
                raise SystemExit(f"{what}: expected {line!r} once in {name}, found it {right.count(line)} times")
            path.write_text(right.replace(line, broken), encoding="utf-8")
            files = [str(next((tree / "test").rglob(f"test_{test}.py"))) for test in tests.split()]
            command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *files]
            said = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True).stdout
            path.write_text(right, encoding="utf-8")
            noticed = re.search(r"^(?:FAILED|ERROR) test/(\S+)", said, re.MULTILINE)
            missed += noticed is None
            print(f"{what}: {noticed[1] if noticed else 'NOT NOTICED'}", flush=True)
    return 1 if missed else 0


def environment(tree: Path) -> dict[str, str]:
    """That of this process, with the copy in front of what is installed."""
    return {**os.environ, "PYTHONPATH": str(tree)}


if __name__ == "__main__":
    sys.exit(main())
