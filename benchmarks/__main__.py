# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks``: which benchmarks there are, and what each of them measures."""

from __future__ import annotations

import ast
import sys
from pathlib import Path


def commands() -> dict[str, str]:
    """The first paragraph of the docstring of every benchmark, by its name. None of them is imported."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        tree = ast.parse(path.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
    return found


if __name__ == "__main__":
    print("python -m benchmarks.NAME, with --help for what it measures and its options:")
    for name, about in commands().items():
        print(f"  {name:16} {about}")
    sys.exit(0 if sys.argv[1:] in ([], ["-h"], ["--help"]) else 2)
