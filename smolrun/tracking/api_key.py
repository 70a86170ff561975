"""The API key of this account's servers, and the link by which a browser gets it.

One file for each account on a machine, which only that account can read: a server that is started
again has the same key, and who looks at a run of this account may show it.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from urllib.parse import quote

import platformdirs

from smolrun.errors import SmolrunError

LAN = "lan"  # the serving.bind whose page people open from other devices
_OF_OTHERS = 0o077


def api_key_file() -> Path:
    """Where the key is kept."""
    return platformdirs.user_config_path("smolrun") / "serving.key"


def api_key() -> tuple[str, bool]:
    """The key, and whether it was just made. SmolrunError if there can be none."""
    path = api_key_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(key := secrets.token_urlsafe(32))
        except FileExistsError:
            return read_key(path), False
    except (OSError, ValueError) as error:
        raise SmolrunError(f"the API key {path} cannot be read or made: {error}") from error
    return key, True


def read_key(path: Path) -> str:
    """The key in a file, which from then on only this account can read. SmolrunError for none,
    OSError and ValueError for a file that cannot be read."""
    key = path.read_text(encoding="ascii").strip()
    if not key:
        raise SmolrunError(f"the API key {path} is empty; delete it")
    if os.name == "posix" and path.stat().st_mode & _OF_OTHERS:  # copied here, or written by hand
        path.chmod(0o600)
    return key


def link(url: str) -> str:
    """The address of the page at `url` with the key in its fragment, which no browser sends: the
    page takes it from there. SmolrunError as `api_key`."""
    return f"{url}/#key={quote(api_key()[0], safe='')}"
