# SPDX-License-Identifier: Apache-2.0
"""The page of `flow_view` over HTTP, without ROS and a browser: whoever comes gets the newest, or a clear no."""

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from deq_flow_ros.ros import view as view_server
from deq_flow_ros.ros.view import FILES, LOOKING_S, PAGE, Board, ViewServer, is_local

NAMES = ("image", "flow")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ViewServer]:
    """A server with one picture on its board."""
    monkeypatch.setattr(view_server, "WAIT_S", 0.2)
    server = ViewServer(Board(), "127.0.0.1", 0, NAMES)
    server.start()
    server.board.put_up({"state": "live"}, {"image": {"src": "one"}})
    yield server
    server.close()


def get(server: ViewServer, path: str, method: str = "GET", **headers: str) -> tuple[int, http.client.HTTPMessage, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=15)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, text


def live(server: ViewServer, after: int = 0, pictures: str = "image,flow") -> dict[str, Any]:
    return json.loads(get(server, f"/live?after={after}&pictures={pictures}")[2])


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_the_page_has_all_that_it_refers_to_and_asks_nobody_else(server: ViewServer) -> None:
    """A robot has no internet, and its pictures are nobody's business; what is missing shows only in a browser."""
    status, headers, page = get(server, "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Content-Security-Policy"].startswith("default-src 'self'; img-src data:;")
    referred = {f"/{name}" for name in re.findall(r'(?:src|href)="(?!data:)([^"]+)"', page)}
    assert referred == set(FILES) - {"/"}
    for path, name in FILES.items():
        assert get(server, path)[0] == 200
        assert "//" not in re.sub(r"^\s*//.*|; //.*", "", (PAGE / name).read_text(), flags=re.MULTILINE), name
    assert {path.name for path in PAGE.iterdir()} == set(FILES.values())


