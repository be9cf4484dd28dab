# SPDX-License-Identifier: Apache-2.0
"""``flow_view``: a flow node and its live pictures in a web page, served on this machine.

``flow_view`` puts pictures and figures up on a board, which the server here hands to browsers. The server knows no ROS,
and nothing but the standard library.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

LOOKING_S = 3.0
"""For so long after a request its pictures count as looked at; a page that is open asks at least once a second."""


class Board:
    """Holds the latest of everything; nothing queues up for anybody. Callable from any thread.

    A browser asks again when it has drawn what it got, so that a slow one leaves pictures out, and one that is gone
    leaves nothing behind.

    :param clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._number = 0
        self._figures: dict[str, Any] = {}
        self._pictures: dict[str, tuple[int, dict[str, str]]] = {}
        self._looked_s: dict[str, float] = {}

    def looked_at(self) -> set[str]:
        """Names of the pictures that somebody looks at now."""
        with self._changed:
            return {name for name, at_s in self._looked_s.items() if self._clock() - at_s < LOOKING_S}

    def put_up(self, figures: dict[str, Any], pictures: Mapping[str, dict[str, str]]) -> None:
        """Replace the figures, and the pictures given by name; whoever waits gets them."""
        with self._changed:
            self._number += 1
            self._figures = figures
            self._pictures.update({name: (self._number, picture) for name, picture in pictures.items()})
            self._changed.notify_all()

    def clear(self) -> None:
        """Take everything down, so that nobody who comes later sees what is long past."""
        with self._changed:
            self._figures, self._pictures = {}, {}

    def look(self, after: int, names: Sequence[str], timeout_s: float) -> dict[str, Any]:
        """The figures, with the keys ``number``, the ``after`` of the next look, and ``pictures``: those of the
        names that are newer than ``after``. Waits for something newer, for at most ``timeout_s``.
        """
        with self._changed:
            self._looked_s.update(dict.fromkeys(names, self._clock()))
            if after > self._number:  # of a process before this one
                after = 0
            self._changed.wait_for(lambda: self._number > after, timeout_s)
            pictures = self._pictures.items()
            newer = {name: picture for name, (number, picture) in pictures if name in names and number > after}
            return {**self._figures, "number": self._number, "pictures": newer}


PAGE = Path(__file__).parent / "page"
FILES = {"/": "index.html", "/view.css": "view.css", "/view.js": "view.js"}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
MAX_CONNECTIONS = 64
"""Browsers keep one or two each; more are turned away, so that nobody can fill the memory with threads."""
WAIT_S = 1.0
"""An answer comes at least once in this time, also where nothing is new."""
DEAD_S = 10.0
"""A connection that neither sends nor takes anything for so long is given up."""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ViewServer(ThreadingTCPServer):
    """Listens from its construction on; ``start`` answers in threads of its own, until ``close``.

    Not one of ``http.server``, which would ask the name service who we are, for seconds.

    :param host: name or address of the interface to listen on.
    :param port: 0 takes a free one.
    :param pictures: names of the pictures that may be asked for.
    :raises OSError: where it cannot listen there; the message says what to do.
    :ivar url: of the page; on ``server_port``.
    """

    daemon_threads = allow_reuse_address = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, board: Board, host: str, port: int, pictures: Sequence[str]) -> None:
        self.board, self.pictures, self.local = board, frozenset(pictures), is_local(host)
        self.files = {path: (TYPES[Path(name).suffix], (PAGE / name).read_bytes()) for path, name in FILES.items()}
        self.closing = False
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            words = f"{error.strerror or error}; host is an address of this machine, port 1024 or above, such as 8080"
            if error.errno == errno.EADDRINUSE:
                words = f"it is in use, perhaps by another view; choose another port, such as port:={port + 1}"
            raise OSError(f"cannot listen on {host}, port {port}: {words}") from None
        self.server_port = self.server_address[1]
        anywhere = host in ("", "0.0.0.0", "::")
        name = socket.gethostname() if anywhere else f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self.server_port}/"

    def start(self) -> None:
        """Answer from now on."""
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True, name="http").start()

    def close(self) -> None:
        """Answer nobody any more, and free the port. Whoever waits is let go within ``WAIT_S``."""
        self.closing = True
        self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Browsers that go away in the middle of an answer are no error."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # one connection for all requests of a page
    server_version, sys_version = "flow_view", ""
    timeout = DEAD_S
    wbufsize = -1
    disable_nagle_algorithm = True
    server: ViewServer

    def do_GET(self) -> None:
        target = urlsplit(self.path)
        # A page of somebody else, whose name was made to lead here, must not see what the camera sees (DNS rebinding).
        if self.server.local and not is_local(_name_of(self.headers.get("Host", ""))):
            self._say(HTTPStatus.FORBIDDEN, "expected a request to localhost; see the parameter host")
        elif target.path in self.server.files:
            self._answer(HTTPStatus.OK, *self.server.files[target.path])
        elif target.path == "/live":
            self._live(parse_qs(target.query))
        else:
            self._say(HTTPStatus.NOT_FOUND, f"nothing is at {target.path[:100]}; the page is at /")

    def _live(self, query: dict[str, list[str]]) -> None:
        after, names = query.get("after", ["0"])[0], query.get("pictures", [""])[0].split(",")
        if not after.isdecimal() or len(after) > 18 or not self.server.pictures.issuperset(names):
            known = ",".join(sorted(self.server.pictures))
            self._say(HTTPStatus.BAD_REQUEST, f"expected /live?after=NUMBER&pictures={known} or some of these")
            return
        seen = self.server.board.look(int(after), names, WAIT_S)
        self._answer(HTTPStatus.OK, "application/json", json.dumps(seen).encode())

    def _say(self, status: HTTPStatus, words: str) -> None:
        self._answer(status, "text/plain", f"{words}\n".encode())

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        if self.server.closing:  # threads of open connections outlive the listening
            self.close_connection = True
            return
        self.send_response(status)
        about = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))}
        for name, value in {**HEADERS, **about}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the log of a robot has no room for each picture of each browser."""


def _name_of(host: str) -> str:
    """Of a name or address with or without a port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
