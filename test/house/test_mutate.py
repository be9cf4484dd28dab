# SPDX-License-Identifier: Apache-2.0
"""The faults that are put into the code on purpose: that each can be, and that the table of who notices it is whole."""

from __future__ import annotations

import re

from mutate import FAULTS, ROOT


def test_each_fault_can_be_made() -> None:
    """Why: a line that was rewritten would take its fault out of the run until somebody runs it."""
    for what, name, line, broken, tests in FAULTS:
        assert (ROOT / name).read_text().count(line) == 1 and line != broken, what
        assert (ROOT / "test" / f"{tests}.py").is_file(), what


def test_the_table_of_faults_names_tests_that_there_are() -> None:
    """Why: whoever changes a central line looks there for what holds it."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (.+) \| `(\S+)::(\w+)` \|$", page, re.MULTILINE)
    assert [what for what, _, _ in rows] == [fault[0] for fault in FAULTS]
    for _, file, test in rows:
        assert f"def {test}(" in (ROOT / "test" / file).read_text(), f"{file} has no {test}"
