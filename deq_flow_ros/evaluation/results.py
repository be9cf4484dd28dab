# SPDX-License-Identifier: Apache-2.0
"""What a run over a recording leaves: one record per frame and setting, kept in a table that only grows.

`frames.csv` is the one source of all figures: `metrics.json` and the report are made from it, so a run that was
interrupted and went on has the figures of its whole length. Its columns: docs/evaluate_bag.md.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from deq_flow_ros.evaluation.measures import MEASURES
from deq_flow_ros.media.frame import MediaError

if TYPE_CHECKING:
    from deq_flow_ros.evaluation.gallery import Gallery
    from deq_flow_ros.streaming import FlowInfo

PROCESSED, FIRST, DROPPED = OUTCOMES = ("processed", "first", "dropped")
STAGES = (
    "wait", "convert", "resize", "encode", "prepare", "match", "correlate", "coarse", "solve", "upsample", "output",
    "publish",
)  # fmt: skip
"""Stages of one update in the order of the work."""

WORDS = ("outcome", "reason", "stop_reason", "reset_reason")
NUMBERS = ("iterations", "warm", "residual_px", "scale", "latency_ms", "over_budget")
COLUMNS = (
    "setting", "index", "stamp_ns", "previous_stamp_ns", *WORDS, *NUMBERS,
    *(f"stage_{stage}_ms" for stage in STAGES), *MEASURES,
)  # fmt: skip
"""Of `frames.csv`. An empty cell is a value that is not known."""

NAN = float("nan")


@dataclass(frozen=True)
class FrameRecord:
    """What became of one frame under one setting.

    :ivar index: number of the frame in the recording, from 0.
    :ivar stamp_ns: its stamp.
    :ivar outcome: "processed", "first" (there is no pair yet) or "dropped".
    :ivar reason: why it is first or was dropped.
    :ivar measures: by the names of `measures.MEASURES`; what is missing or NaN is not known.

    The others are those of `FlowInfo`, of a processed frame only.
    :raises ValueError: for an outcome, stage or measure that does not exist.
    """

    index: int
    stamp_ns: int
    outcome: str
    reason: str = ""
    previous_stamp_ns: int | None = None
    iterations: int = 0
    stop_reason: str = ""
    warm: bool = False
    residual_px: float = NAN
    reset_reason: str = ""
    scale: float = NAN
    stage_ms: Mapping[str, float] = field(default_factory=dict)
    latency_ms: float = NAN
    over_budget: bool = False
    measures: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, got, known in (
            ("outcome", {self.outcome}, OUTCOMES),
            ("stages", set(self.stage_ms), STAGES),
            ("measures", set(self.measures), tuple(MEASURES)),
        ):
            if unknown := got - set(known):
                raise ValueError(f"expected {what} out of {', '.join(known)}, got {', '.join(sorted(unknown))}")

    @classmethod
    def of_flow(cls, index: int, info: FlowInfo, measures: Mapping[str, float]) -> FrameRecord:
        """Of a frame that gave flow."""
        same = {name: getattr(info, name) for name in ("stamp_ns", "previous_stamp_ns", "stop_reason", *NUMBERS)}
        reset = info.reset_reason or ""
        return cls(index, outcome=PROCESSED, reset_reason=reset, stage_ms=info.stage_ms, measures=measures, **same)

    def row(self, setting: str) -> list[str]:
        """Cells in the order of `COLUMNS`."""
        values = vars(self) | {"setting": setting, **self.measures}
        values |= {f"stage_{name}_ms": value for name, value in self.stage_ms.items()}
        if self.outcome != PROCESSED:
            values |= dict.fromkeys(NUMBERS)
        return [_cell(values.get(column)) for column in COLUMNS]


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.7g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class PairFields:
    """The arrays of one processed pair: what is measured, pictured and written.

    :ivar image1: the earlier image, (H, W, 3) uint8 RGB; `image2` the later one.
    :ivar flow: (H, W, 2) px; on the pixels of `image1` and leading to `image2` if `direction` is "forward", else the
        other way round. NaN where it is not known.
    :ivar residual: (H, W) px, length of the solver's last update; None where there is no solver.
    :ivar truth: true flow, as `flow`, NaN where it is not known; None without any.
    :ivar visible: (H, W) bool, where the truth is known to lead to something visible; None where nobody knows.
    :ivar backward: flow in the other direction, on the pixels of the other image; None where it was not computed.
    """

    image1: np.ndarray
    image2: np.ndarray
    flow: np.ndarray
    residual: np.ndarray | None = None
    truth: np.ndarray | None = None
    visible: np.ndarray | None = None
    backward: np.ndarray | None = None
    direction: str = "forward"

    @property
    def here(self) -> np.ndarray:
        """The image on whose pixels the flow lives."""
        return self.image1 if self.direction == "forward" else self.image2

    @property
    def there(self) -> np.ndarray:
        """The image that the flow leads to."""
        return self.image2 if self.direction == "forward" else self.image1


class FrameTable:
    """`frames.csv`: rows are appended as frames are done, those of all settings in one file.

    A file that is there is gone on with: `next_index` says where. Its last row, if it was cut short, is taken off.

    :raises MediaError: where the file cannot be written, or is another table.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._next: Counter[str] = Counter()
        try:
            if path.exists() and path.stat().st_size:
                self._mend()
            self._file = path.open("a", encoding="utf-8", newline="")
        except OSError as error:
            raise MediaError(f"cannot write {path}: {error}") from error
        self._writer = csv.writer(self._file, lineterminator="\n")
        if not self._file.tell():
            self._write(COLUMNS)

    def __enter__(self) -> FrameTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """No more rows; reading goes on to work."""
        self._file.close()

    def next_index(self, setting: str) -> int:
        """Index after the last one that the table holds of a setting; 0 where it holds none."""
        return self._next[setting]

    def append(self, setting: str, record: FrameRecord) -> None:
        """Write one row, at once. Records of a setting come in the order of their index.

        :raises MediaError: where the disk is full.
        """
        if record.index < self._next[setting]:
            raise ValueError(f"expected a frame from {self._next[setting]} on of {setting}, got {record.index}")
        self._next[setting] = record.index + 1
        self._write(record.row(setting))

    def rows(self) -> Iterator[dict[str, str]]:
        """Every row, by the names of `COLUMNS`."""
        with self.path.open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)

    def _write(self, row: Sequence[str]) -> None:
        try:
            self._writer.writerow(row)
            self._file.flush()
        except OSError as error:
            raise MediaError(f"cannot write {self.path}: {error}; what is there so far is kept") from error

    def _mend(self) -> None:
        with self.path.open("rb+") as file:
            file.seek(max(0, self.path.stat().st_size - 65536))
            end = file.tell() + file.read().rfind(b"\n") + 1
            file.truncate(end)
        with self.path.open(encoding="utf-8", newline="") as file:
            header = next(csv.reader(file), None)
        if header is None:
            return
        if tuple(header) != COLUMNS:
            raise MediaError(
                f"{self.path} is no table of frames of this version: its columns are {', '.join(header[:4])}, ...; "
                "move it away, or choose another --out"
            )
        for row in self.rows():
            self._next[row["setting"]] = int(row["index"]) + 1


