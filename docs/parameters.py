# SPDX-License-Identifier: Apache-2.0
"""Write the table of docs/parameters.md and the values of config/flow.yaml from `deq_flow_ros/ros/parameters.py`:

    python docs/parameters.py

What is above them in the two files is written there by hand, and stays.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from pathlib import Path

from deq_flow_ros.ros.parameters import LIVE, NodeSettings

PAGE = Path(__file__).with_suffix(".md")
CONFIG = Path(__file__).parents[1] / "config" / "flow.yaml"
TYPES = {bool: "bool", int: "integer", float: "double", str: "string"}


def page() -> str:
    """The whole text of docs/parameters.md."""
    rows = map(_row, dataclasses.fields(NodeSettings))
    return _through(PAGE, "| --- | --- | --- | --- | --- | --- |\n") + "".join(rows)


def config() -> str:
    """The whole text of config/flow.yaml."""
    entries = map(_entry, dataclasses.fields(NodeSettings))
    return _through(CONFIG, "  ros__parameters:\n") + "\n".join(entries)


def _through(path: Path, line: str) -> str:
    """What a file has up to this line, with it."""
    head, found, _ = path.read_text().partition(line)
    return head + found


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
