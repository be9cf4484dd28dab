# SPDX-License-Identifier: Apache-2.0
"""The report of a run: one HTML file that needs nothing else, neither network nor neighbours."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deq_flow_ros.media.analysis import Analysis, Strip
from deq_flow_ros.media.flow_recording import FrameReport
from deq_flow_ros.media.pictures import color_range, data_uri, strip
from deq_flow_ros.media.plots import RunPlots

PHOTOMETRIC_TOP = 60.0
"""Grey levels that are white in the picture of the photometric error."""

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.12rem; margin: 2rem 0 .4rem; }
p { margin: .3rem 0 .6rem; } .note { color: #4a5568; } img.plot { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; margin: .4rem 0 1rem; } td, th { padding: .2rem .9rem .2rem 0; text-align: left;
border-bottom: 1px solid #e2e8f0; vertical-align: top; } th { font-weight: 600; } td.n, th.n { text-align: right; }
.strip { display: grid; gap: 4px; margin-bottom: 4px; } .strip img { width: 100%; display: block; }
.strip div, .time { font-size: .8rem; color: #4a5568; }
.bad { background: #fff5f5; border-left: 4px solid #c53030; padding: .5rem .8rem; }
details { margin-top: 1.5rem; } code { font-size: .88em; }
"""


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of `analysis.summarise` that matter most, as (what, value) for people."""
    account, error, compared = summary["account"], summary["error"], summary["cold_against_warm"]
    exact = error["flow"]["epe_visible_px"] is not None
    rows = [
        ("input", summary["input"]),
        ("frames published", str(account["published"])),
        ("processed / first / dropped", f"{account['processed']} / {account['first']} / {account['dropped']}"),
        ("flow fields per second", _number(summary["fields_per_second"], 1)),
        ("latency, median / 95 % / max", _spread(summary["latency_ms"], "ms", 1)),
        (
            "over budget" + (f" of {summary['budget_ms']:g} ms" if summary["budget_ms"] else ""),
            _percent(summary["over_budget_share"]),
        ),
        ("iterations, median / 95 % / max", _spread(summary["iterations"], "", 0)),
        ("warm starts", _percent(summary["warm_share"])),
        ("residual, median / 95 % / max", _spread(summary["residual_px"], "px", 3)),
        ("processing scale, mean", _number(summary["scale"]["mean"], 2)),
    ]
    if exact:
        rows.append(("endpoint error, visible / all", _pair(error["flow"], "epe_visible_px", "epe_px", "px")))
        rows.append(("the same of zero flow", _pair(error["no_flow"], "epe_visible_px", "epe_px", "px")))
    warped, still = error["flow"]["photometric"], error["no_flow"]["photometric"]
    rows.append(("photometric error, warped / not", f"{_number(warped, 2)} / {_number(still, 2)} grey levels"))
    if compared["pairs"]:
        key, unit = ("epe_visible_px", "px") if exact else ("photometric", "grey levels")
        values = (
            f"{_number(compared['warm'][key], 2)} / {_number(compared['cold'][key], 2)} {unit}; "
            "cold: same iterations plus a coarse-to-fine start"
        )
        rows.append((f"error warm / cold ({compared['pairs']} pairs)", values))
        warm, cold = (_number(compared[start]["residual_rms_px"], 3) for start in ("warm", "cold"))
        rows.append(("residual warm / cold, RMS, same pairs", f"{warm} / {cold} px"))
    return rows


def write_report(path: Path, summary: dict[str, Any], reports: Sequence[FrameReport], analysis: Analysis) -> None:
    """Write the HTML file. `summary` as `analysis.summarise` gives it, with input, model, budget_ms, direction,
    machine.
    """
    plots = RunPlots(reports, analysis.pairs)
    exact = summary["error"]["flow"]["epe_visible_px"] is not None
    budget = f"a latency budget of {summary['budget_ms']:g} ms" if summary["budget_ms"] else "no latency budget"
    error_note = (
        "Mean endpoint error over the pixels that are visible in both images, against the exact flow of the rendered "
        "scene. Grey: what zero flow would give, that is the mean length of the exact flow."
        if exact
        else "There is no exact flow for this input. Instead: mean absolute difference between one image and the "
        "other one warped onto it by the flow (blue), and without warping (grey), over the same pixels."
    )
    parts = [
        "<h1>Optical flow report</h1>",
        f"<p class='note'>Model {html.escape(str(summary['model']))}, {html.escape(str(summary['direction']))} flow, "
        f"{budget}, played at {summary['rate']:g} times the recorded rate. {html.escape(summary['machine'])}.</p>",
        _problems(summary["account"]["problems"]),
        _table(summary_rows(summary)),
        "<h2>Latency</h2><p>From the arrival of an image at the node to its flow. Images that come while one is being "
        "processed replace each other: the newest one wins, the others are dropped and counted.</p>",
        _plot(plots.latency()),
        _plot(plots.stages(summary["stage_ms"])),
        "<h2>Iterations</h2><p>The solver starts from the last pair's fixed point, moved along the motion, and stops "
        "when the flow has settled, when the cap is reached, or before the deadline would pass.</p>",
        _plot(plots.iterations()),
        "<h2>Residual</h2><p>RMS of the last update in pixels: how far the returned flow is from the fixed point. It "
        "is known for every frame and every pixel, without any reference.</p>",
        _plot(plots.residual()),
        f"<h2>Error</h2><p>{error_note}</p>",
        _plot(plots.error(exact)),
        "<h2>Cold against warm</h2>",
        _cold(plots, summary["cold_against_warm"], exact),
        "<h2>Pictures</h2>",
        _strips(analysis, reports, exact),
        _account(summary),
    ]
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' "
        "content='width=device-width, initial-scale=1'><title>Optical flow report</title>"
        f"<style>{_CSS}</style></head><body>{''.join(parts)}</body></html>"
    )
    path.write_text(page, encoding="utf-8")


def _problems(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    items = "".join(f"<div>{html.escape(problem)}</div>" for problem in problems)
    return f"<div class='bad'><b>Not every frame is accounted for.</b>{items}</div>"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    lines = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(lines)}</table>"


def _plot(svg: str) -> str:
    # As an image, not inline: the identifiers inside two inline documents would collide.
    return f"<img class='plot' alt='' src='data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}'>"


def _cold(plots: RunPlots, compared: dict[str, Any], exact: bool) -> str:
    if not compared["pairs"]:
        return "<p>No pair could be compared.</p>"
    return (
        f"<p>{compared['pairs']} pairs of the run, each solved again as the first of a stream, without "
        "what came before it and without a deadline: with as many iterations at the same scale, plus a coarse-to-fine "
        "start, that is further iterations at lower resolutions before them.</p>"
        + _plot(plots.cold_against_warm(exact))
    )


def _strips(analysis: Analysis, reports: Sequence[FrameReport], exact: bool) -> str:
    if not analysis.strips:  # fewer flow fields were recorded than reported, which the account says
        return "<p>No pictures were kept.</p>"
    start_ns, residual_px = reports[0].stamp_ns, _residual_top(analysis.strips)
    names = ["image", "flow", *(["exact flow"] if exact else [])]
    names += [f"residual (white: {residual_px:.2g} px)", f"photometric error (white: {PHOTOMETRIC_TOP:g})"]
    columns = f"style='grid-template-columns: repeat({len(names)}, 1fr)'"
    lines = [f"<div class='strip' {columns}>{''.join(f'<div>{html.escape(name)}</div>' for name in names)}</div>"]
    for preview in analysis.strips:
        max_px = color_range([preview])
        pictures = strip(preview, max_px, residual_px, PHOTOMETRIC_TOP)
        images = "".join(f"<img alt='' src='{data_uri(picture)}'>" for picture in pictures)
        seconds = (preview.stamp_ns - start_ns) * 1e-9
        caption = f"{seconds:.2f} s; full colour is {max_px:.1f} px"
        lines.append(f"<div class='time'>{caption}</div><div class='strip' {columns}>{images}</div>")
    note = "<p>Hue is the direction of the flow, saturation its speed; white is no motion, black is no flow.</p>"
    return note + "".join(lines)


def _residual_top(strips: Sequence[Strip]) -> float:
    values = np.concatenate([strip.residual.ravel() for strip in strips]).astype(np.float32)
    finite = values[np.isfinite(values)]  # without any iteration there is no residual
    return max(0.1, float(np.percentile(finite, 99))) if finite.size else 0.1


def _account(summary: dict[str, Any]) -> str:
    account = summary["account"]
    rows = [(f"first: {reason}", str(count)) for reason, count in account["first_reasons"].items()]
    rows += [(f"dropped: {reason}", str(count)) for reason, count in account["drop_reasons"].items()]
    rows += [(f"stopped: {reason}", str(count)) for reason, count in summary["stop_reasons"].items()]
    return f"<details open><summary>Account of every frame</summary>{_table(rows)}</details>"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _spread(values: dict[str, float | None], unit: str, digits: int) -> str:
    return " / ".join(_number(values[key], digits) for key in ("median", "p95", "max")) + (f" {unit}" if unit else "")


def _pair(values: dict[str, float | None], one: str, two: str, unit: str) -> str:
    return f"{_number(values[one], 2)} / {_number(values[two], 2)} {unit}"
