# SPDX-License-Identifier: Apache-2.0
"""The pages that people and programs rely on say what the code does: topics, services, parameters, keys of messages."""

import importlib.util
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
NODE_PAGE = ROOT / "docs" / "node.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def tables(heading: str) -> list[list[str]]:
    """Cells of the rows of all tables below a heading of docs/node.md, up to the next heading."""
    section = re.split(r"^#+ ", NODE_PAGE.read_text().split(f"# {heading}\n")[1], flags=re.MULTILINE)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    return [row for row in rows if "`" in row[0]]


def keys(heading: str) -> set[str]:
    """What the first column names in backquotes."""
    return {key for row in tables(heading) for key in re.findall(r"`([^`]+)`", row[0])}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Pages and files get renamed; a heading that is linked to as well."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    """A page that nobody can click to is not read; and `make docs` ends with an error for it."""
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    listed = [ROOT / name for name in re.findall(r"[\w/]+\.md", navigation)]
    assert set(PAGES) <= set(listed) and all(page.exists() for page in listed)


def test_the_examples_for_research_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are the first that a reader types. The fixed points of cos(x / 2) and cos(0.9 x) are known."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    for number in range(2):
        cv2.imwrite(str(tmp_path / f"frame_{number}.png"), cv2.blur(np.roll(noise, number, axis=1), (5, 5)))
    monkeypatch.chdir(tmp_path)
    solver, pair = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "quickstart_research.md").read_text(), re.S)
    names: dict = {}
    exec(textwrap.dedent(solver), names)
    assert capsys.readouterr().out.count("converged") == 2
    assert names["solution"].state[0].flatten().tolist() == pytest.approx([0.900367, 0.769576], abs=1e-5)
    exec(textwrap.dedent(pair).replace('"base"', '"nano"'), names)
    assert capsys.readouterr().out.startswith("(64, 96, 2)")


def test_the_page_of_parameters_is_that_of_the_table() -> None:
    """It is written from the table; whoever changes one is told how to renew the other."""
    pytest.importorskip("rclpy", reason="needs ROS 2")
    spec = importlib.util.spec_from_file_location("parameters_page", ROOT / "docs" / "parameters.py")
    assert spec is not None and spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    assert writer.PAGE.read_text() == writer.page(), "docs/parameters.md is out of date: run python docs/parameters.py"
    assert writer.CONFIG.read_text() == writer.config(), "config/flow.yaml is old: run python docs/parameters.py"


def test_each_parameter_file_is_named() -> None:
    """They are chosen by name, so the page is where they are found. (test_parameters.py holds them to the table.)"""
    files = {path.stem for path in (ROOT / "config").glob("*.yaml")}
    section = NODE_PAGE.read_text().split("### Parameters\n")[1].split("\n#")[0]
    assert files <= set(re.findall(r"`(\w+)`", section))


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, set[tuple[str, str]]]]:
    """(name, type) of the topics "in" and "out" and of the services of an active node of one camera."""
    rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
    from node_client import untrained_weights

    from deq_flow_ros.ros.flow_node import SUCCESS, FlowNode

    weights = untrained_weights(tmp_path_factory.mktemp("weights"))
    parameters = (f"model:={weights}", "warm_up_width:=0", "warm_up_height:=0", "threads:=1")
    words = [word for parameter in parameters for word in ("-p", parameter)]
    rclpy.init(args=["test", "--ros-args", *words, "-r", "~/image:=/camera/image_raw"])
    node = FlowNode()

    def entities(items: list) -> set[tuple[str, str]]:
        kinds = [item.msg_type if hasattr(item, "msg_type") else item.srv_type for item in items]
        paths = [item.topic_name if hasattr(item, "topic_name") else item.srv_name for item in items]
        types = [f"{kind.__module__.rsplit('.', 1)[0].replace('.', '/')}/{kind.__name__}" for kind in kinds]
        return {(path.replace("/flow_node/", "~/"), kind) for path, kind in zip(paths, types, strict=True)}

    try:
        assert node.trigger_configure() == SUCCESS and node.trigger_activate() == SUCCESS
        found = {
            "in": entities(list(node.subscriptions)),
            "out": entities(list(node.publishers)),
            "services": entities(list(node.services)),
        }
    finally:
        node.close()
        node.destroy_node()
        rclpy.try_shutdown()
    yield found


ROS_OWN = ("/parameter_events", "/rosout", "~/transition_event")


def test_the_table_of_topics_is_what_the_node_has(names: dict[str, set[tuple[str, str]]]) -> None:
    """A topic that the page does not have is not found, one that the node does not have is waited for."""
    rows = [(row[0], re.findall("`([^`]+)`", row[0])[0], row[1].strip("`")) for row in tables("Topics")]
    written = {(name, kind) for cell, name, kind in rows if "(in)" not in cell}
    assert written == {(name, kind) for name, kind in names["out"] if name not in ROS_OWN}
    places = {"~/image": "/camera/image_raw", "camera_info": "/camera/camera_info"}
    expected = {(places[name], kind) for cell, name, kind in rows if "(in)" in cell}
    assert expected == {(name, kind) for name, kind in names["in"] if name not in ROS_OWN}


def test_the_layouts_of_the_viewers_show_what_the_node_has(names: dict[str, set[tuple[str, str]]]) -> None:
    """A panel of a topic that nobody publishes just stays empty; one that the layout does not have is an error box."""
    foxglove, rviz = (ROOT / "config" / name for name in ("foxglove_layout.json", "flow.rviz"))
    layout, published = json.loads(foxglove.read_text()), {name for name, _ in names["out"]}
    for text in (foxglove.read_text(), rviz.read_text()):
        shown = {f"~/{name}" for name in re.findall(r"/flow_node/(\w+)", text)}
        assert len(shown) >= 3 and shown <= published
    assert set(re.findall(r'key==."(\w+)', foxglove.read_text().replace("\\", "."))) <= keys("Accounts")
    placed = re.findall(r'"(\w+!\w+)"', json.dumps(layout["layout"]))
    assert sorted(placed) == sorted(layout["configById"])


def test_the_table_of_services_is_what_the_node_has(names: dict[str, set[tuple[str, str]]]) -> None:
    """Beside those that every lifecycle node has."""
    written = {(row[0].strip("`"), row[1].strip("`")) for row in tables("Services")}
    own = {(name, kind) for name, kind in names["services"] if kind.startswith("std_srvs/")}
    assert written == own


def test_the_tables_of_keys_are_those_of_the_messages() -> None:
    """Programs read accounts and diagnostics by these keys."""
    pytest.importorskip("rclpy", reason="needs ROS 2")
    import torch
    from std_msgs.msg import Header

    from deq_flow_ros.ros.accounts import FrameAccounts
    from deq_flow_ros.ros.health import ProcessStatus, camera_status
    from deq_flow_ros.streaming import FlowInfo

    health = ProcessStatus("process")
    health.configured(torch.device("cpu"), model="nano")
    accounts = FrameAccounts("cpu", "forward")
    info = FlowInfo(
        stamp_ns=2,
        previous_stamp_ns=1,
        direction="forward",
        iterations=3,
        stop_reason="deadline",
        warm=True,
        residual_px=0.1,
        reset_reason="a gap",
        scale=1.0,
        stage_ms={"solve": 1.0},
        latency_ms=2.0,
        budget_ms=3.0,
    )
    messages = [
        accounts.first(Header(), "start", 1.0),
        accounts.dropped(Header(), "empty", 1.0),
        accounts.processed(Header(), info, {"wait": 1.0}, 1.0),
    ]
    found = {pair.key for message in messages for pair in message.status[0].values}
    assert {re.sub("stage_.+_ms", "stage_NAME_ms", key) for key in found} == keys("Accounts")
    process, camera = health.status(), camera_status("flow", "/camera/image_raw", accounts.window())
    found = {re.sub("stage_.+_ms", "stage_NAME_ms", pair.key) for pair in camera.values}
    assert {re.sub("dropped: .+", "dropped: REASON", key) for key in found} == keys("Diagnostics")
    page = NODE_PAGE.read_text()
    assert [pair.key for pair in process.values if f"`{pair.key}`" not in page] == []
