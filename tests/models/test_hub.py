"""Fetching from a hub: a small one on this machine, whole files, its refusals in words."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.models.model_folders import save_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# In a process of its own: the hub's client reads its settings when it is imported.
FETCH = """
import json, sys
from pathlib import Path
from smolrun.errors import ConfigError
from smolrun.models import huggingface
told = []
keys = {"pretrained": True, "revision": None, "attention": "auto", "dropout": 0.0}
try:
    found = huggingface.prepare(Path(), lambda *a: told.append(a), sys.argv[1], **keys)
    commit = huggingface.pinned_revision(sys.argv[1], None)
    print(json.dumps({"folder": found.folder, "told": told[-1:], "commit": commit}))
except ConfigError as error:
    print(json.dumps({"error": str(error)}))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for; serves the folder `files`."""

    files: Path
    tokens: list[str | None]

    def log_message(self, *_: object) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.tokens.append(self.headers.get("Authorization"))
        path = self.path.partition("?")[0]
        names = sorted(file.name for file in self.files.iterdir())
        if path.startswith("/api/models/me/gated"):
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if path.startswith("/api/models/me/small/tree"):
            entries = [self._entry(name) for name in names]
            return self._send(200, json.dumps(entries).encode())
        if path.startswith("/api/models/me/small"):
            listed = [{"rfilename": name} for name in names]
            body = {"id": "me/small", "sha": COMMIT, "siblings": listed}
            return self._send(200, json.dumps(body).encode())
        name = path.rpartition("/")[2]
        if path.startswith("/me/small/resolve/") and name in names:
            content = (self.files / name).read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self._send(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _entry(self, name: str) -> dict[str, Any]:
        size = (self.files / name).stat().st_size
        return {"type": "file", "path": name, "size": size, "oid": "0" * 40}

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    folder = save_model(tmp_path / "served")
    (folder / "code.py").write_text("raise SystemExit('never run')")
    handler = type("Served", (Hub,), {"files": folder, "tokens": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(tmp_path: Path, port: int, name: str) -> dict[str, Any]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", FETCH, name],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_a_model_is_fetched_once_and_stays_without_the_hub(
    tmp_path: Path, hub: ThreadingHTTPServer
) -> None:
    port = hub.server_address[1]
    told = fetch(tmp_path, port, "me/small")
    folder = Path(told["folder"])
    served = tmp_path / "served"
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in served.iterdir()} - {"code.py"}
    assert (folder / "model.safetensors").read_bytes() == (
        served / "model.safetensors"
    ).read_bytes()
    assert told["told"][0][0] == "fetching me/small"
    hub.shutdown()
    hub.server_close()
    again = fetch(tmp_path, port, "me/small")
    assert again["folder"] == str(folder)
    assert told["commit"] == again["commit"] == COMMIT, "known without the hub too"
    assert "the hub cannot be reached" in fetch(tmp_path, port, "me/other")["error"]


def test_refusals_of_the_hub_are_sentences(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    port = hub.server_address[1]
    assert "`hf auth login`" in fetch(tmp_path, port, "me/gated")["error"]
    assert "the hub has no such model" in fetch(tmp_path, port, "me/none")["error"]
    assert "neither a folder nor a name" in fetch(tmp_path, port, "not a name")["error"]
    weights = tmp_path / "served" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    assert "in pytorch_model.bin only" in fetch(tmp_path, port, "me/small")["error"]
