# SPDX-License-Identifier: Apache-2.0
"""The report of a run: one HTML file that needs nothing else, neither network nor neighbours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deq_flow_ros.evaluation.gallery import Gallery
from deq_flow_ros.evaluation.headline import Metrics, comparison, error_measure, headline, mode, number
from deq_flow_ros.evaluation.measures import MEASURES
from deq_flow_ros.evaluation.page import html_page, items, table, text, tiles
from deq_flow_ros.evaluation.pictures import (
    color_range,
    colour_wheel,
    flow_picture,
    panels,
    top,
    write_video,
)
from deq_flow_ros.evaluation.plots import RunPlots, stage_bars
from deq_flow_ros.evaluation.results import Results, write_text
from deq_flow_ros.evaluation.summary import RunInfo, summarise, write_metrics
from deq_flow_ros.media.pictures import data_uri

REPORT, METRICS, VIDEO, FRAMES = "report.html", "metrics.json", "flow.mp4", "frames.csv"
"""Names of the results in their folder."""
RESULTS = (REPORT, METRICS, VIDEO, FRAMES)


def write_outputs(out: Path, results: Sequence[Results], run: RunInfo) -> dict[str, Any]:
    """`metrics.json`, `report.html` and `flow.mp4` of a run, from its tables and galleries; returns the metrics.

    The first of the results is the main one. Raises `MediaError` where a file cannot be written.
    """
    metrics = summarise(results, run)
    write_metrics(out / METRICS, metrics)
    write_report(out / REPORT, results, metrics)
    gallery = results[0].gallery
    if gallery is not None and len(gallery):
        write_video(out / VIDEO, gallery)
    return metrics


def write_report(path: Path, results: Sequence[Results], metrics: Metrics) -> None:
    """Write the HTML file. Raises `MediaError` where it cannot be written."""
    main = metrics["settings"][0]
    what = str(metrics["input"].get("description", ""))
    body = [
        f"<header><h1>Optical flow report</h1><p>{text(what)}</p>"
        f"<p class='note'>{text(_subtitle(results, metrics))}</p></header>",
        _problems(metrics),
        tiles(headline(metrics)),
        _comparison(results, metrics),
        _plots(results, metrics),
        _stages(main),
        _pictures(results, main),
        _account(metrics),
        _definitions(metrics),
        _made_with(metrics),
    ]
    write_text(path, html_page(f"Optical flow report: {what}", body))


def _subtitle(results: Sequence[Results], metrics: Metrics) -> str:
    parts = [results[0].note, mode(metrics), metrics["run"]["machine"]]
    return "; ".join(part for part in parts if part) + "."


def _problems(metrics: Metrics) -> str:
    problems = list(metrics["problems"])
    if not metrics["complete"]:
        problems.append("The run was interrupted: this is what it had by then.")
    if not problems:
        return ""
    return "<section class='bad'><b>To be known first</b><ul>" + items(map(text, problems)) + "</ul></section>"


def _comparison(results: Sequence[Results], metrics: Metrics) -> str:
    if len(results) < 2:
        return ""
    names = [f"<th>{text(result.name)}</th>" for result in results]
    rows = []
    for title, values, best in comparison(metrics):
        cells = [f"<td{' class=best' if n in best else ''}>{text(value)}</td>" for n, value in enumerate(values)]
        rows.append(f"<tr><th>{text(title)}</th>{''.join(cells)}</tr>")
    notes = items(f"<b>{text(result.name)}</b>: {text(result.note)}" for result in results if result.note)
    return (
        f"<section><h2>Settings compared</h2><p>Means over the {metrics['comparison']['pairs']} pairs for which every "
        "setting gave flow, each value over those where all know it; the best is bold. Frames with flow and late ones "
        f"are counted over all.</p><div class='wide'><table class='compared'><tr><th></th>{''.join(names)}</tr>"
        f"{''.join(rows)}</table></div><ul class='note'>{notes}</ul></section>"
    )


def _plots(results: Sequence[Results], metrics: Metrics) -> str:
    main = metrics["settings"][0]
    plots = RunPlots({result.name: result.series() for result in results})
    budget = main["setting"].get("budget_ms")
    error = error_measure(main)
    measure = MEASURES[error]
    still = ("photometric_still", "without warping") if error == "photometric" else ("epe_still_px", "zero flow")
    figures = [
        ("Latency", plots.latency(budget), "From the arrival of a frame to its flow."),
        ("Latency of all frames", plots.latencies(budget), "How many frames are done within which time."),
        (
            measure.title.capitalize(), plots.of_all(error, measure.unit, *still),
            measure.definition,
        ),
        (
            "Forward-backward error", plots.of_all("consistency_px", "px"),
            MEASURES["consistency_px"].definition,
        ),
        ("Flicker", plots.of_all("flicker_px", "px"), MEASURES["flicker_px"].definition),
        (
            "Iterations", plots.iterations(),
            "A warm start is the last pair's fixed point, moved along the motion. The solver stops when the flow has "
            "settled, at the cap, or before the deadline would pass.",
        ),
        (
            "Residual", plots.of_all("residual_px", "px", log=True),
            "RMS of the solver's last update: how far the flow is from its fixed point, known without any reference.",
        ),
        ("Processing scale", plots.scale(), "1 is the resolution of the images; it gives way when time is short."),
    ]  # fmt: skip
    shown = "".join(
        f"<figure><h3>{text(title)}</h3>{svg}<figcaption>{text(caption)}</figcaption></figure>"
        for title, svg, caption in figures
        if svg
    )
    return f"<section><h2>Over the recording</h2><div class='plots'>{shown}</div></section>"


def _stages(main: Metrics) -> str:
    bars = [
        f"<tr><th>{text(name)}</th><td>{mean:.1f} ms</td>"
        f"<td class='bar'><i style='width:{100 * share:.1f}%'></i></td></tr>"
        for name, mean, share in stage_bars(main["stage_ms"])
    ]
    if not bars:
        return ""
    return (
        "<section><h2>Where the time goes</h2><p>Mean of each stage of a frame.</p>"
        f"<table class='stages'>{''.join(bars)}</table></section>"
    )


def _pictures(results: Sequence[Results], main: Metrics) -> str:
    gallery = results[0].gallery
    if gallery is None or not len(gallery):
        return ""
    others = [(result.name, result.gallery) for result in results[1:] if result.gallery is not None]
    error = MEASURES[error_measure(main)]
    strips = [
        _strip(gallery, label, index, f"{error.title} {{}} {error.unit}", others) for label, index in gallery.ranked()
    ]
    return (
        "<section><h2>Best, median and worst frames</h2><div class='key'>"
        f"<img alt='key of the flow colours' width='72' height='72' src='{data_uri(colour_wheel())}'>"
        f"<p>Ranked by {text(error.title)}. Hue is the direction of the flow, saturation its speed; white is no "
        "motion, black is no value. In residual and error, black is none and yellow-white the most.</p></div>"
        f"{''.join(strips)}</section>"
    )


def _strip(gallery: Gallery, label: str, index: int, error: str, others: Sequence[tuple[str, Gallery]]) -> str:
    preview = gallery.preview(index)
    max_px, residual_px = color_range([preview]), top(preview.residual, 0.1)
    grey_levels = top(preview.photometric, 10.0)
    shown = panels(preview, max_px, residual_px, grey_levels)
    shown += [(f"flow, {name}", flow_picture(other.preview(index), max_px)) for name, other in others if index in other]
    notes = {
        "flow": f", full colour {max_px:.1f} px",
        "residual": f" ≤ {residual_px:.2g} px",
        "photometric error": f" ≤ {grey_levels:.0f}",
    }
    images = "".join(
        f"<figure><img alt='{text(name)} of frame {index}' src='{data_uri(picture)}'><figcaption>{text(name)}"
        f"{text(notes.get(name, ''))}</figcaption></figure>"
        for name, picture in shown
    )
    heading = f"<b>{text(label)}</b>: frame {index}, {text(error.format(number(preview.rank)))}"
    return f"<p class='strip'>{heading}</p><div class='panels'>{images}</div>"


def _account(metrics: Metrics) -> str:
    blocks = []
    for figures in metrics["settings"]:
        frames = figures["frames"]
        rows = [(outcome, str(frames[outcome])) for outcome in ("all", "processed", "first", "dropped")]
        for title, reasons in (
            ("first", frames["first_reasons"]), ("dropped", frames["drop_reasons"]),
            ("stream began anew", figures["resets"]), ("solver stopped", figures["stop_reasons"]),
        ):  # fmt: skip
            rows += [(f"{title}: {reason}", str(count)) for reason, count in reasons.items()]
        blocks.append(f"<h3>{text(figures['name'])}</h3>{table(rows)}")
    return f"<section><h2>Account of every frame</h2><div class='columns'>{items(blocks, 'div')}</div></section>"


def _definitions(metrics: Metrics) -> str:
    known = {name for figures in metrics["settings"] for name in figures["measures"]}
    shown = [
        f"<b>{text(measure.title)}</b> [{text(measure.unit)}] {text(measure.definition)} "
        f"<cite>{text(measure.reference)}</cite>"
        for name, measure in MEASURES.items()
        if name in known
    ]
    return f"<section><h2>How it is measured</h2><ul class='definitions'>{items(shown)}</ul></section>"


def _made_with(metrics: Metrics) -> str:
    run = metrics["run"]
    rows = [(name, _plain(value)) for name, value in metrics["input"].items()]
    rows += [("mode", mode(metrics)), ("machine", run["machine"])]
    rows += [(name, "not set" if value is None else value) for name, value in run["environment"].items()]
    rows += [(name, version) for name, version in run["versions"].items()]
    rows.append(("run", f"{run['seconds']:.1f} s, peak memory {run['peak_memory_mb']:.0f} MB"))
    rows += [(f"time spent on {name}", f"{100 * share:.1f} %") for name, share in run["time_shares"].items()]
    settings = [
        f"<h3>{text(figures['name'])}</h3>"
        + table([(name, _plain(value)) for name, value in figures["setting"].items()])
        for figures in metrics["settings"]
    ]
    return (
        "<section><h2>Settings, input and versions</h2><div class='columns'>"
        f"<div><h3>Run</h3>{table(rows)}</div>{items(settings, 'div')}</div></section>"
    )


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "none" if value is None else json.dumps(value, default=str)
