# SPDX-License-Identifier: Apache-2.0
"""The parameters of ``flow_node``: one table, from which they are declared and read."""

from __future__ import annotations

import array
import dataclasses
import os
from collections.abc import Iterable
from functools import partial
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.exceptions import ParameterException
from rclpy.node import Node
from rclpy.parameter import Parameter

from deq_flow_ros.model import PRECISIONS
from deq_flow_ros.streaming import RUNTIMES


@dataclasses.dataclass(frozen=True)
class Value:
    """What a parameter may be: a number from ``minimum`` to ``maximum`` in a unit, or one of ``choices``."""

    default: Any
    minimum: float | None = None
    maximum: float | None = None
    unit: str = ""
    choices: tuple[str, ...] = ()


number = Value


def one_of(default: str, *others: str) -> Value:
    """One of these words."""
    return Value(default, choices=(default, *others))


def configured(value: Any, description: str, when: str = "configure") -> Any:
    """A row of the table: what the parameter may be, or its default alone, and what it is for.

    :param when: it is read: in "configure"; "live", so that a change takes effect with the next image; at "start".
    """
    value = value if isinstance(value, Value) else Value(value)
    about = {**vars(value), "description": description, "live": when == "live", "at_start": when == "start"}
    return dataclasses.field(default=about.pop("default"), metadata=about)


live = partial(configured, when="live")


