# SPDX-License-Identifier: Apache-2.0
"""One style of docstrings: Sphinx fields, and code in double backquotes. ruff's rules `D` hold the rest."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("deq_flow_ros", "training", "benchmarks")
OTHER_STYLES = {
    "code in single backquotes": r"(?<!`)`[^`\n]+`(?!`)",
    "a section of Google's style": r"^\s*(Args|Arguments|Returns|Raises|Yields):\s*$",
    "errors in prose instead of :raises:": r"\bRaises ",
}


def docstrings(tree: ast.Module) -> list[ast.Constant]:
    """Of the module, of what it defines, and of the attributes that have one below them."""
    bodies = [node.body for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list)]
    values = [item.value for body in bodies for item in body if isinstance(item, ast.Expr)]
    return [value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]


@pytest.mark.parametrize("style", OTHER_STYLES)
def test_docstrings_have_one_style(style: str) -> None:
    """Why: two styles side by side are read slower than either, and tools know but one of them."""
    found, seen = [], 0
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        for text in docstrings(ast.parse(path.read_text())):
            seen += 1
            if re.search(OTHER_STYLES[style], str(text.value), re.MULTILINE):
                found.append(f"{path.relative_to(ROOT)}:{text.lineno}")
    assert found == [] and seen > 500, style
