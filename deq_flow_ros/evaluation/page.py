# SPDX-License-Identifier: Apache-2.0
"""An HTML page that needs nothing else, neither network nor neighbours, and the pieces that it is made of."""

from __future__ import annotations

import html
from collections.abc import Iterable

from deq_flow_ros.evaluation.headline import Figure
from deq_flow_ros.evaluation.style import CSS


def html_page(title: str, body: Iterable[str]) -> str:
    """A whole page; `title` is plain text, `body` is HTML."""
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'>"
        # Nothing may be fetched, from anywhere: the page is what it is, wherever it lies.
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:; style-src "
        "'unsafe-inline'\"><link rel='icon' href='data:,'>"
        f"<title>{text(title)}</title><style>{CSS}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def text(plain: str) -> str:
    """Plain text as HTML."""
    return html.escape(plain)


def tiles(figures: Iterable[Figure]) -> str:
    """The figures that matter most, side by side."""
    return "<section class='tiles'>" + "".join(map(_tile, figures)) + "</section>"


def _tile(figure: Figure) -> str:
    return (
        f"<div><b>{text(figure.value)} <small>{text(figure.unit)}</small></b><span>{text(figure.title)}</span>"
        f"<small>{text(figure.note)}</small></div>"
    )


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Names and their values, plain text both."""
    return "<table>" + "".join(f"<tr><th>{text(a)}</th><td>{text(b)}</td></tr>" for a, b in rows) + "</table>"


def items(parts: Iterable[str], tag: str = "li") -> str:
    """Pieces of HTML, each in an element of its own."""
    return "".join(f"<{tag}>{part}</{tag}>" for part in parts)
