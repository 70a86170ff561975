"""What a rank proves itself with inside TLS, as text that travels in its start message.

Knows nothing of ssl or of how certificates are made (`mesh/security.py` does both)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Credentials:
    """The run's authority and one rank's certificate and key, all PEM; printing it shows nothing.

    The key is encrypted with `passphrase`, because ssl loads keys from files only: what must lie
    on a disk for a moment is useless to whoever reads it."""

    ca: str
    certificate: str
    key: str
    passphrase: str

    def __repr__(self) -> str:
        return "Credentials(...)"
