"""Conversations that the server keeps: versions, what is refused, and who can read the files."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from smolrun.serving import conversations
from smolrun.serving.access import AccessPolicy
from tests.serving.fake_engine import FakeEngine
from tests.serving.server import Served, says, served

ID = "0123456789abcdef01234567"
OTHER = "f" * 24


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    history = folder / "data" / "conversations"
    with served(FakeEngine(says("Hello")), folder, history=history) as one:
        yield one


@pytest.fixture
def folder(running: Served) -> Path:
    """Where it keeps them; not there yet."""
    path = running.service.history
    assert path is not None
    shutil.rmtree(path.parent, ignore_errors=True)
    return path


@pytest.fixture
def server(running: Served, folder: Path) -> Served:
    return running


def conversation(id: str = ID, **fields: object) -> dict[str, Any]:
    return {"id": id, "title": "Grüße", "messages": [{"id": "a", "text": "Hi"}], **fields}


def put(server: Served, body: object, id: str = ID, **headers: str) -> httpx.Response:
    return server.client.put(f"/v1/conversations/{id}", json=body, headers=headers)


def refused(answer: httpx.Response, status: int, code: str) -> str:
    (error,) = answer.json().values()
    assert answer.status_code == status and error["code"] == code, answer.text
    return str(error["message"])


def test_a_conversation_is_kept_listed_replaced_and_forgotten(server: Served, folder: Path):
    assert server.client.get("/v1/conversations").json() == {"object": "list", "data": []}
    first = put(server, conversation()).json()
    assert server.client.get("/v1/conversations").json()["data"] == [first]
    found = server.client.get(f"/v1/conversations/{ID}")
    assert found.json() == conversation() and found.headers["etag"] == f'"{first["version"]}"'
    second = put(server, conversation(title="Other"), **{"if-match": found.headers["etag"]})
    assert second.json()["version"] != first["version"]
    assert server.client.get(f"/v1/conversations/{ID}").json()["title"] == "Other"
    assert server.client.delete(f"/v1/conversations/{ID}").status_code == 204
    assert list(folder.iterdir()) == []
    for method in ("GET", "DELETE"):
        answer = server.client.request(method, f"/v1/conversations/{ID}")
        refused(answer, 404, "conversation_not_found")


def test_an_older_version_replaces_nothing(server: Served):
    old = put(server, conversation()).headers["etag"]
    put(server, conversation(title="Newer"), **{"if-match": old})
    refused(put(server, conversation(), **{"if-match": old}), 412, "version_conflict")
    refused(put(server, conversation(), **{"if-none-match": "*"}), 412, "version_conflict")
    gone = put(server, conversation(OTHER), OTHER, **{"if-match": old})
    refused(gone, 412, "version_conflict")
    assert server.client.get(f"/v1/conversations/{ID}").json()["title"] == "Newer"


def test_of_many_that_replace_the_same_version_one_wins(server: Served):
    old = put(server, conversation()).headers["etag"]
    # Alike in size and time, which versions must not depend on alone.
    bodies = [conversation(title=f"{number:05}") for number in range(12)]
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(
            target=lambda body=body: answers.append(put(server, body, **{"if-match": old}))
        )
        for body in bodies
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200, *[412] * 11]


def test_a_list_that_has_not_changed_is_not_sent_again(server: Served):
    put(server, conversation())
    tag = {"if-none-match": server.client.get("/v1/conversations").headers["etag"]}
    assert server.client.get("/v1/conversations", headers=tag).status_code == 304
    put(server, conversation(title="Other"))
    assert server.client.get("/v1/conversations", headers=tag).status_code == 200


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_files_are_readable_by_this_account_alone(server: Served, folder: Path):
    put(server, conversation())
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [one.stat().st_mode & 0o777 for one in folder.iterdir()] == [0o600]


@pytest.mark.parametrize(
    "id",
    ["x", "..", "%2e%2e%2fserving.key", ID[:-1], ID + "0", ID.upper(), "con" + ID[3:], "%00" * 24],
)
def test_an_id_is_never_a_path(server: Served, folder: Path, id: str):
    for method in ("GET", "PUT", "DELETE"):
        body = json.dumps(conversation()).encode() if method == "PUT" else None
        answer = server.client.request(method, f"/v1/conversations/{id}", content=body)
        assert answer.status_code in (400, 404, 405), (method, answer.text)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert not folder.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{" * 200_000,
        b"[" * 200_000,
        json.dumps(conversation(OTHER)).encode(),
        json.dumps(conversation(title=5)).encode(),
        json.dumps(conversation(messages="Hi")).encode(),
        json.dumps(conversation(messages=[5])).encode(),
        json.dumps(conversation(title=float("nan"))).encode(),
        json.dumps(conversation())[:-1].encode() + b', "more": NaN}',
        json.dumps(conversation())[:-1].encode() + b', "more": "\\ud800"}',
        json.dumps(conversation(messages=[{"text": "\ud800"}])).encode(),
        json.dumps(conversation(messages=[json.loads('{"a":' * 90 + "1" + "}" * 90)])).encode(),
        json.dumps(conversation())[:-1].encode()
        + b', "more": '
        + b"[" * 90_000
        + b"]" * 90_000
        + b"}",
    ],
)
def test_what_is_no_conversation_is_refused(server: Served, folder: Path, content: bytes):
    answer = server.client.put(f"/v1/conversations/{ID}", content=content)
    refused(answer, 400, "invalid_value")
    assert not folder.exists()


def test_too_large_and_too_many_are_refused(server: Served, monkeypatch: pytest.MonkeyPatch):
    refused(put(server, conversation(title="x" * (5 << 20))), 413, "request_too_large")
    monkeypatch.setattr(conversations, "_MOST", 1)
    tag = put(server, conversation()).headers["etag"]
    assert "delete some" in refused(put(server, conversation(OTHER), OTHER), 507, "storage_full")
    assert put(server, conversation(), **{"if-match": tag}).status_code == 200
    monkeypatch.setattr(conversations, "_MOST_BYTES", 100)
    refused(put(server, conversation(title="x" * 100)), 507, "storage_full")


def test_a_folder_that_cannot_be_written_is_reported(server: Served, folder: Path):
    folder.parent.mkdir()
    folder.write_text("a file is in its place")
    for answer in (put(server, conversation()), server.client.get("/v1/conversations")):
        assert "cannot keep or read" in refused(answer, 503, "storage_failed")
    assert server.chat().status_code == 200


def test_files_of_others_in_the_folder_are_left_alone(server: Served, folder: Path):
    put(server, conversation())
    (folder / "notes.txt").write_text("mine")
    (folder / f".{OTHER}.json.0a1b2c3d.part").write_text("half")
    assert [one["id"] for one in server.client.get("/v1/conversations").json()["data"]] == [ID]


def test_a_key_is_needed_and_the_page_is_told(tmp_path: Path, folder: Path):
    policy = AccessPolicy(api_key="secret")
    with served(FakeEngine(says("Hi")), tmp_path, policy, history=folder) as server:
        assert put(server, conversation()).status_code == 401
        assert server.client.get("/v1/conversations").status_code == 401
        server.client.headers["authorization"] = "Bearer secret"
        assert server.client.get("/config").json()["history"] == "server"
        assert put(server, conversation()).status_code == 200


def test_without_it_the_server_keeps_nothing(tmp_path: Path):
    with served(FakeEngine(says("Hi")), tmp_path) as server:
        assert server.client.get("/config").json()["history"] == "browser"
        assert put(server, conversation()).status_code == 404
