# SPDX-License-Identifier: Apache-2.0
"""``evaluate_bag`` on video: the flow of its pictures, and a named row for each packet that gives none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation_inputs import TOPIC, table
from video_streams import COUNT, FFMPEG, FOXGLOVE, KEY_EVERY, PERIOD_NS, encode, source_pictures, stamp_of, write_ros

from deq_flow_ros.recordings import open_source
from deq_flow_ros.recordings.bags import BagWriter

Evaluate = Callable[..., int]
MetricsOf = Callable[[Path], dict[str, Any]]


@pytest.fixture(scope="module")
def packets() -> dict[int, bytes]:
    """Of small pictures: the network takes most of the time."""
    return dict(enumerate(encode(source_pictures(COUNT, 48, 64), "libx264")))


def test_video_gives_the_flow_of_its_pictures(evaluate: Evaluate, tmp_path: Path, packets: dict[int, bytes]) -> None:
    """In all figures that do not depend on time, for a part of the recording too."""
    video = write_ros(tmp_path / "video", packets, FOXGLOVE, "h264")
    with BagWriter(tmp_path / "images") as writer:
        for frame in open_source(video).frames():
            writer.write_frame(TOPIC, frame)
    timed = ("latency_ms", "over_budget", "stage_")
    for part in ((), ("--start", 2.5e-9 * PERIOD_NS, "--max-frames", 4)):
        rows = []
        for name in ("video", "images"):
            out = tmp_path / f"{name}{len(part)}"
            assert evaluate(tmp_path / name, "--out", out, "--no-bag", *part) == 0
            rows.append([{k: v for k, v in row.items() if not k.startswith(timed)} for row in table(out)])
        assert rows[0] == rows[1] and len(rows[0]) == (4 if part else COUNT)
        assert [row["outcome"] for row in rows[0]] == ["first", *["processed"] * (len(rows[0]) - 1)]


@pytest.mark.parametrize("mode", ["offline", "realtime"])
def test_a_lost_key_frame_is_a_named_drop(
    evaluate: Evaluate, metrics_of: MetricsOf, tmp_path: Path, packets: dict[int, bytes], mode: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In the table, in the metrics and in what is printed, with the stamps of the packets that came."""
    kept = {number: data for number, data in packets.items() if number != KEY_EVERY}
    bag = write_ros(tmp_path / "bag", kept, FFMPEG, "libx264")
    assert evaluate(bag, "--out", tmp_path / "out", "--no-bag", *(["--realtime"] if mode == "realtime" else [])) == 1
    rows = table(tmp_path / "out")
    assert [int(row["stamp_ns"]) for row in rows] == [stamp_of(number) for number in kept]
    why = f"no key frame since packet {KEY_EVERY + 1} followed {KEY_EVERY - 1}"
    missing = [row for row in rows if row["reason"] == why]
    assert [int(row["index"]) for row in missing] == list(range(KEY_EVERY, 2 * KEY_EVERY - 1))
    assert all(row["outcome"] == "dropped" for row in missing)
    said = f"frames that cannot be read: {KEY_EVERY - 1}; the first is frame {KEY_EVERY}: {why}"
    assert said in metrics_of(tmp_path / "out")["problems"] and said in capsys.readouterr().out.replace("\n", " ")
