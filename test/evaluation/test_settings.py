# SPDX-License-Identifier: Apache-2.0
"""Settings of ``--compare`` mean what they say, and what is wrong with one is named."""

from __future__ import annotations

import pytest

from deq_flow_ros.evaluation.command import parse_options
from deq_flow_ros.evaluation.methods import Setting, all_settings, parse_setting, with_parameters


def test_settings_are_read_from_the_command_line() -> None:
    """What a setting does not name is that of the main one."""
    main = Setting("main", model="tiny", budget_ms=40.0, direction="backward")
    first, second = all_settings(main, ["cold:warm=false,budget_ms=none", "dis"])[1:]
    assert (first.warm, first.budget_ms, first.model, first.direction) == (False, None, "tiny", "backward")
    assert (second.method, second.solves, second.direction) == ("dis", False, "backward")
    for text, message in (
        ("x:warm=maybe", "expected warm to be true or false, got 'maybe'"),
        ("x:max_iterations=2.5", "expected max_iterations to be a whole number, got '2.5'"),
        ("x:budget_ms=nan", "expected budget_ms to be a number or none"),
        ("x:name=y", "expected NAME:KEY=VALUE"),
        ("x:device=gpu", "expected the device cpu, cuda or cuda:N, got 'gpu'"),
        ("x:method=best", "expected one of the methods deq, dis, farneback"),
        (":warm=true", "expected a name"),
        ("x:warm=false,warm=true", "expected one value of warm, got several in 'x:warm"),
        ("x:max_iteration=3", r"\(did you mean 'max_iterations'\?\)"),
        ("dis:refinement=5", "dis has no refinement; what can be set of it is direction and max_gap_ms"),
        ("x:method=farneback,warm=false", "farneback has no warm"),
        ("dis:method=farneback", "another name for the method farneback"),
        ("diss", r"got 'diss' \(did you mean 'dis'\?\)"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_setting(text, main)


def test_a_parameter_that_is_given_twice_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Taking the last one would evaluate something else than half of the command line says."""
    for texts, message in (
        (["refinement:=5", "refinement:=0"], "expected one value of refinement, got several with --param"),
        (["latency_budget_ms:=8"], "expected --budget-ms for the parameter latency_budget_ms"),
        (["warm"], "expected --param NAME:=VALUE, got 'warm'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parse_options(["bag", *(word for text in texts for word in ("--param", text))])
        assert message in capsys.readouterr().err
    for name, said in (("refinements", r"did you mean 'refinement'\?"), ("roi", "the other parameters of flow_node")):
        with pytest.raises(ValueError, match=said):
            with_parameters(Setting("main"), {name: "1"})
    given = {"tolerance_px": "0", "min_scale": "0.5", "max_gap_ms": "9"}
    assert with_parameters(Setting("any"), given) == Setting("any", tolerance_px=None, min_scale=0.5, max_gap_ms=9.0)
