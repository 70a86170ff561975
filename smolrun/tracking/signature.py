"""Signs files of a run folder, so that a folder from somewhere else is told from one of our own.

An HMAC-SHA256 with a key of this account on this machine, which lies outside `outputs/`: a run
folder can be copied, unpacked from an archive, or written by others; the key stays here.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path

import platformdirs

from smolrun.errors import SmolrunError

_KEY_BYTES = 32
_WRITTEN_WITHIN_S = 2.0  # by another process, which has just created the file


def sign(data: bytes) -> str:
    """The signature of `data` as hex digits; SmolrunError if there can be no key."""
    return hmac.new(_key(), data, hashlib.sha256).hexdigest()


def is_signed(data: bytes, signature: str) -> bool:
    """Whether `sign` of this account on this machine returned `signature` for `data`."""
    return hmac.compare_digest(sign(data).encode(), signature.encode())


def _key() -> bytes:
    path = platformdirs.user_config_path("smolrun") / "run_folders.key"
    try:
        _create(path)
        deadline = time.monotonic() + _WRITTEN_WITHIN_S
        while len(key := path.read_bytes()) != _KEY_BYTES:
            if time.monotonic() > deadline:
                raise SmolrunError(f"{path} does not hold {_KEY_BYTES} bytes: delete it")
            time.sleep(0.01)
        return key
    except OSError as error:
        what = f"{path}, the key that signs run folders, cannot be read or made: {error.strerror}"
        raise SmolrunError(what) from None


def _create(path: Path) -> None:
    """A new key, readable by this account only, unless there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(handle, "wb") as file:
        file.write(secrets.token_bytes(_KEY_BYTES))
