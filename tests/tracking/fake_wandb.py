"""A W&B server small enough to read: the GraphQL questions of runs and of reports, and the file
stream, over real HTTP on 127.0.0.1, with faults to choose from.

It remembers runs as the real one does: a run that is opened again gets its last history line back,
so that a client can go on from there.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

KEY = "0123456789abcdef0123456789abcdef01234567"
Fault = Literal["", "slow", "500", "garbage", "denied", "upload_500", "upload_slow"]


@dataclass
class Run:
    """What the server knows of one run."""

    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)  # by line number
    asked: dict[str, Any] = field(default_factory=dict)  # the variables it was opened with
    opened: int = 0
    exit_codes: list[int] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        """The step of every history line."""
        return [self.history[line]["_step"] for line in sorted(self.history)]


class FakeWandb:
    """The server's memory. `fault` may be changed while it runs."""

    def __init__(self, port: int, fault: Fault) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.fault: Fault = fault
        self.delay_s = 10.0
        self.runs: dict[str, Run] = {}
        self.reports: list[dict[str, Any]] = []  # the variables that each was saved with
        self.keys: set[str] = set()
        self.over = threading.Event()  # ends a slow answer when the test is over

    def environment(self) -> dict[str, str]:
        """What a client needs to find it, and to be let in."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def graphql(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The answer to one question."""
        query, given = asked["query"], asked.get("variables") or {}
        if "upsertBucket" in query:
            return {"upsertBucket": {"bucket": self._open(given), "inserted": True}}
        if "viewer" in query:
            viewer = {
                "id": "u",
                "entity": "me",
                "username": "me",
                "flags": "{}",
                "teams": {"edges": []},
            }
            return {"viewer": viewer, "serverInfo": _SERVER}
        if "RunResumeStatus" in query:
            return {"model": {"name": "p", "entity": {"name": "me"}, "bucket": self._found(given)}}
        if "createRunFiles" in query:
            files = [{"name": n, "uploadUrl": f"{self.url}/up/{n}"} for n in given.get("files", [])]
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}
        if "upsertView" in query:
            return {"upsertView": {"view": self._report(given), "inserted": True}}
        if "ProjectInternalId" in query:
            known = given["projectName"] in self._projects()
            return {"project": {"id": "p", "internalId": "1"} if known else None}
        if "GetProjects" in query:
            page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
            edges = [{"node": _project(name)} for name in self._projects()]
            return {"models": {"pageInfo": page, "edges": edges}}
        return {"serverInfo": _SERVER} if "serverInfo" in query else {}

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        """Takes lines of a run's files."""
        run = self.runs[name]
        for file, part in (sent.get("files") or {}).items():
            if file == "wandb-history.jsonl":
                for number, line in enumerate(part["content"], start=part["offset"]):
                    run.history[number] = json.loads(line)
            elif file == "wandb-summary.json":
                run.summary.update(json.loads(part["content"][-1]))
        if sent.get("complete"):
            run.exit_codes.append(sent.get("exitcode", -1))

    def _projects(self) -> list[str]:
        """Those that have runs."""
        return list({run.asked.get("project") or "p": None for run in self.runs.values()})

    def _report(self, given: dict[str, Any]) -> dict[str, Any]:
        self.reports.append(given)
        named = {key: given[key] for key in ("type", "name", "displayName", "description", "spec")}
        place = {"id": "p", "name": given["projectName"], "entityName": given["entityName"]}
        return {"id": f"Vmlldzo{len(self.reports)}", "project": place, "updatedAt": None, **named}

    def _open(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given.get("name") or given.get("id")
        run = self.runs.setdefault(name, Run())
        if given.get("config"):
            run.config.update(json.loads(given["config"]))
        run.asked = {**run.asked, **{k: v for k, v in given.items() if v is not None}}
        run.opened += 1
        return _bucket(name, run, given.get("project") or "p")

    def _found(self, given: dict[str, Any]) -> dict[str, Any] | None:
        run = self.runs.get(given["name"])
        return None if run is None else _bucket(given["name"], run, "p")


_SERVER = {
    "cliVersionInfo": {"max_cli_version": "0.99.0"},
    "latestLocalVersionInfo": None,
    "features": [],
}


def _project(name: str) -> dict[str, Any]:
    return {
        "__typename": "Project",
        "id": "p",
        "name": name,
        "entityName": "me",
        "createdAt": "2026-01-31T14:25:01",
        "isBenchmark": False,
        "user": None,
    }


def _bucket(name: str, run: Run, project: str) -> dict[str, Any]:
    last = run.history[max(run.history)] if run.history else None
    return {
        "id": name,
        "name": name,
        "displayName": name,
        "description": "",
        "config": json.dumps(run.config),
        "summaryMetrics": json.dumps(run.summary),
        "sweepName": None,
        "historyLineCount": len(run.history),
        "eventsLineCount": 0,
        "logLineCount": 0,
        "historyTail": json.dumps([json.dumps(last)] if last else []),
        "eventsTail": "[]",
        "tags": [],
        "notes": "",
        "wandbConfig": json.dumps({"t": 1}),
        "project": {"id": "p", "name": project, "entity": {"id": "e", "name": "me"}},
    }


def _fault_at(fault: str, path: str) -> str:
    """What goes wrong at this address: some faults hit uploads only."""
    if not fault.startswith("upload_"):
        return fault
    return fault.removeprefix("upload_") if path != "/graphql" else ""


def _make_answers(server: FakeWandb) -> type[BaseHTTPRequestHandler]:
    class Answers(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self._answer({})

        def do_PUT(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(None)

        def _answer(self, reply: dict[str, Any] | None) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            fault = _fault_at(server.fault, self.path)
            if fault == "slow":
                server.over.wait(server.delay_s)
            elif fault == "500":
                return self._send(500, b'{"error": "it hurts"}')
            elif fault == "garbage":
                return self._send(200, b"\x00\xff<html>not for you" * 50)
            elif fault == "denied":
                return self._send(401, b'{"errors": [{"message": "invalid api key"}]}')
            server.keys.add(self.headers.get("authorization", ""))
            return self._send(
                200, json.dumps(self._reply(body) if reply is None else reply).encode()
            )

        def _reply(self, body: bytes) -> dict[str, Any]:
            if self.path == "/graphql":
                return {"data": server.graphql(json.loads(body))}
            if self.path.endswith("file_stream"):
                server.stream(self.path.split("/")[-2], json.loads(body))
                return {"exitcode": None, "limits": {}}
            return {}  # what it tells of itself, in forms of its own

        def _send(self, code: int, body: bytes) -> None:
            with contextlib.suppress(OSError):
                self.send_response(code)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

    return Answers


@contextlib.contextmanager
def fake_wandb(fault: Fault = "") -> Iterator[FakeWandb]:
    """A server that runs until the end of the block."""
    listener = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    listener.daemon_threads = True
    server = FakeWandb(listener.server_address[1], fault)
    listener.RequestHandlerClass = _make_answers(server)
    thread = threading.Thread(target=listener.serve_forever, name="fake-wandb", daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        listener.shutdown()
        listener.server_close()
        thread.join()
