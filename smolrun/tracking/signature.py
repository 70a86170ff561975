"""Signs files of a run folder, so that a folder from elsewhere is distinguished from our own.

An HMAC-SHA256 with a key of this account on this machine, which lies outside `outputs/`: a run
folder can be copied, unpacked from an archive, or written by others; the key stays here.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

import platformdirs

from smolrun.errors import SmolrunError

_KEY_BYTES = 32


def sign(data: bytes) -> str:
    """The signature of `data` as hex digits; SmolrunError if there can be no key."""
    return hmac.new(_key(), data, hashlib.sha256).hexdigest()


def is_signed(data: bytes, signature: str) -> bool:
    """Whether `sign` of this account on this machine returned `signature` for `data`."""
    return hmac.compare_digest(sign(data).encode(), signature.encode())


def _key() -> bytes:
    path = platformdirs.user_config_path("smolrun") / "run_folders.key"
    try:
        if not path.exists():
            _create(path)
        key = path.read_bytes()
    except OSError as error:
        what = f"{path}, the key that signs run folders, cannot be read or made: {error.strerror}"
        raise SmolrunError(what) from None
    if len(key) != _KEY_BYTES:
        what = f"{path}, the key that signs run folders, does not have {_KEY_BYTES} bytes"
        raise SmolrunError(f"{what}: delete it")
    return key


def _create(path: Path) -> None:
    """A new key, readable by this account only, complete or absent. One that another process
    created meanwhile stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(fresh, path)  # unlike a rename it never replaces a file
        except FileExistsError:
            pass
        except (OSError, NotImplementedError):  # a file system without hard links
            os.rename(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