class Series:
    """The rows of one setting as columns; a few hundred bytes a frame.

    :ivar stamp_ns: (N,) int64; `index` likewise, and `previous_stamp_ns`, of the pair's earlier frame, -1 without one.
    :ivar numbers: (N,) float64 by column, NaN where not known: `NUMBERS`, `stage_NAME_ms`, and the measures.
    :ivar words: N strings by column: `WORDS`.
    """

    def __init__(self) -> None:
        self._whole = {name: array("q") for name in ("index", "stamp_ns")}
        self._previous_stamp_ns = array("q")
        self._numbers = {name: array("d") for name in COLUMNS[4 + len(WORDS) :]}
        self.words: dict[str, list[str]] = {name: [] for name in WORDS}

    def add(self, row: Mapping[str, str]) -> None:
        """Take in one row of the table."""
        for name, whole in self._whole.items():
            whole.append(int(row[name]))
        self._previous_stamp_ns.append(int(row["previous_stamp_ns"] or -1))
        for name, number in self._numbers.items():
            number.append(float(row[name]) if row[name] else NAN)
        for name, words in self.words.items():
            words.append(sys.intern(row[name]))

    def __len__(self) -> int:
        return len(self._whole["index"])

    @property
    def index(self) -> np.ndarray:
        """(N,) int64."""
        return np.array(self._whole["index"], np.int64)

    @property
    def stamp_ns(self) -> np.ndarray:
        """(N,) int64."""
        return np.array(self._whole["stamp_ns"], np.int64)

    @property
    def previous_stamp_ns(self) -> np.ndarray:
        """(N,) int64."""
        return np.array(self._previous_stamp_ns, np.int64)

    def number(self, name: str) -> np.ndarray:
        """(N,) float64, NaN where not known."""
        return np.array(self._numbers[name], np.float64)

    def outcome(self, outcome: str) -> np.ndarray:
        """(N,) bool: whose outcome is this one."""
        return np.array([word == outcome for word in self.words["outcome"]], bool)

    def count(self, name: str, outcome: str) -> dict[str, int]:
        """How often each word of a column stands in rows of an outcome, the most frequent first; the empty one not."""
        pairs = zip(self.words[name], self.words["outcome"], strict=True)
        counter = Counter(_kind(word) for word, found in pairs if found == outcome and word)
        return dict(counter.most_common())


def _kind(reason: str) -> str:
    """A reason without its numbers: thousands of gaps that differ in length are one kind."""
    return re.sub(r"-?\d+(\.\d+)?", "…", reason)


@dataclass(frozen=True)
class Results:
    """One setting's results on one recording.

    :ivar name: of the setting; unique among those of a run.
    :ivar setting: its values, plain, for `metrics.json`: a dataclass or a mapping.
    :ivar table: shared by the settings of a run.
    :ivar gallery: keeps its pictures; None: none are kept.
    :ivar note: a sentence on what the setting is, for the report; may be empty.
    """

    name: str
    setting: Any
    table: FrameTable
    gallery: Gallery | None = None
    note: str = ""

    @property
    def next_index(self) -> int:
        """The first frame that has no record yet."""
        return self.table.next_index(self.name)

    def add(self, record: FrameRecord, fields: PairFields | None = None) -> None:
        """Keep the record of one more frame, and, thinned out, what it looks like."""
        if fields is not None and self.gallery is not None:
            self.gallery.add(record, fields)
        self.table.append(self.name, record)

    def values(self) -> dict[str, Any]:
        """The setting's values by name."""
        if dataclasses.is_dataclass(self.setting) and not isinstance(self.setting, type):
            return dataclasses.asdict(self.setting)
        return dict(self.setting)

    def series(self) -> Series:
        """Every record so far, read back from the table."""
        series = Series()
        for row in self.table.rows():
            if row["setting"] == self.name:
                series.add(row)
        return series


def write_text(path: Path, text: str) -> None:
    """Write a result file; it appears complete or not at all. Raises `MediaError` where it cannot be written."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise MediaError(f"cannot write {path}: {error}") from error
