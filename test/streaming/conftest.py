# SPDX-License-Identifier: Apache-2.0
"""A network for the tests of streams, which look at what is done when, and not at how good the flow is."""

import pytest
import torch

from deq_flow_ros.model import Architecture, DEQFlow

SMALL = Architecture("shared", 16, 16, (16, 16, 16, 16), 16, mask_dim=16, correlation_radius=2)


@pytest.fixture
def model() -> DEQFlow:
    """Small, with random weights; each test has its own, as some replace its parts."""
    torch.manual_seed(0)
    return DEQFlow(SMALL).eval().requires_grad_(False)
