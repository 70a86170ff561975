"""The chat page: built files of the package, whose source is ui/web.

They are read once, and nothing else of the disk can be asked for.
"""

from __future__ import annotations

import gzip
import hashlib
import mimetypes
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import FastAPI, Request
from starlette.responses import Response

# It needs its own script, style and pictures, and nothing of any other server.
_HEADERS = {
    "cache-control": "no-cache",  # asked for again each time, and answered by 304
    "referrer-policy": "no-referrer",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "connect-src 'self'"
)
_TYPES = {".webmanifest": "application/manifest+json", ".js": "text/javascript"}
_LEAST_ZIPPED_BYTES = 1000


class PageFile:
    """One file of the page, as it is sent. It may ask the servers `others` beside its own."""

    def __init__(self, name: str, data: bytes, others: Sequence[str] = ()) -> None:
        guessed = mimetypes.guess_type(name)[0] or "application/octet-stream"
        ending = name[name.rfind(".") :]
        # Not the system's table alone: on Windows a registry entry may call .js text/plain.
        self.media_type = _TYPES.get(ending, guessed)
        self.data = data
        is_picture = self.media_type == "image/png"
        is_zipped = len(data) >= _LEAST_ZIPPED_BYTES and not is_picture
        self.zipped = gzip.compress(data, mtime=0) if is_zipped else None
        self._headers = {**_HEADERS, "content-security-policy": " ".join((_POLICY, *others))}
        # Browsers keep the policy that they have with a 304, so another one is another file.
        tagged = data + self._headers["content-security-policy"].encode()
        self.tag = f'"{hashlib.sha256(tagged).hexdigest()[:32]}"'

    async def response(self, request: Request) -> Response:
        """200 with the file, or 304 where the browser has it."""
        headers = {**self._headers, "etag": self.tag, "vary": "accept-encoding"}
        if request.headers.get("if-none-match") == self.tag:
            return Response(status_code=304, headers=headers)
        if self.zipped and "gzip" in request.headers.get("accept-encoding", ""):
            headers["content-encoding"] = "gzip"
            return Response(self.zipped, media_type=self.media_type, headers=headers)
        return Response(self.data, media_type=self.media_type, headers=headers)


def add_page(app: FastAPI, others: Sequence[str] = ()) -> None:
    """The routes of the page: / and its files; it may ask the servers `others` too."""
    for path, file in page_files(tuple(others)).items():
        app.add_api_route(path, file.response, methods=["GET"], include_in_schema=False)


@cache
def page_files(others: tuple[str, ...] = ()) -> dict[str, PageFile]:
    """By path. They need no API key: the page asks a person for it."""
    found = dict(_below(files("smolrun.serving").joinpath("page"), "", others))
    return {"/" if path == "/index.html" else path: file for path, file in found.items()}


def _below(
    folder: Traversable, above: str, others: tuple[str, ...]
) -> Iterator[tuple[str, PageFile]]:
    for one in folder.iterdir():
        path = f"{above}/{one.name}"
        if one.is_dir():
            yield from _below(one, path, others)
        elif not one.name.endswith(".sha256"):
            yield path, PageFile(one.name, one.read_bytes(), others)
