# SPDX-License-Identifier: Apache-2.0
"""The folder with the results of a recording: its lock, and the writing of results for all modes.

During a run, the table of frames, the previews and the bag with the flow grow. At the end, all else is made from them.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from deq_flow_ros.evaluation.gallery import Gallery, write_moving_pictures
from deq_flow_ros.evaluation.records import FrameTable, read_frames
from deq_flow_ros.evaluation.report import ANIMATION, FRAMES, METRICS, REPORT, VIDEO, read_json, write_report
from deq_flow_ros.evaluation.runs import FrameOutcome
from deq_flow_ros.evaluation.summary import RunInfo, SettingEntry, summarise
from deq_flow_ros.imaging import MediaError
from deq_flow_ros.recordings.bags import TOPICS, FlowBag, check_recording, remove_recording
from deq_flow_ros.recordings.files import check_name, write_json, write_text
from deq_flow_ros.streaming.interface import pair_values

RESULTS = (REPORT, METRICS, VIDEO, ANIMATION, FRAMES)
BAG, RECORDING = "flow", "recording"
"""Folders of the bag with the flow: what an evaluation wrote, and what a node published in a live run."""
STATE, RUN = ".run", "run.json"
"""Folder beside the results with what is needed only during a run, and the file in it that identifies the run."""


class OccupiedError(MediaError):
    """The folder holds something that must not be replaced, or another process writes to it."""


class ResultFolder(ExitStack):
    """A folder for the results of one run; use it in a ``with`` statement, during which it is locked from ``begin`` on.

    Nothing in it is changed before ``begin``: a run that fails until then leaves earlier results as they are. Only
    files that an evaluation wrote are ever removed.

    :param identity: everything that the results depend on, as plain values.
    :param inputs: the files and folders that are read, which must lie elsewhere.
    :param resume: whether to keep complete results of this identity and replace incomplete ones.
    :param overwrite: whether to replace the results of any run.
    :ivar begun: whether a run has begun to write its results to this folder.
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
        self.begun = (self.state / RUN).is_file()
        if path.exists() and not path.is_dir():
            raise MediaError(f"cannot write to {path}: it is a file; choose another --out")
        if self.begun:
            self._check_earlier(read_json(self.state / RUN) or {}, resume, overwrite)
        elif path.exists():
            self._check_foreign(overwrite)

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
                for bag in (BAG, RECORDING):
                    remove_recording(self.path / bag, TOPICS)
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

    def _check_foreign(self, overwrite: bool) -> None:
        """Allow results beside other files only with ``overwrite``, and never in place of them."""
        if taken := [name for name in (*RESULTS, BAG, RECORDING) if (self.path / name).exists()]:
            holds = f"the folder {self.path} holds {', '.join(taken)}, which no evaluation is known to have written"
            raise OccupiedError(f"{holds}; move it away, or choose another --out")
        there = sorted(child.name for child in self.path.iterdir() if child.name != STATE)
        if there and not overwrite:
            holds = f"the folder {self.path} exists and holds {', '.join(there[:4])}"
            raise OccupiedError(f"{holds}; choose another --out, or --overwrite to write beside them")

    def _check_earlier(self, before: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
        if not resume and not overwrite:
            what, hint = "an interrupted run", "--resume starts it again, --overwrite replaces them"
            if before.get("complete"):
                what, hint = "a run", "--overwrite replaces them"
            raise OccupiedError(f"the folder {self.path} holds the results of {what}; {hint}, or choose another --out")
        if resume:
            if other := [name for name, value in self._identity.items() if before.get(name) != value]:
                raise OccupiedError(
                    f"the run in {self.path} had another {' and '.join(other)}; repeat its options, choose another "
                    "--out, or start anew with --overwrite"
                )
            self.complete = bool(before.get("complete")) and read_json(self.path / METRICS) is not None
        if not self.complete:
            for bag in (BAG, RECORDING):
                check_recording(self.path / bag, TOPICS)


class ResultWriter(ExitStack):
    """Writes the results of a run. Use it in a ``with`` statement, and call ``finish`` afterwards.

    :param settings: the settings of the run, the main one first. One without outcomes is left out of the results.
    :param bag: for the flow of the main setting, and with ``images`` the images; None: the flow is not recorded.
    :raises MediaError: if something cannot be written. All methods raise it.
    """

    def __init__(
        self, folder: ResultFolder, settings: Sequence[SettingEntry], bag: FlowBag | None = None, images: bool = False
    ) -> None:
        super().__init__()
        self._out, self._settings, self._images = folder.path, settings, images
        self._galleries = {one.name: Gallery(folder.state / f"previews{n}") for n, one in enumerate(settings)}
        self._table = FrameTable(self._out / FRAMES)
        self.callback(self._table.close)
        self._bag = None if bag is None else self.enter_context(bag)

    def add(self, setting: str, outcome: FrameOutcome) -> None:
        """Add the outcome of one more frame with a setting."""
        record, frame, fields = outcome.record, outcome.frame, outcome.fields
        if fields is not None:
            self._galleries[setting].add(record, fields)
        self._table.append(setting, record)
        if self._bag is None or frame is None or setting != self._settings[0].name:
            return
        # The account that the node would give of the frame, and the measures.
        account = {"outcome": record.outcome, "reason": record.reason, "image2_stamp_ns": str(record.stamp_ns)}
        account |= {} if outcome.info is None else pair_values(outcome.info, record.stage_ms)
        account |= {name: f"{value:.6g}" for name, value in record.measures.items()}
        published: dict[str, Any] = {"image": frame.image if self._images else None}
        if fields is not None:
            published |= {name: getattr(fields, name) for name in ("flow", "residual", "uncertainty")}
            forward = fields.direction == "forward"
            published["flow_stamp_ns"] = record.previous_stamp_ns if forward else frame.stamp_ns
        self._bag.add(frame.stamp_ns, frame.record_ns, frame.frame_id, account, **published)

    def finish(self, run: RunInfo) -> dict[str, Any]:
        """Write ``metrics.json``, ``report.html`` and, if there is flow, ``flow.mp4`` and ``flow.webp``.

        :returns: the metrics.
        """
        frames = read_frames(self._out / FRAMES)
        main, *others = self._settings
        there = [main, *(setting for setting in others if (frames.setting == setting.name).any())]
        metrics = summarise(there, frames, run)
        write_json(self._out / METRICS, metrics)
        write_report(self._out / REPORT, there, frames, metrics, self._galleries)
        if len(self._galleries[main.name]):
            write_moving_pictures(self._out / VIDEO, self._out / ANIMATION, self._galleries[main.name])
        return metrics
