# SPDX-License-Identifier: Apache-2.0
"""Copies between the host and a device with graphs: beside other work, in order, and of what is asked for alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from fake_graphs import FakeDevice, Race, assert_same, make_engine, stream
from streams import PERIOD_NS, frames

from deq_flow_ros.imaging.pictures import TABLE_RADIUS, color_table, flow_to_color
from deq_flow_ros.model import DEQFlow, load_model
from deq_flow_ros.streaming import EagerEngine, FlowEstimator
from deq_flow_ros.streaming.fields import paint
from deq_flow_ros.streaming.graph_engine import GraphEngine
from deq_flow_ros.streaming.interface import Palette
from deq_flow_ros.streaming.workspace import Size


@pytest.fixture(scope="module")
def model() -> DEQFlow:
    return load_model("nano")


def palette(max_px: float | None = None) -> Palette:
    return Palette(color_table(), TABLE_RADIUS, max_px)


def test_copies_run_beside_other_work_in_order(model: DEQFlow) -> None:
    """Why: copies that wait for the whole queue, or the queue for them, cost time in each frame; and one that is not
    held back reads or writes what graphs work on. Copies take longer than graphs here, to let nothing be in time by
    luck.
    """
    device = FakeDevice(replay_ms=0.1, copy_ms=0.35)
    engine = GraphEngine(model, device.clock, device, behind=False)
    images = frames(6)
    got = stream(engine, images)
    assert_same(got, stream(EagerEngine(model), images))
    assert got[-1].info.runtime == "graphs"
    overlaps = device.overlap_ns
    stream(engine, images)
    # Each field is copied to the host while its state is carried along.
    assert device.overlap_ns - overlaps >= 5 * device.replay_ns


def test_copies_take_a_stream_no_time(model: DEQFlow) -> None:
    """Why: a field goes to the host, and the next image comes, while the state is carried along, which takes longer
    than both; so there is nothing left to gain by copying beside the next encoding.
    """
    times = []
    for copy_ms in (0.0, 0.04):
        device = FakeDevice(replay_ms=0.1, copy_ms=copy_ms)
        engine = GraphEngine(model, device.clock, device, behind=False)
        engine.make_ready((48, 64), (48, 64))
        estimator, ends = FlowEstimator(engine, max_iterations=2, tolerance_px=None), []
        for i, image in enumerate(frames(5)):
            estimator.update(image, i * PERIOD_NS)
            estimator.prepare()
            ends.append(device.busy_until_ns)
        times.append([after - before for before, after in pairwise(ends[1:])])
    assert times[0] == times[1] == [8 * device.replay_ns] * 3, "the eight graphs of a pair, back to back"


@torch.inference_mode()
def test_a_buffer_is_filled_again_when_its_copy_has_ended(model: DEQFlow) -> None:
    """Why: there are two of them, and a third image must wait for the first one's copy, but for no other."""
    engine, device = make_engine(model)
    engine.make_ready((48, 64), (48, 64))
    space = engine._shelf.get(Size((48, 64), (48, 64), 1))
    assert space is not None
    device.copy_ns, waits = 10**9, device.waits
    for number, image in enumerate(frames(3)):
        space.encode_images([image])
        assert device.waits - waits == (number == 2)
    assert device.clock.now_ns() >= 10**9


def test_the_fake_device_finds_copies_that_are_not_held_back() -> None:
    """Why: the tests of the order of copies are worth as much as this."""
    device = FakeDevice()
    inside, outside, host = torch.ones(3), torch.ones(3), device.pinned((3,), torch.float32)
    captured = device.capture(lambda: (inside.mul_(2), inside + 1), device.pool())

    def copy(to: torch.Tensor, source: torch.Tensor, held: bool) -> None:
        made = device.mark()
        with device.beside():
            if held:
                device.hold(made)
            to.copy_(source, non_blocking=True)

    captured.replay()
    with pytest.raises(Race, match="still worked on"):
        copy(host, inside, held=False)
    with pytest.raises(Race, match="memory of a pool"):
        copy(host, captured.outputs[1], held=True)
    copy(host, outside, held=False)
    copy(host, inside, held=True)
    with pytest.raises(Race, match="what is being copied"):
        captured.replay()


def test_the_residual_is_computed_and_copied_for_who_asks(model: DEQFlow) -> None:
    """Why: it is a third of what is copied for each field, and often nobody subscribes to it."""
    images, settings = frames(5), {"tolerance_px": None, "max_iterations": 1}
    engine, device = make_engine(model)
    stream(engine, images, **settings)
    copied = []
    for fields in ({}, {"residual": False}, {"residual": False, "uncertainty": True}):
        device.copied = [0, 0]
        last = stream(engine, images, **settings, **fields)[-1]
        assert (last.residual is None, last.uncertainty is None) == ("residual" in fields, "uncertainty" not in fields)
        copied.append(device.copied[1])
    (height, width), pairs = images[0].shape[:2], len(images) - 1
    assert copied[0] - copied[1] == copied[2] - copied[1] == pairs * 4 * height * width
    expected = stream(EagerEngine(model), images, **settings, **fields)[-1]
    np.testing.assert_allclose(last.flow, expected.flow, atol=1e-4)
    np.testing.assert_allclose(last.uncertainty, expected.uncertainty, rtol=1e-4)
    assert expected.residual is None


def test_colors_are_painted_on_the_device_for_who_asks(model: DEQFlow) -> None:
    """Why: painting takes the host longer than the whole field takes a GPU; and nobody pays for what nobody asks."""
    images, settings = frames(5, step=3), {"tolerance_px": None, "max_iterations": 2}
    engine, device = make_engine(model)
    stream(engine, images, **settings)
    device.copied = [0, 0]
    plain = stream(engine, images, **settings)
    assert plain[-1].colors is None
    without, device.copied = device.copied, [0, 0]
    assert without[0] == sum(image.nbytes for image in images)
    assert stream(engine, images, **settings, palette=palette())[-1].colors is not None
    assert device.copied[1] - without[1] == len(plain) * images[0].nbytes
    refined = stream(engine, images, **settings, palette=palette(), refinement=1)
    assert refined[-1].colors is None, "they would be those of the flow before"


@pytest.mark.parametrize("max_px", [None, 4.0])
def test_colors_of_the_device_are_those_of_the_host(max_px: float | None) -> None:
    """Why: who painted a picture must not show; too long vectors, and those that are not finite, included."""
    flow = 3 * torch.randn(60, 80, 2, generator=torch.Generator().manual_seed(0))
    flow[3, 4, 0], flow[5, 6] = torch.nan, torch.inf
    chosen = palette(max_px)
    got = paint(chosen, flow, torch.from_numpy(chosen.table)).numpy()
    expected = flow_to_color(flow.numpy(), max_px)
    assert got.dtype == np.uint8 and (got[3, 4] == 0).all() and (got[5, 6] == 0).all()
    # A last bit may lead to the next entry of the table.
    assert (got == expected).all(2).mean() > 0.999 and np.abs(got.astype(int) - expected).max() <= 3
