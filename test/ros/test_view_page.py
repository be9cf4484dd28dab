# SPDX-License-Identifier: Apache-2.0
"""The page of `flow_view` in a real browser, at the width of a phone and of a desktop."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import PROGRAM, Browser

from deq_flow_ros.imaging.pictures import data_uri
from deq_flow_ros.ros.view import Board, ViewServer

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs a browser: sudo apt install chromium")
NAMES = ("image", "flow", "residual", "uncertainty")
COUNTS = {"received": "1234567", "processed": "1234000", "first": "1", "dropped": "566", "lost": "0"}
LATEST = {
    "latency_ms": "98.7", "budget_ms": "90.000", "iterations": "3", "stop_reason": "deadline", "residual_px": "0.2",
    "scale": "0.5",
}  # fmt: skip
LIVE: dict[str, Any] = {
    "node": "/a_rather_long_namespace/with_several_parts/flow_node", "state": "live",
    "headline": "flow of /a_rather_long_namespace/with_several_parts/camera/image_raw", "cure": "", "counts": COUNTS,
    "latest": LATEST, "rates": {"in_hz": "30.00", "out_hz": "14.80"}, "history": [(60, 2), (80, 4), (98.7, 3)],
    "worst": {"level": "warning", "of": "flow", "message": "slower_than_the_camera" * 6},
}  # fmt: skip
WAITING = {
    **LIVE, "state": "waiting", "headline": "waiting for images on /lens", "cure": "start <b>the</b> camera",
    "history": [], "latest": {}, "rates": {},
}  # fmt: skip
WIDER = "document.documentElement.scrollWidth > innerWidth"


def drawn(value: int) -> dict[str, str]:
    return {"src": data_uri(np.full((36, 64, 3), value, np.uint8)), "note": f"picture {value}"}


@pytest.fixture
def server() -> Iterator[ViewServer]:
    server = ViewServer(Board(), "127.0.0.1", 0, NAMES)
    server.start()
    server.board.put_up(LIVE, {name: drawn(number) for number, name in enumerate(NAMES)})
    yield server
    server.close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path) as browser:
        yield browser


def text(browser: Browser, name: str) -> str:
    return browser.value(f"document.getElementById('{name}').textContent")


def test_the_page_shows_the_node_on_phone_and_desktop(server: ViewServer, browser: Browser, tmp_path: Path) -> None:
    """All there is to see, no scrolling sideways, not a word on the console, and no request to anybody else."""
    for width, height in ((390, 844), (1280, 800)):
        browser.open(server.url, width, height, dark=width < 600)
        browser.until("[...document.images].filter(image => image.naturalWidth == 64).length == 3")
        assert not browser.value(WIDER), width
        assert browser.value("innerWidth") == width
        paper = browser.value("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(18, 22, 28)" if width < 600 else "rgb(255, 255, 255)")
    assert (text(browser, "node"), text(browser, "headline")) == (LIVE["node"], LIVE["headline"])
    assert text(browser, "latency") == "99 ms of 90 ms" and text(browser, "iterations") == "3, ended by: deadline"
    assert text(browser, "latency-note").startswith("1 of the last 3 fields late")
    drawn_bars = "[...document.querySelectorAll('path')].map(path => (path.getAttribute('d').match(/M/g) || []).length)"
    assert browser.value(drawn_bars) == [2, 1, 1, 3], "bars in time, late, the budget, and of iterations"
    shown = browser.value("[...document.querySelectorAll('dd')].map(each => each.textContent)")
    assert shown == ["30.00", "14.80", *COUNTS.values()]
    assert text(browser, "worst-message") == LIVE["worst"]["message"]
    named = "one.alt || one.labels?.length || one.getAttribute('aria-label') || one.getAttribute('aria-labelledby')"
    unnamed = f"[...document.querySelectorAll('img, select, svg, section')].filter(one => !({named})).length"
    assert browser.value(unnamed) == 0, "without a name for a screen reader"
    browser.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert browser.said == []
    assert {url.partition("?")[0] for url in browser.requests if not url.startswith("data:image/")} <= {
        server.url + path for path in ("", "view.css", "view.js", "live")
    } | {"data:,"}


def test_the_page_follows_what_happens(server: ViewServer, browser: Browser) -> None:
    """Another map, new pictures, a camera that stops, a page that nobody sees, and a view that has ended."""
    browser.open(server.url, 390, 844)
    browser.until("document.getElementById('map-note').textContent == 'picture 2'")
    browser.value("(map => {map.value = 'uncertainty'; map.dispatchEvent(new Event('change'))})(which)")
    browser.until("document.getElementById('map-note').textContent == 'picture 3'")
    server.board.put_up(WAITING, {"image": drawn(200)})
    browser.until("document.getElementById('image-note').textContent == 'picture 200'")
    assert (text(browser, "headline"), text(browser, "cure")) == (WAITING["headline"], WAITING["cure"])
    assert browser.value("document.querySelector('[role=status]').contains(cure)"), "is not read out"
    assert not browser.value(WIDER) and browser.said == []
    browser.value("Object.defineProperty(document, 'hidden', {value: true, configurable: true}) && 1")
    server.board.put_up(LIVE, {})
    browser.until("document.body.dataset.state == 'live'")  # the question that was under way
    asked = len(browser.requests)
    server.board.put_up(WAITING, {})
    browser.value("new Promise(resolve => setTimeout(resolve, 200))")
    assert len(browser.requests) == asked and browser.value("document.body.dataset.state") == "live"
    browser.value("delete document.hidden && document.dispatchEvent(new Event('visibilitychange'))")
    browser.until("document.body.dataset.state == 'waiting'")
    server.close()
    browser.until("document.getElementById('headline').textContent.startsWith('no connection')")
