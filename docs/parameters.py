# SPDX-License-Identifier: Apache-2.0
"""Write docs/parameters.md from the table in `deq_flow_ros/ros/parameters.py`:

    python docs/parameters.py
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from deq_flow_ros.ros.parameters import LIVE, Settings

PAGE = Path(__file__).with_suffix(".md")
HEAD = """\
<!-- Written by `python docs/parameters.py` from the table in deq_flow_ros/ros/parameters.py: change that, not this. -->
# Parameters of flow_node

[`config/flow.yaml`](../config/flow.yaml) has them all with their defaults; `ros2 param describe /flow_node NAME` prints
the same texts. The column "when" says when a value is read:

- `live`: a change takes effect with the next image (`ros2 param set /flow_node latency_budget_ms 50.0`);
- `configure`: in that transition; a change while the node is configured is refused with a reason;
- `start`: when the process starts.

Values that contradict each other (`min_scale` above `max_scale`) are refused as a set. A name that no parameter has, in
a file or on the command line, is a warning when the node starts.

ROS's own QoS overrides hold beside these, at start: `qos_overrides.TOPIC.subscription.POLICY` for the node's inputs and
`qos_overrides.TOPIC.publisher.POLICY` for its outputs, with the full topic name after remapping and the policies
`history`, `depth`, `reliability` and `durability`. One that no topic of the node takes is a warning.

| parameter | type | default | range | when | what |
| --- | --- | --- | --- | --- | --- |
"""
TYPES = {bool: "bool", int: "integer", float: "double", str: "string"}


def page() -> str:
    """The whole text of docs/parameters.md."""
    return HEAD + "".join(_row(field) for field in dataclasses.fields(Settings))


def _row(field: dataclasses.Field) -> str:
    about = field.metadata
    default: Any = list(field.default) if isinstance(field.default, tuple) else field.default
    kind = f"{TYPES[type(default[0])]} array" if isinstance(default, list) else TYPES[type(default)]
    limits = ", ".join(f"`{choice}`" for choice in about["choices"])
    if about["minimum"] is not None:
        limits = f"{about['minimum']:.10g} to {about['maximum']:.10g}"
    when = "live" if field.name in LIVE else "start" if about["read_only"] else "configure"
    description = about["description"].replace("|", "\\|") + (f" [{about['unit']}]" if about["unit"] else "")
    cells = (f"`{field.name}`", kind, f"`{json.dumps(default)}`", limits, when, description)
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    PAGE.write_text(page())
