"""OpenSSH's known_hosts files: the keys of known hosts, and adding or removing entries.

Reads what OpenSSH reads (hashed names, patterns, [host]:port, @revoked) and writes plain lines.
No connections here: connect.py compares a server's key with these entries.
Source: sshd(8), SSH_KNOWN_HOSTS FILE FORMAT.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from smolrun.files import atomic_write

DEFAULT_PORT = 22


@dataclass(frozen=True)
class HostKey:
    """The public key of a machine: its type, such as ssh-ed25519, and its bytes."""

    kind: str
    data: bytes

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` shows it: SHA256:..."""
        digest = hashlib.sha256(self.data).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

    def __str__(self) -> str:
        return f"{self.kind.removeprefix('ssh-')} {self.fingerprint}"


@dataclass(frozen=True)
class KnownHostsLine:
    """One line of a known_hosts file that says something about a key."""

    file: Path
    number: int  # from 0
    marker: str  # "", "revoked" or "cert-authority"
    names: str
    key: HostKey

    def is_about(self, name: str) -> bool:
        """Whether this line speaks of the host of that name (see `entry_name`)."""
        found = False
        for pattern in self.names.split(","):
            if pattern.startswith("|1|"):
                found = found or _is_hash_of(pattern, name)
            elif pattern.startswith("!"):
                if _matches(name, pattern[1:]):
                    return False
            else:
                found = found or _matches(name, pattern)
        return found


class KnownHosts:
    """What several known_hosts files say; files that are not there say nothing."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.lines = [line for file in files for line in read(file)]

    def keys(self, name: str) -> list[HostKey]:
        """The keys that host may show, in the order of the files."""
        revoked = self.revoked(name)
        found = [line.key for line in self._about(name, "")]
        return [key for key in dict.fromkeys(found) if key not in revoked]

    def revoked(self, name: str) -> list[HostKey]:
        """The keys that host must never show again."""
        return [line.key for line in self._about(name, "revoked")]

    def where(self, name: str, key: HostKey) -> list[KnownHostsLine]:
        """The lines that give that host that key."""
        return [line for line in self._about(name, "") if line.key == key]

    def _about(self, name: str, marker: str) -> list[KnownHostsLine]:
        return [line for line in self.lines if line.marker == marker and line.is_about(name)]


def entry_name(host: str, port: int = DEFAULT_PORT) -> str:
    """How a host is called in known_hosts: host, or [host]:port."""
    host = host.lower()
    return host if port == DEFAULT_PORT else f"[{host}]:{port}"


def read(file: Path) -> list[KnownHostsLine]:
    """The lines of a file that can be read; other lines are skipped."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = (_parse(file, number, line) for number, line in enumerate(text.split("\n")))
    return [line for line in lines if line is not None]


def _parse(file: Path, number: int, text: str) -> KnownHostsLine | None:
    words = text.split()
    marker = words.pop(0)[1:] if words and words[0].startswith("@") else ""
    if len(words) < 3 or words[0].startswith("#"):
        return None
    with contextlib.suppress(binascii.Error, ValueError):
        data = base64.b64decode(words[2], validate=True)
        return KnownHostsLine(file, number, marker, words[0], HostKey(words[1], data))
    return None


def _matches(name: str, pattern: str) -> bool:
    # [ and ] are no wildcards here, unlike in a shell: [host]:port is a name.
    return fnmatchcase(name, re.sub(r"[\[\]]", lambda m: f"[{m[0]}]", pattern.lower()))


def _is_hash_of(pattern: str, name: str) -> bool:
    try:
        _, _, salt, digest = pattern.split("|")
        made = hmac.new(base64.b64decode(salt), name.encode(), hashlib.sha1).digest()
        return hmac.compare_digest(made, base64.b64decode(digest))
    except ValueError:
        return False


def add_entry(file: Path, name: str, key: HostKey) -> None:
    """Append that host's key to the file. OSError."""
    line = f"{name} {key.kind} {base64.b64encode(key.data).decode()}\n".encode()
    if file.parent.name == ".ssh":
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    with open(descriptor, "r+b", buffering=0) as handle:
        # One write at the end: with O_APPEND two programs' lines never mix (an empty one between
        # them is all that can happen).
        if size := os.fstat(handle.fileno()).st_size:
            handle.seek(size - 1)
            line = line if handle.read(1) == b"\n" else b"\n" + line
        handle.write(line)
        os.fsync(handle.fileno())


def remove_entries(lines: Sequence[KnownHostsLine], name: str) -> None:
    """Remove that host from these lines, and leave all else as it is. OSError.

    A line that names other hosts too keeps them.
    """
    for file in dict.fromkeys(line.file for line in lines):
        doomed = {line.number: line for line in lines if line.file == file}
        kept = []
        for number, text in enumerate(file.read_bytes().split(b"\n")):
            if number not in doomed:
                kept.append(text)
            elif others := _without(doomed[number], name):
                old = doomed[number].names.encode()
                kept.append(text.replace(old, others.encode(), 1))
        target = file.resolve()  # a link stays a link
        atomic_write(target, b"\n".join(kept), mode=target.stat().st_mode & 0o777)


def _without(line: KnownHostsLine, name: str) -> str:
    """The names of a line but for this one; empty when it is about this host alone.

    A pattern that covers this host and others stays, with an exception for this host.
    """
    names = line.names.split(",")
    left = [
        pattern
        for pattern in names
        if not (_is_hash_of(pattern, name) if pattern.startswith("|") else pattern.lower() == name)
    ]
    if any(_matches(name, pattern) for pattern in left if not pattern.startswith(("!", "|"))):
        left.append(f"!{name}")
    return ",".join(left) if any(not pattern.startswith("!") for pattern in left) else ""
