# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium for tests of pages, driven through a pipe by its DevTools protocol: no package is needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """One page; everything it asks for and everything it says on its console is kept.

    :ivar requests: the addresses that the page asked for.
    :ivar said: lines of the console, and errors of scripts.
    """

    def __init__(self, folder: Path) -> None:
        assert PROGRAM is not None
        self.requests: list[str] = []
        self.said: list[str] = []
        self._number, self._session, self._unread = 0, "", b""
        read_by_browser, self._write = os.pipe()
        self._read, written_by_browser = os.pipe()

        def place() -> None:  # the protocol has these two numbers
            os.dup2(os.dup(read_by_browser), 3)
            os.dup2(os.dup(written_by_browser), 4)

        command = [PROGRAM, *OPTIONS, f"--user-data-dir={folder}", "about:blank"]
        with (folder / "browser.log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, preexec_fn=place, close_fds=False, start_new_session=True
            )
        os.close(read_by_browser)
        os.close(written_by_browser)
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._write)  # which ends it
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; returns its result."""
        self._number += 1
        call = {"id": self._number, "method": method, "params": parameters}
        call |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(call).encode() + b"\0")
        while True:
            message = self._next(30.0)
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    def _next(self, timeout_s: float) -> dict[str, Any]:
        while b"\0" not in self._unread:
            assert select.select([self._read], [], [], timeout_s)[0], "the browser does not answer"
            self._unread += os.read(self._read, 1 << 20)
        text, _, self._unread = self._unread.partition(b"\0")
        message = json.loads(text)
        about = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif message.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.said.append(json.dumps(about))
        return message

    def open(self, url: str, width: int, height: int, dark: bool = False) -> None:
        """Show a page in a window of this size, px."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self("Page.navigate", url=url)
        self.until("document.readyState == 'complete'")

    def value(self, script: str) -> Any:
        """Value of an expression of JavaScript in the page."""
        result = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script: str, timeout_s: float = 20.0, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until an expression of JavaScript is true."""
        give_up = time.monotonic() + timeout_s
        while not self.value(script):
            assert time.monotonic() < give_up, f"waited {timeout_s:g} s for {script}"
            meanwhile()
            time.sleep(0.05)

    def picture(self, path: Path) -> None:
        """Write a PNG of all of the page."""
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", captureBeyondViewport=True)["data"]))
