# SPDX-License-Identifier: Apache-2.0
"""What may be asked of the parameters of ``flow_node``, and the words for what may not."""

from __future__ import annotations

import array
import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rcl_interfaces.msg import SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter

from deq_flow_ros.ros.parameter_table import all_as_declared
from deq_flow_ros.ros.parameters import LIVE, NodeSettings
from deq_flow_ros.spelling import did_you_mean


def changed(parameters: Iterable[Parameter], node: Node) -> list[Parameter]:
    """Those of the parameters whose value is another than the node's, whole numbers as real ones where these are meant.

    ``ros2 param load`` sets all that ``ros2 param dump`` wrote, be they for reading only or not to be changed now.
    """
    return [
        parameter
        for parameter in all_as_declared(parameters, node)
        if not node.has_parameter(parameter.name)
        or _plain(parameter.value) != _plain(node.get_parameter_or(parameter.name).value)
    ]


def answer_at_once(parameters: Sequence[Parameter], node: Node) -> SetParametersResult | None:
    """The answer to a request for a parameter that the node does not have, or for nothing new; None for any other."""
    for parameter in parameters:
        if not node.has_parameter(parameter.name):
            hint = did_you_mean(parameter.name, [field.name for field in dataclasses.fields(NodeSettings)])
            reason = f"no parameter {parameter.name!r}{hint}; nothing was changed"
            return SetParametersResult(successful=False, reason=reason)
    return None if changed(parameters, node) else SetParametersResult(successful=True)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple, array.array)) else (type(value), value)


def check_change(parameters: Sequence[Parameter], node: Node, configured: bool) -> SetParametersResult:
    """Answer to a request to set parameters: what ranges cannot express, and whether it would have any effect now."""
    fields = {field.name for field in dataclasses.fields(NodeSettings)}
    ours = [parameter for parameter in parameters if parameter.name in fields]  # others: ROS's own, as use_sim_time
    try:
        NodeSettings.check_choices(ours)
        for parameter in ours:
            if parameter.name in _CHECKS:
                _CHECKS[parameter.name](parameter.value)
            if configured and parameter.name not in LIVE:
                raise ValueError(
                    f"{parameter.name} is read in configure: call the transitions deactivate and cleanup first"
                )
        # Before configure, values that belong together may still come one by one: configure checks them.
        if configured and ours:
            NodeSettings.read(node, ours)
    except ValueError as error:
        return SetParametersResult(successful=False, reason=str(error))
    return SetParametersResult(successful=True)


def _check_cameras(names: Sequence[str]) -> None:
    valid = list(names) == [""] or (names and all(re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name) for name in names))
    if not valid or len(set(names)) != len(names):
        raise ValueError(
            'cameras: expected [""] or different names of letters, digits and _ that start with a letter, '
            f"got {list(names)}"
        )


def _check_roi(roi: Sequence[int]) -> None:
    whole = not any(roi)
    if len(roi) != 4 or not (whole or (min(roi[:2]) >= 0 and min(roi[2:]) >= 16 and max(roi) < 2**31)):
        raise ValueError(
            "roi: expected [x, y, width, height] with x, y >= 0 and width, height >= 16, or four times 0, "
            f"got {list(roi)}"
        )


def _check_intensity_range(ends: Sequence[int]) -> None:
    if list(ends) != [0, 0] and not (len(ends) == 2 and 0 <= ends[0] < ends[1] < 2**16):
        raise ValueError(
            "intensity_range: expected [black, white] with 0 <= black < white <= 65535, or [0, 0] for the range of the "
            f"images, got {list(ends)}"
        )


_CHECKS: dict[str, Callable[[Any], None]] = {
    "cameras": _check_cameras,
    "roi": _check_roi,
    "intensity_range": _check_intensity_range,
}
"""Of arrays, for which ROS knows no ranges."""