@dataclasses.dataclass(frozen=True)
class NodeSettings:
    """Values of all parameters. ``config/flow.yaml`` lists them with the same defaults."""

    cameras: tuple[str, ...] = configured(
        ("",),
        "names of the cameras, which share one model: NAME has its topics below ~/NAME/ (~/NAME/image, ~/NAME/flow "
        'and so on); the only name "" is one camera with its topics straight below the node',
    )
    model: str = configured("nano", "name of a model that ships with the package, or path of a weights file")
    device: str = configured("cpu", "where to compute: cpu, cuda or cuda:N; a device that is missing is an error")
    precision: str = configured(
        one_of(*PRECISIONS),
        "type of weights and features; auto is float16 on CUDA, bfloat16 on a CPU with instructions for it "
        "(AVX512-BF16, AMX), and float32 elsewhere. The flow is float32 whatever it is",
    )
    gpu_runtime: str = configured(
        one_of(*RUNTIMES), "what computes on CUDA: eager, graphs, or graphs of compiled code; auto = the fastest"
    )
    threads: int = configured(
        number(0, 0, 256), "threads to compute with on the CPU; 0 = all cores but one, left to the middleware"
    )

    latency_budget_ms: float = live(
        number(90.0, 0.0, 60000.0, "ms"), "time from the arrival of an image to its flow; 0 = no budget"
    )
    latency_from: str = live(
        one_of("arrival", "stamp"),
        "where the budget starts to count: arrival of the image at this machine's middleware; or its stamp, by the "
        "ROS clock, so that the camera's own delay counts as well (a stamp that is not 0 to 10 s old is not believed)",
    )
    max_iterations: int = live(
        number(6, 1, 200),
        "iterations of the equilibrium solver per pair of images, at most; a cold start (no pair before) makes up to "
        "4 more at each of two smaller resolutions first, or of more where max_scale enlarges the image",
    )
    tolerance_px: float = live(
        number(0.1, 0.0, 10.0, "px"),
        "RMS change of the flow at which iterating ends; 0 = only count and budget end it",
    )
    direction: str = live(
        one_of("forward", "backward"),
        "forward: flow from the previous image to the current one, on the pixels and with the header of the previous;"
        " backward: from the current image to the previous one, on the pixels and with the header of the current",
    )
    min_scale: float = live(
        number(0.25, 0.0625, 4.0),
        "smallest part of the input resolution to compute at when the budget demands less work; images are not made "
        "smaller than 96 px on their short side, whatever this allows",
    )
    max_scale: float = live(
        number(1.0, 0.0625, 4.0),
        "largest part of the input resolution to compute at; above 1 images are enlarged, for finer flow at more "
        "cost; whatever this allows, none is computed at more than 4,194,304 pixels, or 1,048,576 by a model with GMA",
    )
    refinement: int = live(
        number(0, 0, 20), "steps of a refinement of the flow at the resolution of the image, on the CPU; 0 = none"
    )
    max_gap_ms: float = live(
        number(1000.0, 1.0, 3600000.0, "ms"), "images further apart than this are not related: the stream starts anew"
    )
    warm_up_width: int = configured(
        number(640, 0, 8192, "px"), "image width whose cost configure measures; 0 = learn it from the first images"
    )
    warm_up_height: int = configured(
        number(480, 0, 8192, "px"), "image height whose cost configure measures; 0 = learn it from the first images"
    )

    image_transport: str = configured(
        one_of("auto", "raw", "compressed"),
        "raw: the image topic; compressed: IMAGE/compressed beside it; auto: whichever is published, raw if both are."
        " An image topic that itself carries sensor_msgs/CompressedImage is understood by auto and compressed",
    )
    qos_reliability: str = configured(
        one_of("best_effort", "reliable"),
        "reliability asked of the image publisher: best_effort receives from any; reliable loses no image in "
        "transport but receives nothing from a best-effort publisher",
    )
    qos_depth: int = configured(
        number(5, 1, 1000, "images"),
        "images the middleware may hold for the node, which takes them at once and itself keeps only the newest; with"
        " 1 it discards some without an account",
    )
    max_rate_hz: float = live(
        number(0.0, 0.0, 1000.0, "Hz"),
        "images processed per second and camera, at most, more than 1000 / max_gap_ms; 0 = every image",
    )
    silence_warning_s: float = live(
        number(5.0, 0.0, 3600.0, "s"),
        "time without an image after which the node warns and says why none comes, again at doubling intervals; 0 = "
        "never",
    )

    roi: tuple[int, int, int, int] = live(
        (0, 0, 0, 0),
        "region of interest [x, y, width, height] in pixels of the image, which alone is processed and published; all"
        " 0 = the whole image; width and height are at least 16",
    )
    intensity_range: tuple[int, int] = live(
        (0, 0),
        "[black, white] of a 16-bit camera in counts of 0 to 65535, such as [7000, 9000] of a thermal one; [0, 0] = "
        "the range that its images use, held as long as they fit into it",
    )
    output_scale: float = live(
        number(1.0, 0.0625, 1.0),
        "size of the published fields as a part of the image's (or region's); lengths are in pixels of the published "
        "field, and camera_info is scaled alike",
    )
    units: str = live(
        one_of("px", "normalized_per_second"),
        "of the published flow: px, displacement in pixels; normalized_per_second, velocity in normalized image "
        "coordinates (focal length 1), which needs camera_info",
    )
    points_stride: int = live(
        number(8, 1, 256, "px"), "distance of the points of ~/points, across and down, in the published flow"
    )
    color_max_px: float = live(
        number(0.0, 0.0, 10000.0, "px"), "length of flow of full saturation in ~/flow_color; 0 = the field's largest"
    )
    compressed_format: str = live(one_of("jpeg", "png"), "format of ~/flow_color/compressed")
    jpeg_quality: int = live(number(90, 1, 100), "quality of ~/flow_color/compressed as jpeg")

    diagnostics_period_s: float = configured(number(1.0, 0.1, 3600.0, "s"), "time between two messages on /diagnostics")
    snapshot_folder: str = live(
        "",
        "folder for what the service ~/snapshot writes, one folder each; empty = flow_snapshots beside ROS's log files",
    )
    always_on: bool = live(
        False,
        "process images also while nobody subscribes to an output of their camera, so that the stream is warm for the "
        "first one who does; false = they are dropped, at no cost",
    )
    autostart: bool = configured(True, "configure and activate at start; false = wait for a lifecycle manager", "start")
    exit_on_failure: bool = configured(
        False,
        "what becomes of a node that autostart could not configure and activate: true = the process ends with status "
        "1; false = it stays, so that an operator can mend what its log names and call the transitions",
        "start",
    )

    @classmethod
    def declare(cls, node: Node) -> None:
        """Declare everything on a node; rclpy refuses a value of the wrong type or out of range, naming both.

        An empty list stands for the default of a list: YAML has no type for it, and without any value rclpy would raise
        an error where it is read.

        :raises ParameterException: for a value that cannot be, or none where one is needed.
        """
        given = getattr(node, "_parameter_overrides", {})  # rclpy offers no public way to ask
        for field in dataclasses.fields(cls):
            if field.name in given and given[field.name].type_ == Parameter.Type.NOT_SET:
                if not isinstance(field.default, tuple):
                    expected = type(field.default).__name__
                    raise ParameterException(f"{field.name}: expected a value of type {expected}, got none", field.name)
                del given[field.name]
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            node.declare_parameter(field.name, default, _descriptor(field))

    @classmethod
    def read(cls, node: Node, changes: Iterable[Parameter] = ()) -> NodeSettings:
        """Current values of a node's parameters, but for those about to change.

        :raises ValueError: for values that do not go together, naming what was expected and what was got.
        """
        values: dict[str, Any] = {f.name: node.get_parameter(f.name).value for f in dataclasses.fields(cls)}
        values.update({change.name: change.value for change in changes if change.name in values})
        arrays = {name: tuple(value) for name, value in values.items() if isinstance(value, (list, array.array))}
        settings = cls(**{**values, **arrays})
        settings.check()
        return settings

    def check(self) -> None:
        """Check what concerns several values.

        :raises ValueError: for values that do not go together, naming what was expected and what was got.
        """
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
        """Number of threads that ``threads`` stands for."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) - 1)

    def of_estimator(self) -> dict[str, Any]:
        """The settings of ``FlowEstimator``, for which "none" is None instead of 0."""
        names = ("max_iterations", "direction", "min_scale", "max_scale", "refinement", "max_gap_ms")
        limits = {name: getattr(self, name) or None for name in ("latency_budget_ms", "tolerance_px")}
        return {**limits, **{name: getattr(self, name) for name in names}}


LIVE = frozenset(field.name for field in dataclasses.fields(NodeSettings) if field.metadata["live"])
"""Names of the parameters that may change while the node is configured."""


def _descriptor(field: dataclasses.Field) -> ParameterDescriptor:
    about = field.metadata
    unit = f" [{about['unit']}]" if about["unit"] else ""
    descriptor = ParameterDescriptor(description=about["description"] + unit, read_only=about["at_start"])
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
