# SPDX-License-Identifier: Apache-2.0
"""The account of every frame and the errors of a run: both must notice what is wrong."""

import re
from pathlib import Path

import numpy as np
import pytest

from deq_flow_ros.media import Frame, MediaError, open_source
from deq_flow_ros.media.analysis import Analysis, Strip, analyse, summarise
from deq_flow_ros.media.bags import BagWriter, read_stamps
from deq_flow_ros.media.flow_recording import FrameReport, read_reports, take_account
from deq_flow_ros.media.frame import frame_from_array
from deq_flow_ros.media.metrics import endpoint_error, photometric_error
from deq_flow_ros.media.report import write_report

STEP_NS = 100_000_000
SHIFT = 3
"""The pictures of the made-up stream move so many pixels to the right from one to the next."""


def report(number: int, outcome: str = "processed", previous: int | None = None, **more: str) -> FrameReport:
    stamps = {"image1_stamp_ns": "", "image2_stamp_ns": str(number * STEP_NS)}
    if outcome == "processed":
        stamps["image1_stamp_ns"] = str((number - 1 if previous is None else previous) * STEP_NS)
    reason = {"first": "start", "dropped": "superseded by a newer frame"}.get(outcome, "")
    return FrameReport(
        number * STEP_NS, {"outcome": outcome, "reason": reason, "direction": "forward", **stamps, **more}
    )


def stamps(*numbers: int) -> list[int]:
    return [number * STEP_NS for number in numbers]


def test_a_complete_run_has_no_problems() -> None:
    """First, processed and dropped frames are all that was published; flow carries the previous image's stamp."""
    reports = [report(1, "first"), report(2), report(3, "dropped"), report(4, previous=2)]
    account = take_account(stamps(1, 2, 3, 4), reports, stamps(1, 2))
    assert account.problems == []
    assert (account.processed, account.first, account.dropped) == (2, 1, 1)
    assert account.drop_reasons == {"superseded by a newer frame": 1}


@pytest.mark.parametrize(
    ("published", "reports", "flow", "problem"),
    [
        ((1, 2, 3), [report(1, "first"), report(2)], (1,), "1 frames published, but no report says"),
        ((1, 2), [report(1, "first"), report(2), report(2, "dropped")], (1,), "1 frames reported, but never published"),
        ((1, 2), [report(1, "first"), report(2)], (), "1 frames processed, but their flow was not recorded"),
        ((1, 2), [report(1, "first"), report(2)], (2,), "flow messages whose stamp is not that of"),
        ((1, 2), [report(1, "first"), report(2, "dropped", reason="")], (), "1 frames were dropped without a reason"),
        ((1,), [report(1, "lost")], (), r"expected the outcomes processed, first and dropped, got \['lost'\]"),
    ],
)
def test_whatever_does_not_add_up_is_named(
    published: tuple[int, ...], reports: list[FrameReport], flow: tuple[int, ...], problem: str
) -> None:
    """A frame that vanishes, appears twice, or whose flow is missing or wrongly stamped, must each be noticed."""
    account = take_account(stamps(*published), reports, stamps(*flow))
    assert any(re.search(problem, line) for line in account.problems), account.problems


def test_backward_flow_carries_the_current_stamp() -> None:
    """The header rule turns around with the direction."""
    backward = report(2, direction="backward")
    assert backward.flow_stamp_ns == 2 * STEP_NS and report(2).flow_stamp_ns == STEP_NS
    assert take_account(stamps(1, 2), [report(1, "first"), backward], stamps(2)).problems == []


def picture(number: int) -> np.ndarray:
    texture = np.random.default_rng(0).integers(0, 256, (40, 120, 3), np.uint8)
    return texture[:, 50 - SHIFT * number : 114 - SHIFT * number]


