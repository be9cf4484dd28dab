# SPDX-License-Identifier: Apache-2.0
"""The parameters of `flow_node`: one table, from which they are declared, checked and read."""

from __future__ import annotations

import array
import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSPolicyKind

from deq_flow_ros.model import PRECISIONS

OVERRIDABLE = (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY, QoSPolicyKind.DURABILITY)
"""What ROS's own `qos_overrides` parameters may set of the node's topics."""


def _parameter(
    default: Any,
    description: str,
    unit: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    live: bool = False,
    read_only: bool = False,
) -> Any:
    """A row of the table. `live`: a change takes effect with the next image; the others are read in configure."""
    metadata = {
        "description": description,
        "unit": unit,
        "minimum": minimum,
        "maximum": maximum,
        "choices": choices,
        "live": live,
        "read_only": read_only,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Values of all parameters. `config/flow.yaml` lists them with the same defaults."""

    cameras: tuple[str, ...] = _parameter(
        ("",),
        "names of the cameras, which share one model: NAME has its topics below ~/NAME/ (~/NAME/image, ~/NAME/flow and "
        "so on); the only name \"\" is one camera with its topics straight below the node",
    )
    model: str = _parameter("nano", "name of a model that ships with the package, or path of a weights file")
    device: str = _parameter("cpu", "where to compute: cpu, cuda or cuda:N; a device that is missing is an error")
    precision: str = _parameter(
        "auto",
        "type of weights and features: float32, bfloat16 or float16; auto is bfloat16 on a CPU with instructions for "
        "it (AVX512-BF16, AMX), 1.3 to 1.5 times as fast, and float32 elsewhere. The flow is float32 whatever it is",
        choices=PRECISIONS,
    )
    threads: int = _parameter(
        0, "threads to compute with on the CPU; 0 = all cores but one, left to the middleware", "", 0, 256
    )

    latency_budget_ms: float = _parameter(
        90.0, "time from the arrival of an image to its flow; 0 = no budget", "ms", 0.0, 60000.0, live=True
    )
    latency_from: str = _parameter(
        "arrival",
        "where the budget starts to count: arrival of the image at this machine's middleware; or its stamp, by the ROS "
        "clock, so that the camera's own delay counts as well (a stamp that is not 0 to 10 s old is not believed)",
        choices=("arrival", "stamp"),
        live=True,
    )
    max_iterations: int = _parameter(
        12,
        "iterations of the equilibrium solver per pair of images, at most; a cold start (no pair before) makes up to 4 "
        "more at each of two smaller resolutions first, or of more where max_scale enlarges the image",
        "",
        1,
        200,
        live=True,
    )
    tolerance_px: float = _parameter(
        0.05,
        "RMS change of the flow at which iterating ends; 0 = only count and budget end it",
        "px",
        0.0,
        10.0,
        live=True,
    )
    direction: str = _parameter(
        "forward",
        "forward: flow from the previous image to the current one, on the pixels and with the header of the previous; "
        "backward: from the current image to the previous one, on the pixels and with the header of the current",
        choices=("forward", "backward"),
        live=True,
    )
    min_scale: float = _parameter(
        0.25,
        "smallest part of the input resolution to compute at when the budget demands less work; images are not made "
        "smaller than 96 px on their short side, whatever this allows",
        "",
        0.0625,
        4.0,
        live=True,
    )
    max_scale: float = _parameter(
        1.0,
        "largest part of the input resolution to compute at; above 1 images are enlarged, for finer flow at more cost; "
        "whatever this allows, none is computed at more than 4,194,304 pixels, or 1,048,576 by a model with GMA",
        "",
        0.0625,
        4.0,
        live=True,
    )
    max_gap_ms: float = _parameter(
        1000.0,
        "images further apart than this are not related: the stream starts anew",
        "ms",
        1.0,
        3600000.0,
        live=True,
    )
    warm_up_width: int = _parameter(
        640, "image width whose cost configure measures; 0 = learn it from the first images", "px", 0, 8192
    )
    warm_up_height: int = _parameter(
        480, "image height whose cost configure measures; 0 = learn it from the first images", "px", 0, 8192
    )

    image_transport: str = _parameter(
        "auto",
        "raw: the image topic; compressed: IMAGE/compressed beside it; auto: whichever is published, raw if both are. "
        "An image topic that itself carries sensor_msgs/CompressedImage is understood by auto and compressed",
        choices=("auto", "raw", "compressed"),
    )
    qos_reliability: str = _parameter(
        "best_effort",
        "reliability asked of the image publisher: best_effort receives from any; reliable loses no image in transport "
        "but receives nothing from a best-effort publisher",
        choices=("best_effort", "reliable"),
    )
    qos_depth: int = _parameter(
        5,
        "images the middleware may hold for the node, which takes them at once and itself keeps only the newest; "
        "with 1 it discards some without an account",
        "images",
        1,
        1000,
    )
    max_rate_hz: float = _parameter(
        0.0,
        "images processed per second and camera, at most, more than 1000 / max_gap_ms; 0 = every image",
        "Hz",
        0.0,
        1000.0,
        live=True,
    )
    silence_warning_s: float = _parameter(
        5.0,
        "time without an image after which the node warns and says why none comes, again at doubling intervals; "
        "0 = never",
        "s",
        0.0,
        3600.0,
        live=True,
    )

    roi: tuple[int, int, int, int] = _parameter(
        (0, 0, 0, 0),
        "region of interest [x, y, width, height] in pixels of the image, which alone is processed and published; "
        "all 0 = the whole image; width and height are at least 16",
        live=True,
    )
    output_scale: float = _parameter(
        1.0,
        "size of the published fields as a part of the image's (or region's); lengths are in pixels of the published "
        "field, and camera_info is scaled alike",
        "",
        0.0625,
        1.0,
        live=True,
    )
    units: str = _parameter(
        "px",
        "of the published flow: px, displacement in pixels; normalized_per_second, velocity in normalized image "
        "coordinates (focal length 1), which needs camera_info",
        choices=("px", "normalized_per_second"),
        live=True,
    )
    points_stride: int = _parameter(
        8, "distance of the points of ~/points, across and down, in the published flow", "px", 1, 256, live=True
    )
    color_max_px: float = _parameter(
        0.0,
        "length of flow with full saturation in ~/flow_color; 0 = the largest of each field",
        "px",
        0.0,
        10000.0,
        live=True,
    )
    compressed_format: str = _parameter(
        "jpeg", "format of ~/flow_color/compressed", choices=("jpeg", "png"), live=True
    )
    jpeg_quality: int = _parameter(90, "quality of ~/flow_color/compressed as jpeg", "", 1, 100, live=True)

    diagnostics_period_s: float = _parameter(1.0, "time between two messages on /diagnostics", "s", 0.1, 3600.0)
    snapshot_folder: str = _parameter(
        "",
        "folder for what the service ~/snapshot writes, one folder each; empty = flow_snapshots beside ROS's log files",
        live=True,
    )
    autostart: bool = _parameter(
        True, "configure and activate at start; false = wait for a lifecycle manager", read_only=True
    )

    @classmethod
    def declare(cls, node: Node) -> None:
        """Declare everything on a node; rclpy refuses a value of the wrong type or out of range, naming both."""
        for field in dataclasses.fields(cls):
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            node.declare_parameter(field.name, default, _descriptor(field))

    @classmethod
    def read(cls, node: Node, changes: Iterable[Parameter] = ()) -> Settings:
        """Current values of a node's parameters, but for those about to change.

        Raises ValueError, naming what was expected and got, for values that do not go together.
        """
        values: dict[str, Any] = {f.name: node.get_parameter(f.name).value for f in dataclasses.fields(cls)}
        values.update({change.name: change.value for change in changes if change.name in values})
        arrays = {name: tuple(value) for name, value in values.items() if isinstance(value, (list, array.array))}
        settings = cls(**{**values, **arrays})
        settings.check()
        return settings

    def check(self) -> None:
        """Raises ValueError, naming what was expected and got, for values that do not go together."""
        size = (self.warm_up_width, self.warm_up_height)
        if size != (0, 0) and min(size) < 16:
            raise ValueError(f"expected warm_up_width and warm_up_height to be both 0 or both at least 16, got {size}")
        if self.min_scale > self.max_scale:
            raise ValueError(f"expected min_scale <= max_scale, got {self.min_scale:g} and {self.max_scale:g}")
        if 0.0 < self.max_rate_hz <= 1000.0 / self.max_gap_ms:  # jitter makes a gap of every second one that is equal
            raise ValueError(
                f"max_rate_hz {self.max_rate_hz:g} leaves {1000.0 / self.max_rate_hz:g} ms between images, which "
                f"max_gap_ms {self.max_gap_ms:g} takes for gaps, so that no flow would come: expected "
                "max_rate_hz above 1000 / max_gap_ms; raise one of them"
            )

    def compute_threads(self) -> int:
        """Number of threads that `threads` stands for."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) - 1)

    def of_estimator(self) -> dict[str, Any]:
        """The settings of `FlowEstimator`, for which "none" is None instead of 0."""
        return {
            "latency_budget_ms": self.latency_budget_ms or None,
            "max_iterations": self.max_iterations,
            "tolerance_px": self.tolerance_px or None,
            "direction": self.direction,
            "min_scale": self.min_scale,
            "max_scale": self.max_scale,
            "max_gap_ms": self.max_gap_ms,
        }


LIVE = frozenset(field.name for field in dataclasses.fields(Settings) if field.metadata["live"])
"""Names of the parameters that may change while the node is configured."""


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


def check_change(parameters: Sequence[Parameter], node: Node, configured: bool) -> SetParametersResult:
    """Answer to a request to set parameters: what ranges cannot express, and whether it would have any effect now."""
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    ours = [parameter for parameter in parameters if parameter.name in fields]  # others: ROS's own, as use_sim_time
    try:
        for parameter in ours:
            choices = fields[parameter.name].metadata["choices"]
            if choices and parameter.value not in choices:
                raise ValueError(f"{parameter.name}: expected one of {', '.join(choices)}, got {parameter.value!r}")
            if parameter.name in _CHECKS:
                _CHECKS[parameter.name](parameter.value)
            if configured and parameter.name not in LIVE:
                raise ValueError(
                    f"{parameter.name} is read in configure: call the transitions deactivate and cleanup first"
                )
        # Before configure, values that belong together may still come one by one: configure checks them.
        if configured and ours:
            Settings.read(node, ours)
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


_CHECKS: dict[str, Callable[[Any], None]] = {"cameras": _check_cameras, "roi": _check_roi}
"""Of arrays, for which ROS knows no ranges."""


def misspelt_overrides(node: Node) -> list[str]:
    """A line for each value given at start that no parameter takes, as ROS drops these silently."""
    known = [field.name for field in dataclasses.fields(Settings)]
    lines = []
    for name in getattr(node, "_parameter_overrides", {}):  # rclpy offers no public way to ask
        if not node.has_parameter(name) and not name.startswith("qos_overrides."):
            close = difflib.get_close_matches(name, known, n=1)
            lines.append(f"no parameter {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return lines


def unused_qos_overrides(node: Node, inputs: Iterable[str]) -> list[str]:
    """A line for each `qos_overrides` parameter given at start that none of the node's topics takes.

    :param inputs: full names of the topics that the node may subscribe to; those of its publishers it knows itself.
    """
    policies = [kind.name.lower() for kind in OVERRIDABLE]
    taken = {f"qos_overrides.{topic}.subscription.{policy}" for topic in inputs for policy in policies}
    return [
        f"{name!r} changes nothing: expected qos_overrides.TOPIC.{{publisher,subscription}}.{{{','.join(policies)}}} "
        "with the full name of a topic of this node"
        for name in getattr(node, "_parameter_overrides", {})
        if name.startswith("qos_overrides.") and not node.has_parameter(name) and name not in taken
    ]