def test_a_picture_comes_once_and_the_next_one_at_once(server: ViewServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page asks in a loop: what it has must not come again, and what is new must not wait for the next second."""
    first = live(server)
    assert first == {"state": "live", "number": 1, "pictures": {"image": {"src": "one"}}}
    assert live(server, after=1) == {"state": "live", "number": 1, "pictures": {}}
    monkeypatch.setattr(view_server, "WAIT_S", 30.0)
    began = time.monotonic()
    threading.Timer(0.02, server.board.put_up, ({"state": "live"}, {"flow": {"src": "two"}})).start()
    assert live(server, after=1) == {"state": "live", "number": 2, "pictures": {"flow": {"src": "two"}}}
    assert time.monotonic() - began < 10.0
    assert live(server, after=99)["pictures"].keys() == {"image", "flow"}, "asked with the number of another process"


def test_a_slow_browser_leaves_pictures_out(server: ViewServer) -> None:
    """Nothing may queue up for it: it would show the past, and fill the memory."""
    for number in range(2, 50):
        server.board.put_up({}, {"image": {"src": str(number)}})
    assert live(server, after=1) == {"number": 49, "pictures": {"image": {"src": "49"}}}


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/nothing", 404, "nothing is at /nothing; the page is at /"),
        ("/../server.py", 404, "the page is at /"),
        ("/live", 400, "expected /live[?]after=NUMBER&pictures=flow,image or some"),
        ("/live?after=-1&pictures=image", 400, "expected"),
        ("/live?after=0&pictures=image,passwords", 400, "expected"),
    ],
)
def test_what_is_not_there_is_refused_in_words(server: ViewServer, path: str, status: int, words: str) -> None:
    """People type addresses, and nothing but the page may be read."""
    got, _, text = get(server, path)
    assert got == status and re.search(words, text)


def test_pages_of_others_cannot_look(server: ViewServer) -> None:
    """DNS rebinding: a name of theirs that leads to 127.0.0.1 makes their page one of the same origin."""
    assert get(server, "/live?pictures=image", Host="evil.example:8080")[0] == 403
    assert get(server, "/", Host="[")[0] == 403
    assert get(server, "/", Host="localhost:8080")[0] == get(server, "/", Host="[::1]:1")[0] == 200
    assert get(server, "/", "POST")[0] == 501
    assert is_local("127.0.0.1") and is_local("::1") and not is_local("0.0.0.0") and not is_local("robot")


def test_many_look_and_one_that_does_not_read_holds_up_nobody(server: ViewServer) -> None:
    """A stopped browser takes nothing out of its connection; those beside it must not notice."""
    server.board.put_up({}, {"image": {"src": "x" * 30_000_000}})
    with socket.create_connection(("127.0.0.1", server.server_port)) as stopped:
        stopped.sendall(b"GET /live?after=0&pictures=image HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: server.board.looked_at() == {"image"})
        server.board.put_up({}, {"image": {"src": "small"}})
        seen: list[dict[str, Any]] = []
        threads = [threading.Thread(target=lambda: seen.append(live(server))) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [one["pictures"]["image"]["src"] for one in seen] == ["small"] * 20


def test_a_browser_that_goes_leaves_nothing_behind(
    server: ViewServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither in the middle of an answer, nor silently, as a laptop that is closed: no thread, no line in the log."""
    monkeypatch.setattr(view_server._Handler, "timeout", 0.1)
    before = threading.active_count()
    server.board.put_up({}, {"image": {"src": "x" * 10_000_000}})
    connections = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(4)]
    for connection in connections[:2]:
        connection.sendall(b"GET /live?after=0&pictures=image HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.recv(10)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset
        connection.close()
    until(lambda: threading.active_count() == before)
    for connection in connections[2:]:
        assert connection.recv(10) == b""
        connection.close()
    assert capfd.readouterr() == ("", "")


def test_too_many_connections_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a thread; a program gone wild must not take the memory of the robot."""
    monkeypatch.setattr(view_server, "MAX_CONNECTIONS", 2)
    server = ViewServer(Board(), "127.0.0.1", 0, NAMES)
    server.start()
    open_ones = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(2)]

    def is_served() -> bool:
        try:
            return get(server, "/")[0] == 200
        except (http.client.RemoteDisconnected, ConnectionError):
            return False

    try:
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            get(server, "/")
        open_ones.pop().close()
        until(is_served)
    finally:
        for connection in open_ones:
            connection.close()
        server.close()


def test_a_place_where_it_cannot_listen_is_named_with_a_cure(server: ViewServer) -> None:
    """The first thing that goes wrong with a page: a second view."""
    taken = server.server_port
    with pytest.raises(OSError, match=rf"127\.0\.0\.1, port {taken}: it is in use.*port:={taken + 1}$"):
        ViewServer(Board(), "127.0.0.1", taken, NAMES)
    with pytest.raises(OSError, match=r"cannot listen on 203\.0\.113\.1, port 0: .*an address of this machine"):
        ViewServer(Board(), "203.0.113.1", 0, NAMES)


def test_the_end_waits_for_nobody_who_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C must not wait for a browser."""
    monkeypatch.setattr(view_server, "WAIT_S", 30.0)
    server = ViewServer(Board(), "127.0.0.1", 0, NAMES)
    server.start()

    def wait() -> None:
        with pytest.raises(http.client.RemoteDisconnected):
            live(server)

    waiting = threading.Thread(target=wait)
    waiting.start()
    until(lambda: server.board.looked_at() == {"image", "flow"})
    began = time.monotonic()
    server.close()
    assert time.monotonic() - began < 2.0
    server.board.put_up({}, {})
    waiting.join()


def test_a_look_ends_a_moment_after_the_last_question() -> None:
    """The flow node computes as long as somebody looks; and who comes later must not see what is long past."""
    now_s = 100.0
    board = Board(lambda: now_s)
    board.put_up({"state": "live"}, {"image": {"src": "one"}})
    assert board.looked_at() == set()
    board.look(0, ["image"], 0.0)
    now_s += LOOKING_S - 0.1
    board.look(0, ["flow"], 0.0)
    assert board.looked_at() == {"image", "flow"}
    now_s += 0.2
    assert board.looked_at() == {"flow"}
    board.clear()
    assert board.look(0, ["image"], 0.0) == {"number": 1, "pictures": {}}
