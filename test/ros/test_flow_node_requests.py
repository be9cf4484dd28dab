# SPDX-License-Identifier: Apache-2.0
"""Requests to a running `flow_node` that are wrong, malformed or random: it answers them, and goes on."""

import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
from node_client import CAMERA_TOPIC, NodeClient, running_node
from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.msg import ParameterValue
from rcl_interfaces.srv import GetParameters, SetParameters, SetParametersAtomically
from rclpy.parameter import Parameter

from deq_flow_ros.host import Children
from deq_flow_ros.ros.parameters import LIVE, NodeSettings


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[NodeClient, Children]]:
    folder, remapping = tmp_path_factory.mktemp("node"), f"~/image:={CAMERA_TOPIC}"
    with running_node(folder, remapping, failures=1) as running:  # one: the malformed request
        running[0].connect()
        yield running


def likely_value(rng: random.Random, name: str) -> Any:
    """A value of the parameter's own type, which may or may not be allowed."""
    default = getattr(NodeSettings, name, 0)
    if isinstance(default, bool):
        return rng.random() < 0.5
    if isinstance(default, int):
        return rng.randrange(-2, 20)
    if isinstance(default, float):
        return round(rng.uniform(-0.1, 1.5), 2)
    if isinstance(default, str):
        choices = NodeSettings.__dataclass_fields__[name].metadata["choices"]
        return rng.choice([*choices, "x", ""])
    return [rng.choice([0, 8, 16, 32, 80]) for _ in range(4)]


def random_value(rng: random.Random) -> Any:
    numbers = [0, 1, -1, 7, 2**31, -(2**63), 2**63 - 1, 0.0, -0.0, 0.3, 2.5, 1e308, float("inf"), float("nan")]
    number = rng.choice(numbers)
    text = "".join(rng.choices(string.printable + "äß☃", k=rng.randrange(12)))
    words = ["forward", "backward", "px", "normalized_per_second", "jpeg", "png", "raw", "arrival", "stamp"]
    ints = [rng.choice([0, 16, 32, 48, -1, 2**40]) for _ in range(rng.randrange(6))]
    return rng.choice([number, number, text, rng.choice(words), rng.random() < 0.5, ints, [text] * 2, [0.5], b"x"])


def test_no_request_for_parameters_brings_the_node_down(node: NodeClient) -> None:
    """Any program on the network can send these; what is accepted must work, and everything else be refused."""
    before = node.call(GetParameters, "get_parameters", GetParameters.Request(names=sorted(LIVE))).values
    rng = random.Random(0)
    names = [*vars(NodeSettings()), "", "no_such", "use_sim_time.x", "cameras.front"]
    accepted = 0
    for _ in range(40):
        messages = []
        for _ in range(5):
            name = rng.choice(names)
            value = likely_value(rng, name) if rng.random() < 0.5 else random_value(rng)
            try:
                message = Parameter(name, value=value).to_parameter_msg()
            except (TypeError, ValueError):  # rclpy's own client cannot even ask
                message = ParameterMessage(name=name, value=ParameterValue(type=rng.randrange(10)))
            messages.append(message)
        results = node.call(SetParameters, "set_parameters", SetParameters.Request(parameters=messages)).results
        assert all(result.successful or result.reason for result in results)
        accepted += sum(result.successful for result in results)
        request = SetParametersAtomically.Request(parameters=messages[:2])
        result = node.call(SetParametersAtomically, "set_parameters_atomically", request).result
        assert result.successful or result.reason
        account = node.send(node.image())[0]
        assert account["outcome"] in ("first", "processed") or account["reason"]
    assert accepted >= 20, accepted
    restore = [ParameterMessage(name=name, value=value) for name, value in zip(sorted(LIVE), before, strict=True)]
    request = SetParametersAtomically.Request(parameters=restore)
    assert node.call(SetParametersAtomically, "set_parameters_atomically", request).result.successful
    assert node.send(node.image(), node.image())[1]["outcome"] == "processed"


def test_a_malformed_request_does_not_end_the_node(node: NodeClient, log: Path) -> None:
    """A type that ROS does not know makes rclpy raise in the executor; the client gets no answer, the node goes on."""
    client = node.create_client(SetParameters, "/flow_node/set_parameters")
    node.until(client.service_is_ready, "the service")
    message = ParameterMessage(name="max_iterations", value=ParameterValue(type=99))
    client.call_async(SetParameters.Request(parameters=[message]))
    node.until(lambda: "a callback failed" in log.read_text(), "the error in the log")
    assert node.send(node.image())[0]["outcome"] == "processed"
    node.destroy_client(client)
