# SPDX-License-Identifier: Apache-2.0
"""Tables of parameters: a dataclass of settings, from which a node declares its parameters."""

from __future__ import annotations

import array
import dataclasses
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.exceptions import ParameterException
from rclpy.node import Node
from rclpy.parameter import Parameter

from deq_flow_ros import did_you_mean
from deq_flow_ros.ros.qos import before_parameters_set, given_overrides

Table = TypeVar("Table", bound="ParameterTable")


@dataclasses.dataclass(frozen=True)
class ParameterTable:
    """Values of all parameters of a node; a node's own table inherits from this and adds a field for each."""

    @classmethod
    def declare(cls, node: Node) -> None:
        """Declare everything on a node; rclpy refuses a value of the wrong type or out of range, naming both.

        Warns of values given at start that no parameter takes, as ROS drops these silently. A whole number is taken for
        a parameter that is a real one: ``-p latency_budget_ms:=50`` means 50.0. An empty list stands for the default of
        a list: YAML has no type for it, and without any value rclpy would raise an error where it is read.

        :raises ParameterException: for a value that cannot be, or none where one is needed.
        """
        given = given_overrides(node)
        for field in dataclasses.fields(cls):
            if field.name in given and given[field.name].type_ == Parameter.Type.NOT_SET:
                if not isinstance(field.default, tuple):
                    expected = type(field.default).__name__
                    raise ParameterException(f"{field.name}: expected a value of type {expected}, got none", field.name)
                del given[field.name]
            if field.name in given:
                given[field.name] = as_declared(given[field.name], field.default)
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            node.declare_parameter(field.name, default, _descriptor(field))
        before_parameters_set(node, lambda changes: all_as_declared(changes, node))
        for line in unused_overrides(node, cls.names()):
            node.get_logger().warning(line)

    @classmethod
    def names(cls) -> list[str]:
        """Of the parameters."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def read(cls: type[Table], node: Node, changes: Iterable[Parameter] = ()) -> Table:
        """Current values of a node's parameters, but for those about to change.

        :raises ValueError: for values that do not go together, naming what was expected and what was got.
        """
        values: dict[str, Any] = {name: node.get_parameter(name).value for name in cls.names()}
        values.update({change.name: change.value for change in changes if change.name in values})
        arrays = {name: tuple(value) for name, value in values.items() if isinstance(value, (list, array.array))}
        settings = cls(**{**values, **arrays})
        settings.check()
        return settings

    def check(self) -> None:
        """Check what concerns several values.

        :raises ValueError: for values that do not go together, naming what was expected and what was got.
        """

    @classmethod
    def check_choices(cls, parameters: Iterable[Parameter]) -> None:
        """Check words against ``choices``, for which ROS knows no ranges; names that are not in the table are passed.

        :raises ValueError: naming the parameter, its choices and what was got.
        """
        choices = {field.name: field.metadata["choices"] for field in dataclasses.fields(cls)}
        for parameter in parameters:
            allowed = choices.get(parameter.name)
            if allowed and parameter.value not in allowed:
                hint = did_you_mean(str(parameter.value), allowed)
                raise ValueError(
                    f"{parameter.name}: expected one of {', '.join(allowed)}, got {parameter.value!r}{hint}"
                )

    @classmethod
    def answer_at_once(cls, parameters: Sequence[Parameter], node: Node) -> SetParametersResult | None:
        """The answer to a request for a parameter that the node does not have, or for nothing new; else None."""
        for parameter in parameters:
            if not node.has_parameter(parameter.name):
                hint = did_you_mean(parameter.name, cls.names())
                reason = f"no parameter {parameter.name!r}{hint}; nothing was changed"
                return SetParametersResult(successful=False, reason=reason)
        return None if changed(parameters, node) else SetParametersResult(successful=True)


def unused_overrides(node: Node, known: Sequence[str]) -> list[str]:
    """A line for each value given at start that no parameter of a node takes.

    :param known: the names of the node's parameters.
    """
    return files_for_others(sys.argv, node.get_fully_qualified_name()) + [
        f"no parameter {name!r}{did_you_mean(name, known)}: its value changes nothing"
        for name in given_overrides(node)
        if not node.has_parameter(name) and not name.startswith("qos_overrides.")
    ]


def files_for_others(words: Sequence[str], node: str) -> list[str]:
    """A line for each parameter file of a command line that has values, but none for this node.

    :param words: the command line; what ROS cannot read is left to ROS.
    :param node: the name of the node with its namespace.
    """
    lines = []
    for option, path in pairwise(words):
        if option != "--params-file":
            continue
        try:
            tree = yaml.safe_load(Path(path).read_text())
        except (OSError, ValueError, yaml.YAMLError):
            continue
        names = _nodes_of(tree)
        if isinstance(tree, (str, list)):  # ROS takes a text for a file without values
            lines.append(f"{path} is no parameter file: expected {node}: {{ros__parameters: {{NAME: VALUE, ...}}}}")
        if names and not any(_fits(name, node) for name in names):
            lines.append(
                f"the parameter file {path} has values for {', '.join(names)} and none for {node}: they change "
                f"nothing; name {node} or /** there"
            )
    return lines


def _nodes_of(tree: object, prefix: str = "") -> list[str]:
    """The names, with namespaces, that a parameter file has values for."""
    if not isinstance(tree, dict):
        return []
    if "ros__parameters" in tree:
        return [prefix]
    return [name for key, below in tree.items() for name in _nodes_of(below, f"{prefix}/{str(key).strip('/')}")]


def _fits(pattern: str, node: str) -> bool:
    """Whether a name of a parameter file means a node: * is one part of a name, ** is any number of them."""
    parts = {"**": r"(/[^/]+)*", "*": "/[^/]+"}
    return bool(re.fullmatch("".join(parts.get(part, "/" + re.escape(part)) for part in pattern.split("/")[1:]), node))


def as_declared(parameter: Parameter, present: Any) -> Parameter:
    """The parameter, with a whole number as a real one where the parameter has real values.

    :param present: a value of the type that the parameter has.
    """
    if isinstance(present, float) and parameter.type_ == Parameter.Type.INTEGER:
        return Parameter(parameter.name, Parameter.Type.DOUBLE, float(parameter.value))
    return parameter


def all_as_declared(parameters: Iterable[Parameter], node: Node) -> list[Parameter]:
    """The parameters of a request, each as the node has it; see ``as_declared``."""
    return [as_declared(parameter, node.get_parameter_or(parameter.name).value) for parameter in parameters]


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


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple, array.array)) else (type(value), value)


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
