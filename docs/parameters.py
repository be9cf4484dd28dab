# SPDX-License-Identifier: Apache-2.0
"""Write docs/parameters.md and config/flow.yaml from the table in `deq_flow_ros/ros/parameters.py`:

    python docs/parameters.py
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from pathlib import Path

from deq_flow_ros.ros.parameters import LIVE, NodeSettings

PAGE = Path(__file__).with_suffix(".md")
CONFIG = Path(__file__).parents[1] / "config" / "flow.yaml"
HEAD = """\
<!-- Written by `python docs/parameters.py` from the table in deq_flow_ros/ros/parameters.py: change that, not this. -->
# Parameters of flow_node

[`config/flow.yaml`](../config/flow.yaml) has all parameters with their defaults. `ros2 param describe /flow_node NAME`
prints the same descriptions. The column "when" says when a value is read:

- `live`: a change takes effect with the next image (`ros2 param set /flow_node latency_budget_ms 50.0`);
- `configure`: in the transition `configure`; while the node is configured, a change is refused with a reason;
- `start`: when the process starts.

Changes that contradict each other (such as `min_scale` above `max_scale`) are refused together. If a file or the
command line gives a value for an unknown name, the node warns when it starts.

ROS's QoS overrides can be given as well, when the node starts: `qos_overrides.TOPIC.subscription.POLICY` for the node's
inputs and `qos_overrides.TOPIC.publisher.POLICY` for its outputs, with the full topic name after remapping and the
policies `history`, `depth`, `reliability` and `durability`. The node warns of an override that fits none of its topics.

| parameter | type | default | range | when | what |
| --- | --- | --- | --- | --- | --- |
"""
CONFIG_HEAD = """\
# Written by `python docs/parameters.py` from the table in deq_flow_ros/ros/parameters.py: change that, not this.
# Parameters of flow_node with their defaults. Copy this file, change what you need, and give it to the launch files as
# params_file:=PATH. You can change those marked (live) while the node runs, `ros2 param set /flow_node NAME VALUE`; the
# change takes effect with the next image. Those marked (start) are read when the process starts, and all others in the
# transition `configure`.
/**:
  ros__parameters:
"""
TYPES = {bool: "bool", int: "integer", float: "double", str: "string"}


def page() -> str:
    """The whole text of docs/parameters.md."""
    return HEAD + "".join(_row(field) for field in dataclasses.fields(NodeSettings))


def config() -> str:
    """The whole text of config/flow.yaml."""
    return CONFIG_HEAD + "\n".join(_entry(field) for field in dataclasses.fields(NodeSettings))


def _row(field: dataclasses.Field) -> str:
    about, default = field.metadata, field.default
    kind = f"{TYPES[type(default[0])]} array" if isinstance(default, tuple) else TYPES[type(default)]
    limits = _range(field) or ", ".join(f"`{choice}`" for choice in about["choices"])
    description = " ".join(filter(None, [about["description"].replace("|", "\\|"), _unit(field)]))
    cells = (f"`{field.name}`", kind, f"`{json.dumps(default)}`", limits, _when(field), description)
    return f"| {' | '.join(cells)} |\n"


def _entry(field: dataclasses.Field) -> str:
    """A parameter with what it is for, in YAML."""
    mark = "" if _when(field) == "configure" else f"({_when(field)}) "
    allowed = " ".join(filter(None, [_unit(field), _range(field) or ", ".join(field.metadata["choices"])]))
    text = f"{mark}{field.metadata['description']}{f' ({allowed})' if allowed else ''}"
    comment = textwrap.fill(text, 120, initial_indent="    # ", subsequent_indent="    # ", break_on_hyphens=False)
    return f"{comment}\n    {field.name}: {json.dumps(field.default)}\n"


def _when(field: dataclasses.Field) -> str:
    return "live" if field.name in LIVE else "start" if field.metadata["at_start"] else "configure"


def _unit(field: dataclasses.Field) -> str:
    return f"[{field.metadata['unit']}]" if field.metadata["unit"] else ""


def _range(field: dataclasses.Field) -> str:
    minimum, maximum = field.metadata["minimum"], field.metadata["maximum"]
    return "" if minimum is None else f"{minimum:.10g} to {maximum:.10g}"


if __name__ == "__main__":
    PAGE.write_text(page())
    CONFIG.write_text(config())
