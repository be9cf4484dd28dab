# SPDX-License-Identifier: Apache-2.0
"""Reads what the flow node published from a bag: one report per frame, and the account of all frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deq_flow_ros.imaging.frame import stamp_to_ns
from deq_flow_ros.recordings.bags import read_image, read_messages


@dataclass(frozen=True)
class FrameReport:
    """One ``~/statistics`` message: what happened to the frame with this stamp. The values are strings, as sent."""

    stamp_ns: int
    values: dict[str, str]

    @property
    def outcome(self) -> str:
        """One of "processed", "first" and "dropped"."""
        return self.values.get("outcome", "")

    def number(self, key: str) -> float:
        """A value as a number; NaN if it is empty or missing."""
        text = self.values.get(key, "")
        return float(text) if text else float("nan")

    def stamp(self, key: str) -> int | None:
        """A value as a stamp in nanoseconds; None if it is empty or missing."""
        text = self.values.get(key, "")
        return int(text) if text else None

    def flag(self, key: str) -> bool:
        """A value that is "true" or "false"."""
        return self.values.get(key) == "true"

    @property
    def forward(self) -> bool:
        """Whether the flow is that from the previous image to this one, on the pixels of the previous image."""
        return self.values.get("direction") != "backward"

    @property
    def flow_stamp_ns(self) -> int | None:
        """The stamp that the flow of this frame must have: that of the image on whose pixels it is defined."""
        return self.stamp("image1_stamp_ns" if self.forward else "image2_stamp_ns")


def report_of(message: Any) -> FrameReport:
    """The report in a ``diagnostic_msgs/DiagnosticArray``, from whichever library the message comes."""
    values = {pair.key: pair.value for status in message.status for pair in status.values}
    return FrameReport(stamp_to_ns(message.header.stamp), values)


def read_reports(bag: Path, topic: str) -> list[FrameReport]:
    """All reports of a recording in the order of arrival.

    :raises MediaError: if the bag cannot be read.
    """
    return [report_of(message) for _, _, message in read_messages(bag, topic)]


def read_fields(bag: Path, flow_topic: str, residual_topic: str) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (stamp, flow (H, W, 2) px, residual (H, W) px) for every stamp for which both fields were recorded.

    The order is that in which the later of the two arrived.
    """
    waiting: dict[tuple[str, int], np.ndarray] = {}
    for topic, _, message in read_messages(bag, flow_topic, residual_topic):
        other = residual_topic if topic == flow_topic else flow_topic
        stamp, image = stamp_to_ns(message.header.stamp), read_image(message)
        partner = waiting.pop((other, stamp), None)
        if partner is None:
            waiting[topic, stamp] = image
        else:
            yield (stamp, image, partner) if topic == flow_topic else (stamp, partner, image)


@dataclass
class Account:
    """All published frames by what happened to them. ``problems`` says in words what does not add up."""

    published: int
    received: int
    processed: int
    first: int
    dropped: int
    flow_messages: int
    drop_reasons: dict[str, int] = field(default_factory=dict)
    first_reasons: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def take_account(published_ns: Sequence[int], reports: Sequence[FrameReport], flow_stamps_ns: Sequence[int]) -> Account:
    """Compare the published stamps with the reports of the node and with the recorded flow."""
    outcomes = Counter(report.outcome for report in reports)
    account = Account(
        published=len(published_ns),
        received=len(reports),
        processed=outcomes["processed"],
        first=outcomes["first"],
        dropped=outcomes["dropped"],
        flow_messages=len(flow_stamps_ns),
        drop_reasons=dict(
            Counter(report.values.get("reason", "") for report in reports if report.outcome == "dropped")
        ),
        first_reasons=dict(Counter(report.values.get("reason", "") for report in reports if report.outcome == "first")),
    )
    published = Counter(published_ns)
    reported = Counter(report.stamp_ns for report in reports)
    promised = Counter(
        stamp for report in reports if report.outcome == "processed" and (stamp := report.flow_stamp_ns) is not None
    )
    sent = Counter(flow_stamps_ns)
    _note(account, published - reported, "published, but no report says what became of them")
    _note(account, reported - published, "reported, but never published, or reported twice")
    _note(account, sent - promised, "flow messages whose stamp is not that of a processed frame's image")
    _note(account, promised - sent, "processed, but their flow was not recorded")
    unknown = set(outcomes) - {"processed", "first", "dropped"}
    if unknown:
        account.problems.append(f"expected the outcomes processed, first and dropped, got {sorted(unknown)} as well")
    if "" in account.drop_reasons:
        account.problems.append(f"{account.drop_reasons['']} frames were dropped without a reason")
    return account


def _note(account: Account, stamps: Counter, what: str) -> None:
    if stamps:
        some = ", ".join(str(stamp) for stamp in list(stamps)[:3]) + (", ..." if len(stamps) > 3 else "")
        account.problems.append(f"{sum(stamps.values())} frames {what} (stamps in ns: {some})")
