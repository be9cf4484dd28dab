# SPDX-License-Identifier: Apache-2.0
"""The results of a recording, for all modes: their folder, and the figures of ``metrics.json``.

During a run, the table of frames, the previews and the bag with the flow grow. At the end, all else is made from them.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from deq_flow_ros.evaluation import report
from deq_flow_ros.evaluation.gallery import Gallery, write_moving_pictures
from deq_flow_ros.evaluation.records import (
    DROPPED,
    FIRST,
    MEASURES,
    OUTCOMES,
    PROCESSED,
    STAGES,
    FrameRecord,
    FrameTable,
    read_frames,
)
from deq_flow_ros.evaluation.report import SettingEntry
from deq_flow_ros.host import environment, machine, peak_memory_mb, versions
from deq_flow_ros.imaging import MediaError
from deq_flow_ros.recordings.bags import FlowBag, check_recording
from deq_flow_ros.recordings.files import check_name, write_json, write_text
from deq_flow_ros.streaming.interface import pair_values

RESULTS = (report.REPORT, report.METRICS, report.VIDEO, report.ANIMATION, report.FRAMES)
BAG, RECORDING = "flow", "recording"
"""Folders of the bag with the flow: what an evaluation wrote, and what a node published in a live run."""
STATE, RUN = ".run", "run.json"
"""Folder beside the results with what is needed only during a run, and the file in it that identifies the run."""
VERSION = 2
"""Version of the layout of ``metrics.json``. It increases when a key changes its meaning or is removed."""
SPREAD = ("mean", "median", "p95", "p99", "max")


@dataclass
class RunInfo:
    """A whole run, as docs/evaluate_bag.md describes the entries of ``metrics.json``.

    :ivar played_s: how long the stream lasted, if frames came at their own pace; else None.
    :ivar shares: shares of the time, from ``TimeShares.shares``.
    """

    mode: str
    input: dict[str, Any]
    seconds: float = 0.0
    played_s: float | None = None
    shares: dict[str, float] = field(default_factory=dict)
    costs: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)
    transport: dict[str, int] | None = None
    complete: bool = True
    threads: int | None = None


def summarise(settings: Sequence[SettingEntry], frames: pd.DataFrame, run: RunInfo) -> dict[str, Any]:
    """The content of ``metrics.json``; the main setting is the first one. Values that are not known are None."""
    by_setting = {setting.name: frames[frames.setting == setting.name] for setting in settings}
    entries = [
        {"name": one.name, "setting": dict(one.values)}
        | _figures(by_setting[one.name], run.played_s, bool(one.values.get("budget_ms")))
        for one in settings
    ]
    return {
        "version": VERSION,
        "mode": run.mode,
        "complete": run.complete,
        "input": run.input,
        "settings": entries,
        "comparison": report.compare(by_setting),
        "problems": [*run.problems, *report.doubtful(by_setting[settings[0].name])],
        "transport": run.transport,
        "run": {
            "seconds": run.seconds,
            "played_seconds": run.played_s,
            "time_shares": run.shares,
            "peak_memory_mb": peak_memory_mb(),
            "machine": machine(),
            "threads": run.threads,
            "environment": environment(),
            "versions": versions(),
            "costs": run.costs,
        },
    }


def spread(values: pd.Series) -> dict[str, float | None]:
    """Mean, median, 95th and 99th percentile and maximum of the known values; None if there are none."""
    figures = (values.mean(), *values.quantile([0.5, 0.95, 0.99]), values.max())  # which leave out NaN
    return {name: None if pd.isna(figure) else float(figure) for name, figure in zip(SPREAD, figures, strict=True)}


def count_words(frames: pd.DataFrame, column: str, outcome: str) -> dict[str, int]:
    """Count how often each text of a column occurs in the rows of an outcome, the most frequent first.

    Texts that differ only in numbers are counted together, with "…" in place of the numbers.
    """
    words = frames.loc[(frames.outcome == outcome) & (frames[column] != ""), column]
    kinds = words.str.replace(r"-?\d+(\.\d+)?", "…", regex=True)
    several = words.groupby(kinds).transform("nunique") > 1
    return dict(Counter(kinds.where(several, words)).most_common())


def _figures(frames: pd.DataFrame, played_s: float | None, limited: bool) -> dict[str, Any]:
    """Figures of one setting; ``limited`` says whether it has a budget."""
    done = frames[frames.outcome == PROCESSED]
    latency = spread(done.latency_ms)
    took_s = 1e-3 * len(done) * (latency["mean"] or 0.0) if played_s is None else played_s
    stages = {stage: done[f"stage_{stage}_ms"] for stage in STAGES}
    return {
        "frames": {
            "all": len(frames),
            **{outcome: int((frames.outcome == outcome).sum()) for outcome in OUTCOMES},
            "first_reasons": count_words(frames, "reason", FIRST),
            "drop_reasons": count_words(frames, "reason", DROPPED),
        },
        "fields_per_second": len(done) / took_s if took_s else None,
        "latency_ms": latency,
        "deadline_miss_share": spread(done.over_budget)["mean"] if limited else None,
        "warm_share": spread(done.warm)["mean"],
        "resets": count_words(frames, "reset_reason", PROCESSED),
        "iterations": spread(done.iterations),
        "stop_reasons": count_words(frames, "stop_reason", PROCESSED),
        "residual_px": spread(done.residual_px),
        "scale": spread(done["scale"]),
        "stage_ms": {stage: spread(values) for stage, values in stages.items() if values.notna().any()},
        "measures": {name: {"pairs": n, **spread(done[name])} for name in MEASURES if (n := int(done[name].count()))},
    }


class OccupiedError(MediaError):
    """The folder holds something that must not be replaced, or another process writes to it."""


def _are_ours(metrics: Mapping[str, Any]) -> bool:
    """Whether a ``metrics.json`` is that of an evaluation: all that older versions left to know their results by."""
    return {"version", "mode", "complete", "input", "settings", "comparison", "run"} <= metrics.keys()


class ResultFolder(ExitStack):
    """A folder for the results of one run; use it in a ``with`` statement, during which it is locked from ``begin`` on.

    Nothing in it is changed before ``begin``: a run that fails until then leaves earlier results as they are. Only
    files that an evaluation wrote are ever removed.

    :param identity: everything that the results depend on, as plain values.
    :param inputs: the files and folders that are read, which must lie elsewhere.
    :param resume: whether to keep complete results of this identity and replace incomplete ones.
    :param overwrite: whether to replace the results of any run.
    :ivar begun: whether a run has begun to write its results to this folder, of an older version perhaps.
    :ivar complete: whether the results are already complete.
    :raises OccupiedError: if the folder holds something else.
    :raises MediaError: if nothing can be written.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, Any], inputs: Iterable[str] = (), resume: bool = False,
        overwrite: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.path, self.state, self.complete, self._identity = path, path / STATE, False, dict(identity)
        check_name(path)
        write = path.resolve()
        for read in (Path(source).resolve() for source in inputs):
            if read == write or read in write.parents or write in read.parents:
                inside = f"the input {read} and the results {write} lie inside of each other"
                raise MediaError(f"{inside}; choose another --out")
        self.begun = (self.state / RUN).is_file() or _are_ours(report.read_json(path / report.METRICS) or {})
        if path.exists() and not path.is_dir():
            raise MediaError(f"cannot write to {path}: it is a file; choose another --out")
        before = report.read_json(self.state / RUN) or {}
        if self.begun and resume:
            if other := [name for name, value in self._identity.items() if before.get(name) != value]:
                has = f"the run in {path} had another {' and '.join(other)}; repeat its options, "
                raise OccupiedError(f"{has}choose another --out, or start anew with --overwrite")
            self.complete = bool(before.get("complete")) and report.read_json(path / report.METRICS) is not None
        elif self.begun and not overwrite:
            what, hint = "a run", "--overwrite replaces them"
            if before.get("complete") is False:
                what, hint = "an interrupted run", "--resume starts it again, --overwrite replaces them"
            raise OccupiedError(f"the folder {path} holds the results of {what}; {hint}, or choose another --out")
        there = sorted(child.name for child in path.iterdir() if child.name != STATE) if path.exists() else []
        if self.begun and not self.complete:
            for bag in (BAG, RECORDING):
                check_recording(path / bag)
        elif not self.begun and (taken := [name for name in there if name in (*RESULTS, BAG, RECORDING)]):
            holds = f"the folder {path} holds {', '.join(taken)}, which no evaluation is known to have written"
            raise OccupiedError(f"{holds}; move it away, or choose another --out")
        elif not self.begun and there and not overwrite:
            holds = f"the folder {path} exists and holds {', '.join(there[:4])}"
            raise OccupiedError(f"{holds}; choose another --out, or --overwrite to write beside them")

    def begin(self) -> None:
        """Remove what is left of an earlier run, and note that this one writes its results from now on.

        :raises OccupiedError: if another process writes to the folder.
        :raises MediaError: if that cannot be done.
        """
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            # Two runs in one folder would mix their frames. The system releases the lock when the process ends.
            lock = self.enter_context((self.state / "lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.begun:
                for bag in (self.path / BAG, self.path / RECORDING):
                    check_recording(bag)
                    if bag.exists():
                        shutil.rmtree(bag)
                for name in RESULTS:
                    (self.path / name).unlink(missing_ok=True)
            self.begun = True
            self.finish(complete=False)
        except BlockingIOError:
            raise OccupiedError(f"another run writes to {self.path}; wait for it, or choose another --out") from None
        except OSError as error:
            raise MediaError(f"cannot write to {self.path}: {error}") from error

    def finish(self, complete: bool) -> None:
        """Note whether all results are written, and remove the files that are needed only during a run."""
        write_text(self.state / RUN, json.dumps({**self._identity, "complete": complete}))
        for child in self.state.iterdir():
            if child.is_dir():
                shutil.rmtree(child)


class ResultWriter(ExitStack):
    """Writes the results of a run. Use it in a ``with`` statement, and call ``finish`` afterwards.

    :param settings: the settings of the run, the main one first. One without records is left out of the results.
    :param bag: for the flow of the main setting, and with ``images`` the images; None: the flow is not recorded.
    :raises MediaError: if something cannot be written. All methods raise it.
    """

    def __init__(
        self,
        folder: ResultFolder,
        settings: Sequence[SettingEntry],
        bag: FlowBag | None = None,
        images: bool = False,
    ) -> None:
        super().__init__()
        self._out, self._settings, self._images = folder.path, settings, images
        self._galleries = {one.name: Gallery(folder.state / f"previews{n}") for n, one in enumerate(settings)}
        self._table = FrameTable(self._out / report.FRAMES)
        self.callback(self._table.close)
        self._bag = None if bag is None else self.enter_context(bag)

    def add(self, setting: str, record: FrameRecord) -> None:
        """Add one more frame with a setting."""
        frame, fields, info = record.frame, record.fields, record.info
        if fields is not None:
            self._galleries[setting].add(record, fields)
        self._table.append(setting, record)
        if self._bag is None or frame is None or setting != self._settings[0].name:
            return
        # The account that the node would give of the frame, and the measures.
        account = {"outcome": record.outcome, "reason": record.reason, "image2_stamp_ns": str(record.stamp_ns)}
        account |= {} if info is None else pair_values(info, info.stage_ms)
        account |= {name: f"{value:.6g}" for name, value in record.measures.items()}
        published: dict[str, Any] = {"image": frame.image if self._images else None}
        if fields is not None and info is not None:
            published |= {name: getattr(fields, name) for name in ("flow", "residual", "uncertainty")}
            forward = fields.direction == "forward"
            published["flow_stamp_ns"] = info.previous_stamp_ns if forward else frame.stamp_ns
        self._bag.add(frame.stamp_ns, frame.record_ns, frame.frame_id, account, **published)

    def finish(self, run: RunInfo) -> dict[str, Any]:
        """Write ``metrics.json``, ``report.html`` and, if there is flow, ``flow.mp4`` and ``flow.webp``.

        :returns: the metrics.
        """
        frames = read_frames(self._out / report.FRAMES)
        main, *others = self._settings
        there = [main, *(setting for setting in others if (frames.setting == setting.name).any())]
        metrics = summarise(there, frames, run)
        write_json(self._out / report.METRICS, metrics)
        report.write_report(self._out / report.REPORT, there, frames, metrics, self._galleries)
        if len(self._galleries[main.name]):
            write_moving_pictures(self._out / report.VIDEO, self._out / report.ANIMATION, self._galleries[main.name])
        return metrics
