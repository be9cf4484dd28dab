# SPDX-License-Identifier: Apache-2.0
"""Central formulas against their plainest form, without any reference data."""

from __future__ import annotations

import pytest
import torch

from deq_flow_ros.model.cells import FACTOR, carry, convex_upsample
from deq_flow_ros.model.update import SeparableConvGRU


@pytest.mark.parametrize("neighbour", range(9))
def test_upsampling_takes_the_neighbour_that_the_mask_names(neighbour: int) -> None:
    """Why: neighbours in another order give flow that is right inside of objects and wrong at every edge."""
    flow = torch.randn(1, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.full((1, 9, FACTOR * FACTOR, 4, 5), -50.0)
    mask[:, neighbour] = 50.0
    fine = convex_upsample(flow, mask.flatten(1, 2))
    dy, dx = divmod(neighbour, 3)
    expected = FACTOR * torch.nn.functional.pad(flow, (1, 1, 1, 1))[..., dy : dy + 4, dx : dx + 5]
    torch.testing.assert_close(fine[..., ::FACTOR, ::FACTOR], expected)


def test_the_fused_gates_are_those_of_the_paper() -> None:
    """Why: gates are fused and their share of the context is computed once; RAFT, arXiv 2003.12039, section 3.3."""
    torch.manual_seed(0)
    gru = SeparableConvGRU(4, 3, 5)
    hidden, context, motion = (torch.randn(1, channels, 6, 7) for channels in (4, 3, 5))
    with torch.no_grad():
        got, expected = gru(hidden, motion, gru.prepare(context)), hidden
        for suffix in "12":
            z, r, q = (gru.get_submodule(f"conv{gate}{suffix}") for gate in "zrq")
            inputs = torch.cat((expected, context, motion), 1)
            update, reset = z(inputs).sigmoid(), r(inputs).sigmoid()
            candidate = q(torch.cat((reset * expected, context, motion), 1)).tanh()
            expected = (1 - update) * expected + update * candidate
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("direction", "column"), [("forward", 5), ("backward", 1)])
def test_a_state_is_carried_along_the_motion(direction: str, column: int) -> None:
    """Why: carried the other way, a warm start begins further off than a cold one, and nothing says so."""
    hidden, flow = torch.zeros(1, 1, 6, 7), torch.zeros(1, 2, 6, 7)
    hidden[..., 3, 3], flow[:, 0] = 1.0, 2.0
    moved, moved_flow = carry((hidden, flow), direction)
    assert moved[0, 0, 3].argmax() == column
    torch.testing.assert_close(moved_flow, flow)
