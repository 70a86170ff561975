"""What a server of this machine says of its load: its /cluster, asked over HTTP.

Only for a run whose driver is a living process of this machine, as the API key goes along.
"""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from smolrun.tracking.api_key import LAN, api_key_file

_TIMEOUT_S = 2.0
_MOST_BYTES = 1 << 20
_ANY = ("0.0.0.0", "::", LAN)  # noqa: S104  (compared, not bound)
_LOOPBACK = ("127.0.0.1", "localhost", "::1", None)
_Whole = Annotated[int, Meta(ge=0, le=1 << 60)]
_Amount = Annotated[float, Meta(ge=0, le=1e18)]


class StageLoad(msgspec.Struct, frozen=True):
    """A stage and its sums since the server began, as `serving.messages.StageStats`."""

    rank: Annotated[int, Meta(ge=0, lt=1 << 16)]
    host: str = ""
    first_layer: _Whole = 0
    last_layer: _Whole = 0
    memory_bytes: _Whole = 0
    compute_s: _Amount = 0.0
    wait_s: _Amount = 0.0
    network_s: _Amount = 0.0
    tokens: _Whole = 0
    sent_bytes: _Whole = 0


class ServerLoad(msgspec.Struct, frozen=True):
    """The load of a server now, in choices (a request may ask for several), and its sums. `reason`:
    why it does not answer, or cannot be asked."""

    status: str = ""
    reason: str | None = None
    running: _Whole = 0
    waiting: _Whole = 0
    cache_usage: _Amount = 0.0
    generated_tokens: _Whole = 0
    stages: list[StageLoad] = []


def server_load(summary: Mapping[str, Any]) -> ServerLoad:
    """The load of the server whose summary.json this is."""
    url = summary.get("url")
    try:
        place = urlsplit(str(url))
        # All addresses, this one too: the name in the URL may lead elsewhere.
        host = "127.0.0.1" if summary.get("bind") in _ANY else place.hostname
        connection = http.client.HTTPConnection(host or "", place.port, timeout=_TIMEOUT_S)
        try:
            is_open = summary.get("bind") not in _LOOPBACK  # then it wants the key
            connection.request("GET", "/cluster", headers=_key() if is_open else {})
            answer = connection.getresponse()
            data = answer.read(_MOST_BYTES)
        finally:
            connection.close()
        if answer.status != http.client.OK:
            return ServerLoad(reason=f"{url} answered {answer.status}")
        return msgspec.json.decode(data, type=ServerLoad)
    except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
        return ServerLoad(reason=f"{url} does not answer: {error}")


def _key() -> dict[str, str]:
    try:
        key = api_key_file().read_text("ascii").strip()
    except (OSError, ValueError):
        return {}
    return {"authorization": f"Bearer {key}"}