def as_message(values: np.ndarray, encoding: str, stamp_ns: int) -> Frame:
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    height, width = values.shape[:2]
    return Frame(data, height, width, data.size // height, encoding, False, stamp_ns, stamp_ns, "camera")


@pytest.fixture(scope="module", params=["forward", "backward"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Six pictures that move by `SHIFT`, and a recording of their flow, 0.5 px wrong; frame 3 was dropped."""
    direction, root = request.param, tmp_path_factory.mktemp("run")
    with BagWriter(root / "input") as writer:
        for number in range(6):
            stamp = number * STEP_NS
            writer.write_frame("/image", frame_from_array(picture(number)[:, :, ::-1], stamp, stamp, "camera"))
    with BagWriter(root / "output") as writer:
        previous = 0
        for number in range(6):
            values = {"outcome": "processed", "direction": direction, "image2_stamp_ns": str(number * STEP_NS)}
            values |= {"iterations": "4", "warm": "true" if number > 1 else "false", "latency_ms": "30", "scale": "1"}
            values |= {"residual_px": "0.2", "over_budget": "false", "stage_solve_ms": "20", "stop_reason": "converged"}
            if number in (0, 3):
                values = {"outcome": "first" if number == 0 else "dropped", "reason": "because", "direction": direction}
                writer.write_diagnostics("/statistics", "flow", values, number * STEP_NS, number)
                continue
            values["image1_stamp_ns"] = str(previous * STEP_NS)
            writer.write_diagnostics("/statistics", "flow", values, number * STEP_NS, number)
            sign = 1 if direction == "forward" else -1
            flow = np.zeros((40, 64, 2), np.float32)
            flow[..., 0] = sign * SHIFT * (number - previous) + 0.5
            here = (previous if direction == "forward" else number) * STEP_NS
            residual = np.full((40, 64), 0.2, np.float32)
            writer.write_frame("/residual", as_message(residual, "32FC1", here))
            writer.write_frame("/flow", as_message(flow, "32FC2", here))
            previous = number
    return direction, root / "input", root / "output"


def finish(run: tuple[str, Path, Path], known: bool) -> tuple[list[FrameReport], Analysis]:
    _, source, bag = run
    reports = read_reports(bag, "/statistics")

    def exact(here: int, there: int) -> tuple[np.ndarray, np.ndarray]:
        flow = np.zeros((40, 64, 2), np.float32)
        flow[..., 0] = SHIFT * (there - here) / STEP_NS
        return flow, np.ones((40, 64), bool)

    def cold(report: FrameReport, image1: np.ndarray, image2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        number = round(report.stamp_ns / STEP_NS)
        assert np.array_equal(image2, picture(number)), "the cold start gets the very pair"
        return np.zeros((40, 64, 2), np.float32), np.ones((40, 64), np.float32)

    *_, result = analyse(bag, "/flow", "/residual", reports, open_source(source), exact if known else None, cold, 2)
    return reports, result


def test_errors_are_those_that_were_put_in(run: tuple[str, Path, Path]) -> None:
    """Pairs, gaps and directions must be matched with the right pictures: any mix-up changes these figures."""
    _, result = finish(run, known=True)
    assert [round(pair.report.stamp_ns / STEP_NS) for pair in result.pairs] == [1, 2, 4, 5]
    for pair in result.pairs:
        assert pair.warm.epe == pytest.approx(0.5, abs=1e-5) and pair.warm.residual == pytest.approx(0.2)
        assert pair.warm.photometric < 0.75 * pair.zero.photometric
    assert [pair.zero.epe for pair in result.pairs] == pytest.approx([SHIFT, SHIFT, 2 * SHIFT, SHIFT])
    compared = [pair.cold.epe for pair in result.pairs if pair.cold is not None]
    assert compared == pytest.approx([SHIFT, SHIFT]), "every second of the three warm pairs, with zero flow"


def test_a_long_stream_needs_no_more_memory(run: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of every pair of an hour would fill the memory: few are kept, evenly spread, and maps of a few only."""
    monkeypatch.setattr("deq_flow_ros.media.analysis.MAX_PREVIEWS", 2)
    monkeypatch.setattr("deq_flow_ros.media.analysis.STRIPS", 1)
    _, result = finish(run, known=True)
    stamps = [pair.report.flow_stamp_ns for pair in result.pairs]
    assert len(stamps) == 4 and result.preview_step == 4
    assert [preview.stamp_ns for preview in result.previews] == stamps[::4]
    assert [strip.stamp_ns for strip in result.strips] == [stamps[2]]
    assert not any(isinstance(preview, Strip) for preview in result.previews)


def test_without_any_flow_there_is_no_result(run: tuple[str, Path, Path]) -> None:
    """The caller must be able to tell; a pair that was reported but not recorded is no pair."""
    _, source, bag = run
    assert list(analyse(bag, "/none", "/residual", read_reports(bag, "/statistics"), open_source(source), None,
                        lambda *_: None, 1)) == []  # fmt: skip


def test_report_is_one_file_with_everything_in_it(run: tuple[str, Path, Path], tmp_path: Path) -> None:
    """It has to be readable without network and neighbours, with an exact flow as well as without."""
    for known in (True, False):
        reports, result = finish(run, known)
        account = take_account(stamps(*range(6)), reports, read_stamps(run[2], "/flow"))
        assert account.problems == []
        about = {"input": "a <b>", "model": "m", "direction": run[0], "budget_ms": 90.0, "rate": 1.0, "machine": "x"}
        summary = {**about, **summarise(account, reports, result.pairs, 0.6)}
        assert summary["fields_per_second"] == pytest.approx(4 / 0.6) and summary["warm_share"] == 0.75
        assert (summary["error"]["flow"]["epe_px"] is not None) == known
        write_report(tmp_path / "report.html", summary, reports, result)
        page = (tmp_path / "report.html").read_text()
        assert "a &lt;b&gt;" in page and "<b>" not in page
        assert page.count("data:image/svg+xml") == 6 and page.count("data:image/jpeg") == 4 * (5 if known else 4)
        assert "http" not in page.replace("http-equiv", "")


def test_input_that_is_not_the_one_played_is_noticed(run: tuple[str, Path, Path], tmp_path: Path) -> None:
    """Errors against the wrong pictures would look like a bad model."""
    with BagWriter(tmp_path / "other") as writer:
        writer.write_frame("/image", frame_from_array(picture(0), 5, 5, "camera"))
    with pytest.raises(MediaError, match="holds no frames stamped 0 and 100000000 ns"):
        finish((run[0], tmp_path / "other", run[2]), known=False)


def test_metrics_by_hand() -> None:
    """Masks and missing values: only what both sides know counts."""
    flow, exact = np.zeros((2, 2, 2), np.float32), np.zeros((2, 2, 2), np.float32)
    flow[0, 0] = (3, 4)
    exact[1, 1] = np.nan
    assert endpoint_error(flow, exact) == pytest.approx(5 / 3)
    assert endpoint_error(flow, exact, np.array([[True, False], [False, True]])) == 5
    assert np.isnan(endpoint_error(flow, np.full_like(exact, np.nan)))
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    right = np.zeros((4, 4, 2), np.float32)
    right[..., 0] = 1
    difference, warped, unwarped = photometric_error(image, image, right)
    assert (warped, unwarped) == (3.0, 0.0) and np.isnan(difference[:, 3]).all() and (difference[:, :3] == 3).all()
