# SPDX-License-Identifier: Apache-2.0
"""Settings of ``--compare`` mean what they say, and what is wrong with one is named."""

from __future__ import annotations

import pytest

from deq_flow_ros.evaluation.settings import Setting, all_settings, parse_setting


def test_settings_are_read_from_the_command_line() -> None:
    """What a setting does not name is that of the main one."""
    main = Setting("main", model="tiny", budget_ms=40.0, direction="backward")
    first, second = all_settings(main, ["cold:warm=false,budget_ms=none", "dis"])[1:]
    assert (first.warm, first.budget_ms, first.model, first.direction) == (False, None, "tiny", "backward")
    assert (second.method, second.solves, second.direction) == ("dis", False, "backward")
    for text, message in (
        ("x:warm=maybe", "expected warm to be true or false, got 'maybe'"),
        ("x:max_iterations=2.5", "expected max_iterations to be int, got '2.5'"),
        ("x:budget_ms=nan", "expected budget_ms"),
        ("x:name=y", "expected NAME:KEY=VALUE"),
        ("x:device=gpu", "expected the device cpu, cuda or cuda:N, got 'gpu'"),
        ("x:method=best", "expected one of the methods deq, dis, farneback"),
        (":warm=true", "expected a name"),
        ("diss", r"got 'diss' \(did you mean 'dis'\?\)"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_setting(text, main)
