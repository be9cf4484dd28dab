# SPDX-License-Identifier: Apache-2.0
"""The parameters of `flow_node`: one table, from which they are declared, checked and read."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter


def _parameter(
    default: Any,
    description: str,
    unit: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    read_only: bool = False,
) -> Any:
    metadata = {
        "description": description,
        "unit": unit,
        "minimum": minimum,
        "maximum": maximum,
        "choices": choices,
        "read_only": read_only,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Values of all parameters. `config/flow.yaml` lists them with the same defaults."""

    model: str = _parameter("nano", "name of a model that ships with the package, or path of a weights file")
    device: str = _parameter("cpu", "where to compute: cpu, cuda or cuda:N; a device that is missing is an error")
    threads: int = _parameter(
        0, "threads to compute with on the CPU; 0 = all cores but one, left to the middleware", "", 0, 256
    )
    latency_budget_ms: float = _parameter(
        90.0, "time from the arrival of an image to its flow; 0 = no budget", "ms", 0.0, 60000.0
    )
    max_iterations: int = _parameter(12, "iterations of the equilibrium solver per image, at most", "", 1, 200)
    tolerance_px: float = _parameter(
        0.05, "RMS change of the flow at which iterating ends; 0 = only count and budget end it", "px", 0.0, 10.0
    )
    direction: str = _parameter(
        "forward",
        "forward: flow from the previous image to the current one, on the pixels and with the header of the previous; "
        "backward: from the current image to the previous one, on the pixels and with the header of the current",
        choices=("forward", "backward"),
    )
    min_scale: float = _parameter(
        0.25,
        "smallest part of the input resolution to compute at when the budget demands less work; images are not made "
        "smaller than 96 px on their short side, whatever this allows",
        "",
        0.0625,
        1.0,
    )
    max_gap_ms: float = _parameter(
        1000.0, "images further apart than this are not related: the stream starts anew", "ms", 1.0, 3600000.0
    )
    warm_up_width: int = _parameter(
        640, "image width whose cost configure measures; 0 = learn it from the first images", "px", 0, 8192
    )
    warm_up_height: int = _parameter(
        480, "image height whose cost configure measures; 0 = learn it from the first images", "px", 0, 8192
    )
    qos_reliability: str = _parameter(
        "best_effort",
        "reliability asked of the image publisher: best_effort receives from any; reliable loses no image in transport "
        "but receives nothing from a best-effort publisher",
        choices=("best_effort", "reliable"),
    )
    qos_depth: int = _parameter(
        5, "images the middleware may hold for the node, which takes them at once and itself keeps only the newest; "
        "with 1 it discards some without an account", "images", 1, 1000
    )
    autostart: bool = _parameter(
        True, "configure and activate at start; false = wait for a lifecycle manager", read_only=True
    )

    @classmethod
    def declare(cls, node: Node) -> None:
        """Declare everything on a node; rclpy refuses a value of the wrong type or out of range, naming both."""
        for field in dataclasses.fields(cls):
            node.declare_parameter(field.name, field.default, _descriptor(field))

    @classmethod
    def read(cls, node: Node) -> Settings:
        """Current values. Raises ValueError, naming what was expected and got, for values that do not go together."""
        settings = cls(**{field.name: node.get_parameter(field.name).value for field in dataclasses.fields(cls)})
        size = (settings.warm_up_width, settings.warm_up_height)
        if size != (0, 0) and min(size) < 16:
            raise ValueError(f"expected warm_up_width and warm_up_height to be both 0 or both at least 16, got {size}")
        return settings

    def compute_threads(self) -> int:
        """Number of threads that `threads` stands for."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) - 1)


def _descriptor(field: dataclasses.Field) -> ParameterDescriptor:
    about = field.metadata
    unit = f" [{about['unit']}]" if about["unit"] else ""
    descriptor = ParameterDescriptor(description=about["description"] + unit, read_only=about["read_only"])
    if about["choices"]:
        descriptor.additional_constraints = "one of: " + ", ".join(about["choices"])
    if about["minimum"] is not None:
        if isinstance(field.default, float):
            limits = FloatingPointRange(from_value=about["minimum"], to_value=about["maximum"], step=0.0)
            descriptor.floating_point_range = [limits]
        else:
            limits = IntegerRange(from_value=about["minimum"], to_value=about["maximum"], step=1)
            descriptor.integer_range = [limits]
    return descriptor


def check_change(parameters: Sequence[Parameter], configured: bool) -> SetParametersResult:
    """Answer to a request to set parameters: what ranges cannot express, and whether it would have any effect now."""
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    for parameter in parameters:
        field = fields.get(parameter.name)
        if field is None:
            continue  # ROS's own, such as use_sim_time
        choices = field.metadata["choices"]
        if choices and parameter.value not in choices:
            reason = f"{parameter.name}: expected one of {', '.join(choices)}, got {parameter.value!r}"
            return SetParametersResult(successful=False, reason=reason)
        if configured:
            reason = f"{parameter.name} is read in configure: call the transitions deactivate and cleanup first"
            return SetParametersResult(successful=False, reason=reason)
    return SetParametersResult(successful=True)


def misspelt_overrides(node: Node) -> list[str]:
    """A line for each value given at start that no parameter takes, as ROS drops these silently."""
    known = [field.name for field in dataclasses.fields(Settings)]
    lines = []
    for name in getattr(node, "_parameter_overrides", {}):  # rclpy offers no public way to ask
        if not node.has_parameter(name) and not name.startswith("qos_overrides."):
            close = difflib.get_close_matches(name, known, n=1)
            lines.append(f"no parameter {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return lines
