# SPDX-License-Identifier: Apache-2.0
"""In which order the images of a folder come, and when, as far as their names say so."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deq_flow_ros.imaging.frame import MediaError
from deq_flow_ros.recordings.files import natural_order
from deq_flow_ros.recordings.source import DEFAULT_FPS, FIRST_STAMP_NS


@dataclass(frozen=True)
class ImageOrder:
    """The images of a folder in order.

    :ivar rate: how often they come, and how that is known, for people.
    :ivar missing: which are missing, a sentence; empty: none, as far as their names say.
    """

    files: list[Path]
    stamps_ns: list[int]
    period_ns: int
    rate: str
    missing: str = ""


def in_order(files: Iterable[Path], fps: float | None) -> ImageOrder:
    """Images at the times in their names; without those or with ``fps``, in natural order by their numbers.

    :raises MediaError: see ``check_one_kind``.
    """
    ordered = natural_order(files)
    check_one_kind(file.name for file in ordered)
    times_ns = times_in_names(file.stem for file in ordered) if fps is None and len(ordered) > 1 else None
    if times_ns is not None:
        stamps_ns = sorted(times_ns)
        period_ns = round(statistics.median(after - before for before, after in itertools.pairwise(stamps_ns)))
        ordered = [file for _, file in sorted(zip(times_ns, ordered, strict=True))]
        return ImageOrder(ordered, stamps_ns, period_ns, f"at the times in their names, about {1e9 / period_ns:.1f} Hz")
    period_ns = round(1e9 / (fps or DEFAULT_FPS))
    places, missing = places_in_names([file.stem for file in ordered])
    stamps_ns = [FIRST_STAMP_NS + place * period_ns for place in places]
    rate = f"at {fps:g} Hz" if fps else f"at {DEFAULT_FPS:g} Hz, which is assumed (--fps sets another)"
    numbers = listed([str(number) for number in missing])
    words = f"images are missing, by the numbers in their names ({numbers}): their times have no frame"
    return ImageOrder(ordered, stamps_ns, period_ns, rate, words if missing else "")


def times_in_names(names: Iterable[str]) -> list[int] | None:
    """The times in ns since 1970 that the names of images say; None unless all say different ones.

    :param names: without their suffixes. EuRoC names images by nanoseconds, TUM RGB-D by
        seconds with a fraction, others by milliseconds, or by seconds and nanoseconds.
    """
    times: list[int] = []
    for name in names:
        match = re.fullmatch(r"(?:.*\D)?(\d{10}|\d{13}|\d{16}|\d{19})(?:([._-])(\d{1,9}))?\D*", name, re.ASCII)
        if match is None or (match[2] and len(match[1]) != 10):
            return None
        part = (match[3] or "0").ljust(9, "0") if match[2] == "." else match[3] or "0"
        time_ns = int(match[1]) * 10 ** (19 - len(match[1])) + int(part)
        if not 946_684_800 <= time_ns * 1e-9 < 4_102_444_800:  # from 2000 to 2100
            return None
        times.append(time_ns)
    return times if len(set(times)) == len(times) else None


def places_in_names(names: Sequence[str]) -> tuple[list[int], list[int]]:
    """The places from 0 on that the numbers in the names of images give them, and the numbers that are missing.

    Without one number that counts on, image follows image. If every tenth number is there, none is missing.

    :param names: without their suffixes, in natural order.
    """
    following: tuple[list[int], list[int]] = list(range(len(names))), []
    parts = [re.split("([0-9]+)", name) for name in names]
    if len({tuple(part[::2]) for part in parts}) > 1:
        return following
    changing = [run for run in zip(*(map(int, part[1::2]) for part in parts), strict=True) if len(set(run)) > 1]
    if len(changing) != 1 or len(names) < 3:
        return following
    numbers = changing[0]
    steps = [after - before for before, after in itertools.pairwise(numbers)]
    step = math.gcd(*steps)
    if min(steps) < 1 or statistics.median(steps) != step:
        return following
    places = [(number - numbers[0]) // step for number in numbers]
    there = set(numbers)
    return places, [n for n in range(numbers[0], numbers[-1], step) if n not in there] if places[-1] < 10**6 else []


def check_one_kind(names: Iterable[str]) -> None:
    """Refuse images of which several have the same number, as those of two cameras or of colour and depth.

    :raises MediaError: naming two of them.
    """
    numbered: dict[tuple[int, ...], str] = {}
    for name in names:
        runs = re.findall("[0-9]+", name)
        before = numbered.setdefault(tuple(map(int, runs)), name) if runs else name
        if re.sub("[0-9]+", "#", before) != re.sub("[0-9]+", "#", name):
            raise MediaError(
                f"the images {before} and {name} have the same number: those of several cameras, or of colour and "
                "depth, are no sequence; move each kind into a folder of its own"
            )


def listed(names: Sequence[str]) -> str:
    """The first of some names, for people."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
