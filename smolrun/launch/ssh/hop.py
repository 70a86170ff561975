"""One SSH server on the way to a host: the host itself, or a jump host before it.

Holds what is learnt of it while we connect, so that whoever gives up waiting can say how far it
came.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from fabric import Connection

from smolrun.launch.remote.error_tail import last_words
from smolrun.launch.ssh.host_keys import HostKey, KnownHosts
from smolrun.launch.ssh.settings import Settings
from smolrun.sanitize import one_line

Stage = Literal["reach", "greeting", "login", "in"]


class Failed(Exception):
    """Why a server cannot be used, and what to do; becomes a LoginFailed with the host's name."""

    def __init__(self, what: str, todo: str | None = None, *, is_refused: bool = False) -> None:
        super().__init__(what)
        self.what = one_line(what).strip()  # a server's own words may be in it
        self.todo = todo
        self.is_refused = is_refused


class Wire:
    """The socket below a connection; knows when something was last heard on it."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self.heard = time.monotonic()

    def recv(self, size: int) -> bytes:
        """Some bytes; empty at the end."""
        data: bytes = self._socket.recv(size)
        self.heard = time.monotonic()
        return data

    def close(self) -> None:
        """Never raises: a ProxyCommand may have ended before."""
        with contextlib.suppress(OSError):
            self._socket.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


@dataclass
class Hop:
    """One server, and how far we came with it."""

    fabric: Connection
    settings: Settings
    cluster: str  # its name, for the commands that we advise
    is_jump: bool = False
    only_key: bool = False  # look at its host key, and do not log in
    stage: Stage = "reach"
    shown: HostKey | None = None
    wire: Wire | None = None
    address: str | None = None  # the IP address that was dialled, if we dialled
    agent: Any = None
    tried: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    takes: list[str] = field(default_factory=list)
    proxy_words: bytes | None = None  # what a ProxyCommand said before it ended

    @property
    def greeted(self) -> bool:
        """Whether an SSH server answered at all."""
        transport = self.fabric.client.get_transport()
        return transport is not None and bool(transport.remote_version)

    @property
    def proxy_command(self) -> str | None:
        """The program that passes the bytes on, if ssh_config names one."""
        return self.fabric.gateway if isinstance(self.fabric.gateway, str) else None

    @property
    def proxy_end(self) -> str | None:
        """How that program ended, if it did, with its last words."""
        process = getattr(self.wire, "process", None)
        if process is None or process.poll() is None:
            return None
        # Read once, and without waiting: something it left running may hold the pipe open.
        if self.proxy_words is None:
            with contextlib.suppress(OSError, AttributeError):  # no set_blocking on Windows, 3.11
                os.set_blocking(process.stderr.fileno(), False)
                self.proxy_words = process.stderr.read() or b""
        words = last_words(self.proxy_words or b"")
        return f"it ended with exit code {process.returncode}: {words}"

    @property
    def known(self) -> KnownHosts:
        """What the user's files say of host keys, as they are now."""
        return KnownHosts(self.settings.known_hosts)


@dataclass(frozen=True)
class Found:
    """What a look at a server's host key gave."""

    name: str  # of the host; a jump host has the name it has in ssh_config
    settings: Settings
    state: Literal["known", "new", "changed", "revoked", "unreachable"]
    key: HostKey | None = None
    before: tuple[HostKey, ...] = ()  # the keys it had, if it has another one now
    why: str = ""  # it could not be reached
