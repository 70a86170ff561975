"""One SSH server on the route to a host: the host itself or a jump host, and why connecting failed.

A hop records the stage that connecting has reached, so that a deadline is reported with what was
waited for. Below, each failure as one sentence with a hint.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from fabric import Connection
from paramiko import ChannelException, SSHException
from paramiko.ssh_exception import IncompatiblePeer

from smolrun.launch.remote.connection import error_tail
from smolrun.launch.ssh.host_keys import HostKey, KnownHosts
from smolrun.launch.ssh.settings import SshSettings
from smolrun.sanitize import one_line

Stage = Literal["reach", "greeting", "login", "in"]
KeyState = Literal["known", "new", "changed", "revoked"]


class ConnectFailure(Exception):
    """Why a server cannot be used, and what to do; becomes a LoginFailed with the host's name."""

    def __init__(self, what: str, hint: str | None = None, *, is_refused: bool = False) -> None:
        super().__init__(what)
        self.what = one_line(what).strip()  # a server's own words may be in it
        self.hint = hint
        self.is_refused = is_refused


class TimedSocket:
    """The socket below a connection, with the time of the last bytes received."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self.last_received = time.monotonic()

    def recv(self, size: int) -> bytes:
        """Some bytes; empty at the end."""
        data: bytes = self._socket.recv(size)
        self.last_received = time.monotonic()
        return data

    def close(self) -> None:
        """Never raises: a ProxyCommand may have ended before."""
        with contextlib.suppress(OSError):
            self._socket.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


@dataclass
class SshHop:
    """One server, and the stage that connecting to it has reached."""

    fabric: Connection
    settings: SshSettings
    cluster: str  # its name, for the commands that we advise
    is_jump: bool = False
    only_key: bool = False  # look at its host key, and do not log in
    stage: Stage = "reach"
    shown: HostKey | None = None
    wire: TimedSocket | None = None
    address: str | None = None  # the IP address that was dialled, if we dialled
    agent: Any = None
    tried: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    takes: list[str] = field(default_factory=list)
    proxy_words: bytes | None = None  # what a ProxyCommand said before it ended

    @property
    def greeted(self) -> bool:
        """Whether an SSH server sent its version."""
        transport = self.fabric.client.get_transport()
        return transport is not None and bool(transport.remote_version)

    @property
    def proxy_command(self) -> str | None:
        """The program that passes the bytes on, if ssh_config names one."""
        return self.fabric.gateway if isinstance(self.fabric.gateway, str) else None

    @property
    def proxy_end(self) -> str | None:
        """How that program ended, if it did, with the tail of its stderr."""
        process = getattr(self.wire, "process", None)
        if process is None or process.poll() is None:
            return None
        # Read once, and without waiting: something it left running may hold the pipe open.
        if self.proxy_words is None:
            with contextlib.suppress(OSError, AttributeError):  # no set_blocking on Windows, 3.11
                os.set_blocking(process.stderr.fileno(), False)
                self.proxy_words = process.stderr.read() or b""
        words = error_tail(self.proxy_words or b"")
        return f"it ended with exit code {process.returncode}: {words}"

    @property
    def known(self) -> KnownHosts:
        """The user's known_hosts files, read again at each access."""
        return KnownHosts(self.settings.known_hosts)

    def key_state(self) -> tuple[KeyState, tuple[HostKey, ...]]:
        """How the key that it showed stands in these files, and the keys it had, if that is
        another one now."""
        known, entry = self.known, self.settings.entry
        before = tuple(known.keys(entry))
        if self.shown in known.revoked(entry):
            return "revoked", ()
        if self.shown in before:
            return "known", ()
        return ("changed", before) if before else ("new", ())


@dataclass(frozen=True)
class ScanResult:
    """The result of a scan of a server's host key."""

    name: str  # of the host; a jump host has the name it has in ssh_config
    settings: SshSettings
    state: KeyState | Literal["unreachable"]
    key: HostKey | None = None
    before: tuple[HostKey, ...] = ()  # as of `key_state`
    why: str = ""  # it could not be reached
    is_jump: bool = False


_IS_IT_ON = "is it switched on and on this network? a firewall that swallows packets looks the same"


def not_found(host: str, why: str) -> ConnectFailure:
    """No address belongs to that name."""
    return ConnectFailure(
        f"no address is found for {host} ({why.lower()})",
        "check the name in the cluster file or HostName in your ssh_config",
    )


def not_reached(place: str, error: OSError) -> ConnectFailure:
    """The last address was not reachable."""
    if isinstance(error, ConnectionRefusedError):
        return ConnectFailure(
            f"{place} refuses the connection", "does an SSH server run there, and on this port?"
        )
    if isinstance(error, TimeoutError):
        return ConnectFailure(f"{place} does not answer", _IS_IT_ON)
    return ConnectFailure(
        f"{place} cannot be reached ({(error.strerror or str(error)).lower()})",
        "is it switched on and on this network?",
    )


