"""Loki's push API, as strict as a server that accepts nothing unusual.

It answers 400 to labels that Loki does not allow, to times that are no nanoseconds as text, and to
a line older than the last one of its stream; `faults` are the answers to the next requests: a
status, `slow` or `cut`. Source: Loki's HTTP API, and its validation of streams.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_MOST_BYTES = 4 << 20
_MOST_LINE_BYTES = 256 << 10
_MOST_LABELS = 15


class Refused(ValueError):
    """What it answers by 400."""


class FakeLoki:
    """`lines` are those it accepted, with their labels and nanoseconds, in the order of arrival."""

    def __init__(self, path: str = "/loki/api/v1/push") -> None:
        self.path = path
        self.lines: list[tuple[dict[str, str], int, str]] = []
        self.requests: list[tuple[str, dict[str, str]]] = []  # path and headers
        self.faults: list[int | str] = []
        self.headers: dict[str, str] = {}  # of every answer
        self.refused: list[str] = []
        self.going_on = threading.Event()  # what is slow waits for it
        self._latest: dict[str, int] = {}
        self._lock = threading.Lock()

    def accept(self, body: bytes) -> None:
        """Keep the lines of a push, or refuse all of it."""
        if len(body) > _MOST_BYTES:
            raise Refused("too large")
        found = []
        latest = dict(self._latest)
        for stream in _only(json.loads(body), "streams"):
            if set(stream) != {"stream", "values"} or not stream["values"]:
                raise Refused("a stream has labels and values")
            key = json.dumps(_checked(stream["stream"]), sort_keys=True)
            for value in stream["values"]:
                ns, line = _checked_value(value)
                if ns < latest.get(key, 0):
                    raise Refused(f"entry out of order for stream {key}")
                latest[key] = ns
                found.append((stream["stream"], ns, line))
        self._latest = latest
        self.lines += found

    def answer(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, str]:
        """Status and text."""
        with self._lock:
            self.requests.append((path, headers))
            fault = self.faults.pop(0) if self.faults else None
        if fault == "slow":
            self.going_on.wait(60)
        if isinstance(fault, int):
            return fault, f"answers {fault}\nwith a second line"
        with self._lock:
            try:
                if path != self.path:
                    return 404, "404 page not found"
                if headers.get("content-type") != "application/json":
                    raise Refused("content-type")
                plain = gzip.decompress(body) if headers.get("content-encoding") == "gzip" else body
                self.accept(plain)
            except ValueError as error:
                self.refused.append(str(error))
                return 400, str(error)
        return 204, ""


def _only(found: Any, key: str) -> Any:
    if not isinstance(found, dict) or set(found) != {key} or not isinstance(found[key], list):
        raise Refused(f"not an object with {key}")
    return found[key]


def _checked(labels: Any) -> dict[str, str]:
    if not isinstance(labels, dict) or not 0 < len(labels) <= _MOST_LABELS:
        raise Refused("error at least one label pair is required per stream")
    for name, value in labels.items():
        if not _LABEL.fullmatch(name) or not isinstance(value, str) or not 0 < len(value) <= 2048:
            raise Refused(f"label {name}={value}")
    return labels


def _checked_value(value: Any) -> tuple[int, str]:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(v, str) for v in value):
        raise Refused(f"Value is string, but can't find closing: {value}")
    ns, line = value
    if not re.fullmatch(r"[0-9]{19}", ns):
        raise Refused(f"timestamp {ns}")
    if len(line.encode()) > _MOST_LINE_BYTES:
        raise Refused("max entry size exceeded")
    return int(ns), line


@contextmanager
def serving(loki: FakeLoki, port: int = 0) -> Iterator[str]:
    """Its URL, while it listens on a port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, text = loki.answer(self.path, headers, body)
            self.send_response(status)
            for name, value in loki.headers.items():
                self.send_header(name, value)
            if status != 204:
                self.send_header("content-length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        loki.going_on.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
