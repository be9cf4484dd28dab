# SPDX-License-Identifier: Apache-2.0
"""Tables of parameters: a dataclass of settings, from which a node declares its parameters."""

from __future__ import annotations

import array
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.exceptions import ParameterException
from rclpy.node import Node
from rclpy.parameter import Parameter

from deq_flow_ros import did_you_mean
from deq_flow_ros.ros.qos import given_overrides

Table = TypeVar("Table", bound="ParameterTable")


@dataclasses.dataclass(frozen=True)
class ParameterTable:
    """Values of all parameters of a node; a node's own table inherits from this and adds a field for each."""

    @classmethod
    def declare(
        cls, node: Node, on_change: Callable[[Sequence[Parameter]], None] = lambda changed: None, **defaults: Any
    ) -> None:
        """Declare everything on a node; rclpy refuses a value of the wrong type or out of range, naming both.

        Warns of values given at start that no parameter takes, as ROS drops these silently. A whole number is taken for
        a real one: ``-p latency_budget_ms:=50`` means 50.0. An empty list stands for the default of a list, as YAML has
        no type for it. From then on, requests are answered as ``_set`` says.

        :param on_change: called with the parameters that have new values.
        :param defaults: other ones than those of the table, by the names of the parameters.
        :raises ParameterException: for a value that cannot be, or none where one is needed.
        """
        for line in unused_overrides(node, cls.names()):
            node.get_logger().warning(line)
        given = given_overrides(node)
        for field in dataclasses.fields(cls):
            default = defaults.get(field.name, field.default)
            if field.name in given and given[field.name].type_ == Parameter.Type.NOT_SET:
                if not isinstance(default, tuple):
                    expected = type(default).__name__
                    raise ParameterException(f"{field.name}: expected a value of type {expected}, got none", field.name)
                del given[field.name]
            if field.name in given:
                given[field.name] = _as_declared(given[field.name], default)
            default = list(default) if isinstance(default, tuple) else default
            node.declare_parameter(field.name, default, _descriptor(field))
        node.set_parameters_atomically = partial(cls._set, node, node.set_parameters_atomically, on_change)

    @classmethod
    def names(cls) -> list[str]:
        """Of the parameters."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def read(cls: type[Table], node: Node, changes: Iterable[Parameter] = ()) -> Table:
        """Current values of a node's parameters, but for those about to change.

        :raises ValueError: for a word that is none of its ``choices``, or values that do not go together, naming what
            was expected and what was got.
        """
        values: dict[str, Any] = {name: node.get_parameter(name).value for name in cls.names()}
        values.update({change.name: change.value for change in changes if change.name in values})
        cls.check_choices(values)
        arrays = {name: tuple(value) for name, value in values.items() if isinstance(value, (list, array.array))}
        settings = cls(**{**values, **arrays})
        settings.check()
        return settings

    def check(self) -> None:
        """Check what concerns several values; see ``read``."""

    @classmethod
    def check_choices(cls, values: Mapping[str, Any]) -> None:
        """Check words, by the names of their parameters, against ``choices``, for which ROS knows no ranges.

        :raises ValueError: naming the parameter, its choices and what was got.
        """
        for field in dataclasses.fields(cls):
            name, allowed = field.name, field.metadata["choices"]
            if allowed and name in values and values[name] not in allowed:
                got = f"{values[name]!r}{did_you_mean(str(values[name]), allowed)}"
                raise ValueError(f"{name}: expected one of {_words_of(allowed)}, got {got}")

    @classmethod
    def _set(
        cls, node: Node, set_all: Callable[..., SetParametersResult], on_change: Callable[[Sequence[Parameter]], None],
        parameters: Sequence[Parameter],
    ) -> SetParametersResult:  # fmt: skip
        """See rclpy; but a name that there is not is refused by name, a whole number is taken for a real one, and what
        has its value already is no change, though it may be for reading only: ``ros2 param load`` sets all that
        ``ros2 param dump`` wrote.
        """
        for name in [each.name for each in parameters]:
            if not node.has_parameter(name):
                reason = f"no parameter {name!r}{did_you_mean(name, cls.names())}; nothing was changed"
                return SetParametersResult(successful=False, reason=reason)
        present = {each.name: node.get_parameter(each.name).value for each in parameters}
        declared = [_as_declared(each, present[each.name]) for each in parameters]
        new = [each for each in declared if _plain(each.value) != _plain(present[each.name])]
        answer = set_all(new) if new else SetParametersResult(successful=True)
        if answer.successful:
            on_change(new)
        return answer


def unused_overrides(node: Node, known: Sequence[str]) -> list[str]:
    """A line for each value given at start that no parameter of a node takes; ``known`` are its own names."""
    return files_for_others(sys.argv, node.get_fully_qualified_name()) + [
        f"no parameter {name!r}{did_you_mean(name, known)}: its value changes nothing"
        for name in given_overrides(node)
        if name not in known and not node.has_parameter(name) and not name.startswith("qos_overrides.")
    ]


def files_for_others(words: Sequence[str], node: str) -> list[str]:
    """A line for each parameter file of a command line that has values, but none for this node (with namespace).

    What ROS cannot read is left to ROS.
    """
    lines = []
    for path in [word for option, word in pairwise(words) if option == "--params-file"]:
        try:
            tree = yaml.safe_load(Path(path).read_text())
        except (OSError, ValueError, yaml.YAMLError):
            continue
        names = _nodes_of(tree)
        if isinstance(tree, (str, list)):  # ROS takes a text for a file without values
            lines.append(f"{path} is no parameter file: expected {node}: {{ros__parameters: {{NAME: VALUE, ...}}}}")
        if names and not any(_means(name, node) for name in names):
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


def _means(name: str, node: str) -> bool:
    """Whether a name of a parameter file stands for a node: * is one part of its name, ** is any number of them."""
    return bool(re.fullmatch(re.escape(name).replace(r"/\*\*", "(/[^/]+)*").replace(r"/\*", "/[^/]+"), node))


def _as_declared(parameter: Parameter, present: Any) -> Parameter:
    """The parameter, with a whole number as a real one where it is one at ``present``."""
    if isinstance(present, float) and parameter.type_ == Parameter.Type.INTEGER:
        return Parameter(parameter.name, Parameter.Type.DOUBLE, float(parameter.value))
    return parameter


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple, array.array)) else (type(value), value)


def _words_of(choices: Sequence[str]) -> str:
    return ", ".join(choice or '""' for choice in choices)


def _descriptor(field: dataclasses.Field) -> ParameterDescriptor:
    about = field.metadata
    unit = f" [{about['unit']}]" if about["unit"] else ""
    descriptor = ParameterDescriptor(description=about["description"] + unit, read_only=about["at_start"])
    if about["choices"]:
        descriptor.additional_constraints = f"one of: {_words_of(about['choices'])}"
    limits = {"from_value": about["minimum"], "to_value": about["maximum"]}
    if about["minimum"] is not None and isinstance(field.default, float):
        descriptor.floating_point_range = [FloatingPointRange(**limits)]
    elif about["minimum"] is not None:
        descriptor.integer_range = [IntegerRange(**limits, step=1)]
    return descriptor
