"""Conversations of the page that the server keeps for all devices: a file each, in one folder.

    GET     /v1/conversations        ids and versions
    GET     /v1/conversations/ID     one of them; ETag is its version
    PUT     /v1/conversations/ID     If-Match: the version that it replaces, else status 412
    DELETE  /v1/conversations/ID

A client that gets 412 reads the newer version, merges its own messages into it and tries again; the
server looks at none of them. Source: RFC 9110, 13.1, conditional requests.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import platformdirs
from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from smolrun.files import atomic_write, not_too_deep, read_bytes
from smolrun.serving.api_errors import ERRORS, ApiError, json_response
from smolrun.serving.protocol import ErrorAnswer

_ID = re.compile(r"[0-9a-f]{24}")  # as the page draws them; safe as a name on any file system
_MOST = 5000
_MOST_BYTES = 256 << 20  # of all together; one is a body of AccessPolicy at most
_FILE_BYTES = 16 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)
T = TypeVar("T")
IfMatch = Annotated[str | None, Header(description="The version that is replaced; 412 for others")]
IfNoneMatch = Annotated[str | None, Header(description="`*`: 412 where there is one")]


def history_folder() -> Path:
    """Where servers of this account keep conversations."""
    return platformdirs.user_data_path("smolrun") / "conversations"


class _Conversation(msgspec.Struct):
    """What is checked of a conversation; the rest is the page's own."""

    id: str
    title: str
    messages: list[dict[str, Any]]


class ConversationFiles:
    """The files of a folder, which only this account can read. Blocks; ApiError, OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, id: str) -> Path:
        return self._folder / f"{id}.json"

    def _stats(self) -> dict[str, os.stat_result]:
        try:
            with os.scandir(self._folder) as entries:
                return {
                    name: entry.stat(follow_symlinks=False)
                    for entry in entries
                    if entry.name.endswith(".json") and _ID.fullmatch(name := entry.name[:-5])
                }
        except FileNotFoundError:
            return {}

    def listed(self) -> list[dict[str, str]]:
        """The id and the version of each."""
        return [{"id": id, "version": _version(stat)} for id, stat in sorted(self._stats().items())]

    def read(self, id: str) -> tuple[bytes, str]:
        """The JSON and its version."""
        path = self._path(id)
        version = _version(path.stat())  # before its bytes: a newer one is read again, not missed
        return read_bytes(path, _FILE_BYTES), version

    def write(self, id: str, data: bytes, replaces: str | None, is_new: bool) -> str:
        """The new version. 412 where another one than `replaces` is there, or any and it `is_new`;
        507 where there is no room."""
        stats = self._stats()
        old = stats.pop(id, None)
        if (is_new and old) or (replaces and (old is None or _version(old) != replaces)):
            raise ApiError(412, "there is another version of it", code="version_conflict")
        size = len(data) + sum(stat.st_size for stat in stats.values())
        if len(stats) >= _MOST or size > _MOST_BYTES:
            message = f"{len(stats)} conversations are kept, which is all that fit; delete some"
            raise ApiError(507, message, code="storage_full")
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(id)
        atomic_write(path, data, mode=0o600)
        return _version(path.stat())

    def delete(self, id: str) -> None:
        """Forget it."""
        self._path(id).unlink()


def _version(stat: os.stat_result) -> str:
    # Each is a new file beside the one that it replaces, so two in a row differ in their inode.
    return f"{stat.st_mtime_ns:x}-{stat.st_size:x}-{stat.st_ino:x}"


class _Guarded:
    """One operation at a time, on a thread; its errors as answers."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def __call__(self, operation: Callable[[], T]) -> T:
        try:
            async with self._lock:
                return await asyncio.to_thread(operation)
        except FileNotFoundError:
            message = "no conversation is kept under this id"
            raise ApiError(404, message, code="conversation_not_found") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            message = f"the server cannot keep or read conversations: {reason}"
            if getattr(error, "errno", None) in _FULL:
                raise ApiError(507, message, code="storage_full") from error
            raise ApiError(503, message, code="storage_failed") from error


_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: ERRORS[status] for status in (400, 401, 403, 404, 503)
}
_PUT_RESPONSES: dict[int | str, dict[str, Any]] = {
    412: {"model": ErrorAnswer, "description": "There is another version"},
    413: ERRORS[413],
    507: {"model": ErrorAnswer, "description": "There is no room to keep it"},
}


def conversation_routes(folder: Path) -> APIRouter:
    """The routes of the conversations in `folder`."""
    routes = APIRouter(prefix="/v1/conversations", tags=["conversations"], responses=_RESPONSES)
    files, guarded = ConversationFiles(folder), _Guarded()

    @routes.get("", response_class=Response)
    async def listed(if_none_match: Annotated[str | None, Header()] = None) -> Response:
        """The ids and versions of all; 304 where the list is the one with this ETag."""
        found = json_response({"object": "list", "data": await guarded(files.listed)})
        tag = hashlib.sha256(found.body).hexdigest()[:32]
        if _unquoted(if_none_match) == tag:
            return Response(status_code=304)
        found.headers["etag"] = f'"{tag}"'
        return found

    @routes.get("/{id}", response_class=Response)
    async def read(id: str) -> Response:
        """A conversation as it was put; its version is the ETag."""
        data, version = await guarded(lambda: files.read(_checked(id)))
        return Response(data, headers={"etag": f'"{version}"'}, media_type="application/json")

    @routes.put("/{id}", response_class=Response, responses=_PUT_RESPONSES)
    async def put(
        id: str, request: Request, if_match: IfMatch = None, if_none_match: IfNoneMatch = None
    ) -> Response:
        """Keep a conversation: JSON with its `id`, a `title` and a list of `messages`. Without
        If-Match and If-None-Match it replaces any version."""
        data = await request.body()
        _check_content(_checked(id), data)
        replaces, is_new = _unquoted(if_match), if_none_match == "*"
        version = await guarded(lambda: files.write(id, data, replaces, is_new))
        return json_response({"id": id, "version": version}, headers={"etag": f'"{version}"'})

    @routes.delete("/{id}", status_code=204, response_class=Response)
    async def delete(id: str) -> Response:
        """Forget a conversation, on all devices."""
        await guarded(lambda: files.delete(_checked(id)))
        return Response(status_code=204)

    return routes


def _unquoted(tag: str | None) -> str | None:
    return tag.strip().removeprefix("W/").strip('"') if tag else None


def _checked(id: str) -> str:
    if not _ID.fullmatch(id):
        message = "the id of a conversation is 24 digits and letters from a to f"
        raise ApiError(400, message, param="id", code="invalid_value")
    return id


def _check_content(id: str, data: bytes) -> None:
    try:
        found = msgspec.json.decode(data, type=_Conversation)
        not_too_deep(found.messages)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        message = f"the conversation cannot be read: {error}"
        raise ApiError(400, message, code="invalid_value") from None
    if found.id != id:
        message = "the conversation has another id than the path"
        raise ApiError(400, message, param="id", code="invalid_value")