def not_trusted(hop: SshHop) -> ConnectFailure:
    """A key that is not in the user's files, or is there as @revoked."""
    place, shown = hop.settings.place, hop.shown
    state, before = hop.key_state()
    if state == "revoked":
        return ConnectFailure(
            f"the SSH key of {place} ({shown}) is marked @revoked in known_hosts",
            "do not connect to it; find out why it was marked",
        )
    if state == "new":
        return ConnectFailure(
            f"the SSH key of {place} is not known yet ({shown})",
            f"smolrun task=trust cluster={hop.cluster} shows it and asks you",
        )
    was = " or ".join(str(old) for old in before)
    return ConnectFailure(
        f"the SSH key of {place} has CHANGED: you trusted {was}, it now shows {shown}. "
        "Either that machine was set up anew, or another machine answers at its address and could "
        "listen to all you send",
        f"if you know why, smolrun task=trust cluster={hop.cluster} replaces the key",
    )


def no_proxy(hop: SshHop, why: str) -> ConnectFailure:
    """The ProxyCommand is of no use."""
    what = f"its ProxyCommand reaches no SSH server ({why})"
    return ConnectFailure(what, f"try it by hand: {hop.proxy_command}")


def too_late(hop: SshHop, timeout_s: float) -> ConnectFailure:
    """The deadline passed; the stage it was in says what was waited for."""
    place, after = hop.settings.place, f"within {timeout_s:g} s"
    if hop.proxy_command and not hop.greeted:
        return no_proxy(hop, f"no answer {after}")
    if hop.stage == "reach":
        return ConnectFailure(f"{place} does not answer {after}", _IS_IT_ON)
    if hop.stage == "greeting" and not hop.greeted:
        return ConnectFailure(
            f"{place} accepts the connection, but sends no SSH version {after}",
            "check that this is the port of its SSH server; if it is, restart it",
        )
    if hop.stage == "greeting":
        return ConnectFailure(
            f"the SSH server of {place} does not finish the key exchange {after}",
            "the machine may be overloaded; cluster.connect_timeout_s gives it more time",
        )
    if hop.stage == "login":
        return ConnectFailure(
            f"the SSH server of {place} does not finish the login of {hop.settings.user} {after}",
            f"try `ssh {hop.settings.user}@{hop.settings.host}` by hand; "
            "cluster.connect_timeout_s gives it more time",
        )
    return ConnectFailure(f"jump host {place} does not reach the next machine {after}", _IS_IT_ON)


def explain(hop: SshHop, error: Exception) -> ConnectFailure:
    """The failure behind an exception of the library, by the stage that was reached."""
    place = hop.settings.place
    if isinstance(error, ConnectFailure):
        return error
    if hop.proxy_command and not hop.greeted:
        return no_proxy(hop, hop.proxy_end or getattr(error, "strerror", None) or str(error))
    if isinstance(error, ChannelException):  # a jump host that cannot go on
        return ConnectFailure(
            f"the jump host cannot reach {place} ({error.text.lower()})", _IS_IT_ON
        )
    if hop.stage == "login":
        return _not_let_in(hop)
    if isinstance(error, IncompatiblePeer):
        return ConnectFailure(
            f"the SSH server of {place} is not compatible with this client ({error})"
        )
    if isinstance(error, EOFError | SSHException) and not hop.greeted:
        return ConnectFailure(
            f"{place} accepts the connection, but no SSH server answers",
            "check that this is the port of its SSH server, and its MaxStartups",
        )
    if isinstance(error, OSError) and hop.stage == "reach":
        return not_reached(place, error)
    return ConnectFailure(
        f"the SSH connection to {place} failed ({str(error) or type(error).__name__})"
    )


def _not_let_in(hop: SshHop) -> ConnectFailure:
    user, host = hop.settings.user, hop.settings.host
    tried = "; tried " + ", ".join(hop.tried) if hop.tried else "; there was no key to try"
    skipped = "; left out " + ", ".join(hop.skipped) if hop.skipped else ""
    takes = f"; it takes {' or '.join(hop.takes)}" if hop.takes else ""
    agent = "; the IdentityAgent of your ssh_config is not read, SSH_AUTH_SOCK is"
    return ConnectFailure(
        f"{hop.settings.place} rejects the login of {user}{tried}{skipped}{takes}"
        + (agent if hop.settings.has_own_agent else ""),
        f"smolrun task=setup cluster={hop.cluster} brings your key there, "
        f"or ssh-copy-id {user}@{host}",
        is_refused=True,
    )
