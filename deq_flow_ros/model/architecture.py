# SPDX-License-Identifier: Apache-2.0
"""Architectures of the flow model as plain data, and the named sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """Everything that fixes the shapes of a model.

    :ivar encoder: "separate" (two encoders, as in the released models) or "shared" (one trunk, as in ``nano``).
    :ivar motion_widths: channels of the layers of the motion encoder: correlation 1x1 and 3x3, flow 7x7 and 3x3.
    :ivar update: name of the update operator, see ``deq_flow_ros.model.update``.
    :ivar weight_norm: whether the convolutions of the update operator are weight-normalised.
    :ivar uncertainty_dim: channels of the hidden layer of the head that predicts how wrong the flow is; 0: no head.
    """

    encoder: str
    feature_dim: int
    hidden_dim: int
    motion_widths: tuple[int, int, int, int]
    flow_head_dim: int
    mask_dim: int = 256
    correlation_levels: int = 4
    correlation_radius: int = 4
    update: str = "raft"
    weight_norm: bool = False
    uncertainty_dim: int = 0

    @property
    def context_dim(self) -> int:
        """Channels of the context, and of the motion features; as many as the hidden state in every size."""
        return self.hidden_dim

    motion_dim = context_dim

    @property
    def correlation_dim(self) -> int:
        """Channels that a lookup of the correlation returns."""
        return self.correlation_levels * (2 * self.correlation_radius + 1) ** 2

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Architecture:
        """The architecture of a weights file, of its fields as JSON has them; those that it lacks get their defaults.

        :raises TypeError: for unknown or missing fields.
        """
        return cls(**{**values, "motion_widths": tuple(values["motion_widths"])})


def _released(hidden: int, feature_dim: int = 256) -> Architecture:
    """A released size. They differ only in the width of the hidden state, and ``tiny`` also in that of the features."""
    return Architecture(
        "separate", feature_dim, hidden, (2 * hidden, 3 * hidden // 2, hidden, hidden // 2), flow_head_dim=2 * hidden
    )


# `nano` is this project's own; the others are those of the method's authors.
SIZES: dict[str, Architecture] = {
    "nano": Architecture("shared", 96, 64, (64, 48, 32, 16), 64, mask_dim=96, correlation_radius=3),
    "tiny": _released(32, feature_dim=64),
    "base": _released(128),
    "large": _released(192),
    "huge": _released(256),
    "gigantic": _released(384),
}
