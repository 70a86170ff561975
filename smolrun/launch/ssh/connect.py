"""From the name of a host to a connection that is logged in, or to a HostError: always in time.

The attempt runs in a thread of its own, as neither name resolution nor an agent has a deadline; the
caller stops waiting at the deadline and reports the stage that was reached.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fabric import Config, Connection
from paramiko import MissingHostKeyPolicy, PKey, SSHClient, Transport

from smolrun.errors import HostError, LoginFailed, SmolrunError
from smolrun.launch.remote.machine import HostSpec, Machine
from smolrun.launch.remote.probe import probe_machine
from smolrun.launch.run_on_all import run_on_all
from smolrun.launch.ssh.connection import SshConnection
from smolrun.launch.ssh.hop import (
    ConnectFailure,
    ScanResult,
    SshHop,
    TimedSocket,
    explain,
    no_proxy,
    not_found,
    not_reached,
    not_trusted,
    too_late,
)
from smolrun.launch.ssh.host_keys import HostKey
from smolrun.launch.ssh.login import AskPassword, KeyAuthStrategy
from smolrun.launch.ssh.settings import SshTarget, load, parse_target, proxy, settings_of

# It logs tracebacks of errors that are reported as HostError.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)

_MOST_JUMPS = 8
_AGAIN_S, _ACCEPT_S = 10.0, 2.0
_LEAST_SHELL_S = 10.0  # a Pi with a slow card takes its time for the first command
# The library's own deadlines come after ours, which knows what to say.
_LATER_S = 5.0
_ROUND_S = 0.2  # how late a Ctrl-C may be noticed: Windows notices none during a wait


def connect(spec: HostSpec, *, ask_password: AskPassword | None = None) -> SshConnection:
    """Log in to the host. `ask_password` is for task=setup alone."""
    hops = _route(spec)
    _Attempt(spec.name, hops, spec.timeout_s, ask_password).finish()
    return SshConnection(spec.name, hops)


def scan(spec: HostSpec) -> list[ScanResult]:
    """Look at the key of the host without logging in, and at those of its jump hosts, first.

    To look behind a jump host one must log in to it: the list ends with the first that is not
    known, changed or not reached.
    """
    found: list[ScanResult] = []
    for number in range(len(_route(spec))):
        hops = _route(spec)[: number + 1]
        found.append(_look(spec, hops))
        if found[-1].state != "known":
            break
    return found


def open_machine(
    spec: HostSpec, *, needs_python: bool = True, ask_password: AskPassword | None = None
) -> Machine:
    """Log in and probe the host.

    `needs_python` False (task=setup): a host without a Python is returned too; its workdir is not
    created then.
    """
    connection = connect(spec, ask_password=ask_password)
    try:
        shell_s = max(spec.timeout_s, _LEAST_SHELL_S)
        return probe_machine(spec, connection, needs_python=needs_python, shell_s=shell_s)
    except BaseException:
        connection.close()
        raise


def open_again(machine: Machine) -> Machine:
    """A new connection to a host whose connection was lost. HostError within seconds: it has been
    used just now, so it answers soon, or not at all."""
    spec = replace(machine.spec, timeout_s=_AGAIN_S)
    # It may be gone, or too busy to answer; the kernel of a busy one accepts all the same.
    if machine.connection.is_silent and machine.address is not None:
        port = _route(spec)[-1].settings.port
        try:
            dial(machine.address, port, _ACCEPT_S).close()
        except ConnectFailure as error:
            raise LoginFailed(machine.name, error.what, error.hint) from None
    return open_machine(spec)


def open_machines(
    specs: Sequence[HostSpec], *, missing: dict[str, SmolrunError] | None = None
) -> dict[str, Machine]:
    """All in parallel, by name. If one fails none stays open, and all failures are raised; with a
    dict `missing`, a host that fails is left out and its error is put there."""
    opened: list[Machine] = []
    given_up = False

    def open_one(spec: HostSpec) -> Machine | None:
        try:
            machine = open_machine(spec)
        except SmolrunError as error:
            if missing is None:
                raise
            missing[spec.name] = error
            return None
        opened.append(machine)
        if given_up:  # interrupted while this one was connecting
            machine.close()
        return machine

    try:
        found = run_on_all({spec.name: spec for spec in specs}, open_one, "open")
        return {name: machine for name, machine in found.items() if machine is not None}
    except BaseException:
        given_up = True
        for machine in opened:
            machine.close()
        raise


def _look(spec: HostSpec, hops: list[SshHop]) -> ScanResult:
    last, why = hops[-1], ""
    name = f"{last.settings.host} (jump host)" if last.is_jump else spec.name
    last.only_key = True
    try:
        _Attempt(name, hops, spec.timeout_s, None).finish()
    except HostError as error:
        why = error.what
    finally:
        _close(hops)
    if last.shown is None:
        return ScanResult(name, last.settings, "unreachable", why=why, is_jump=last.is_jump)
    state, before = last.key_state()
    return ScanResult(name, last.settings, state, last.shown, before, is_jump=last.is_jump)


def _route(spec: HostSpec) -> list[SshHop]:
    """The servers from here to the host, in the order in which they are met."""
    name, cluster = spec.name, spec.cluster
    try:
        connection = _planned(name, load(name, spec.ssh_config), parse_target(name, spec.ssh))
        route = [connection]
        while isinstance(route[0].gateway, Connection):
            route.insert(0, route[0].gateway)
        hops = [
            SshHop(one, settings_of(one), cluster, is_jump=one is not connection) for one in route
        ]
    except HostError:
        raise
    except Exception as error:  # whatever the file says
        raise HostError(name, f"the ssh_config makes no sense for it: {error}") from None
    return hops


def _planned(
    name: str, config: Config, target: SshTarget, via: Connection | None = None, depth: int = 0
) -> Connection:
    """Not opened yet. ProxyJump is read here: a,b is first a, then b, which Fabric turns round."""
    said = config.base_ssh_config.lookup(target.host)
    kind, way = proxy(said) or ("", "")
    if via is None and kind == "proxyjump" and depth < _MOST_JUMPS:
        stops = [parse_target(name, jump.strip()) for jump in way.split(",")]
        # `Host *` with a ProxyJump holds for the jump host too, which is not meant to jump itself.
        if all(stop.host not in (target.host, said["hostname"]) for stop in stops):
            for stop in stops:
                via = _planned(name, config, stop, via, depth + 1)
    return Connection(
        target.host,
        user=target.user,
        port=target.port,
        config=config.clone(),
        gateway=via or (way if kind == "proxycommand" else False),
        forward_agent=False,
    )


class _Attempt:
    """One attempt to connect through all hops, in a daemon thread that may outlive it."""

    def __init__(
        self, name: str, hops: list[SshHop], timeout_s: float, ask: AskPassword | None
    ) -> None:
        self._name = name
        self._hops = hops
        self._timeout_s = timeout_s
        self._error: Exception | None = None
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._given_up = False
        for hop in hops:
            _prepare(name, hop, timeout_s, ask)

    def finish(self) -> None:
        """Wait for it; HostError if it did not come through in time. Ctrl-C ends the wait."""
        threading.Thread(
            target=self._run, name=f"smolrun-ssh-{self._name}-open", daemon=True
        ).start()
        try:
            in_time = self._wait()
        except BaseException:
            self._give_up()
            raise
        hop = self._current()
        if not in_time and hop.proxy_end:
            failed = no_proxy(hop, hop.proxy_end)
        elif not in_time:
            failed = too_late(hop, self._timeout_s)
        elif self._error is not None:
            failed = explain(hop, self._error)
        else:
            return
        self._give_up()
        what = f"on the way to it, {failed.what}" if hop.is_jump else failed.what
        raise LoginFailed(self._name, what, failed.hint, is_refused=failed.is_refused)

    def _wait(self) -> bool:
        """False if the deadline came first, or the end of a ProxyCommand, which paramiko misses."""
        deadline = time.monotonic() + self._timeout_s
        while not self._done.wait(min(_ROUND_S, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline or self._proxy_has_ended():
                return False
        return True

    def _proxy_has_ended(self) -> bool:
        process = getattr(self._hops[0].wire, "process", None)
        return process is not None and process.poll() is not None

    def _run(self) -> None:
        try:
            first, last = self._hops[0], self._hops[-1]
            if not first.fabric.gateway:
                place = first.settings
                dialled = dial(place.host, place.port, self._timeout_s)
                first.address = str(dialled.getpeername()[0])
                first.fabric.connect_kwargs["sock"] = dialled
            last.fabric.open()
        except Exception as error:  # reported by `finish`
            self._error = error
        self._done.set()
        with self._lock:
            if self._given_up:
                _close(self._hops)

    def _current(self) -> SshHop:
        """The hop that is being connected."""
        return next((hop for hop in self._hops if hop.stage != "in"), self._hops[-1])

    def _give_up(self) -> None:
        with self._lock:
            self._given_up = True
            _close(self._hops)


def _close(hops: list[SshHop]) -> None:
    for hop in reversed(hops):
        # Also one that is only half open: a client that Fabric calls unconnected has a socket.
        for thing in (hop.fabric.client, hop.agent, hop.fabric.connect_kwargs.get("sock")):
            with contextlib.suppress(Exception):
                thing.close()


def _prepare(name: str, hop: SshHop, timeout_s: float, ask: AskPassword | None) -> None:
    """Make a planned connection a strict one."""
    fabric = hop.fabric
    fabric.connect_timeout = math.ceil(timeout_s + _LATER_S)
    fabric.connect_kwargs = {
        "banner_timeout": timeout_s + _LATER_S,
        "auth_timeout": timeout_s + _LATER_S,
        "channel_timeout": timeout_s + _LATER_S,
        "transport_factory": partial(_transport, name, hop, timeout_s),
    }
    fabric.config.authentication.strategy_class = partial(
        KeyAuthStrategy, hop, None if hop.is_jump else ask
    )
    fabric.client.set_missing_host_key_policy(_StrictKeys(hop))


def _transport(name: str, hop: SshHop, timeout_s: float, sock: Any, **options: Any) -> Transport:
    hop.stage = "greeting"
    hop.wire = TimedSocket(sock)
    transport = Transport(hop.wire, **options)
    transport.name = f"smolrun-ssh-{name}"
    transport.handshake_timeout = timeout_s + _LATER_S
    # A server with several keys should present one that is known.
    kinds = [key.kind for key in hop.known.keys(hop.settings.entry)]
    if "ssh-rsa" in kinds:
        kinds += ["rsa-sha2-512", "rsa-sha2-256"]
    security = transport.get_security_options()
    security.key_types = sorted(security.key_types, key=lambda kind: kind not in kinds)
    return transport


class _StrictKeys(MissingHostKeyPolicy):  # type: ignore[misc]  # paramiko has no types
    """Accepts known keys only. The client is given no known keys, so every key is checked here."""

    def __init__(self, hop: SshHop) -> None:
        self._hop = hop

    def missing_host_key(self, client: SSHClient, hostname: str, key: PKey) -> None:
        """Compare the key with the user's files; raises ConnectFailure unless it is there."""
        self._hop.shown = HostKey(key.get_name(), key.asbytes())
        if self._hop.key_state()[0] != "known":
            raise not_trusted(self._hop)


def dial(host: str, port: int, timeout_s: float) -> socket.socket:
    """Connect; every address of the name gets its share of the time. Raises ConnectFailure."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be one
        raise not_found(host, getattr(error, "strerror", None) or str(error)) from None
    deadline = time.monotonic() + timeout_s
    failed: ConnectFailure = not_found(host, "none")
    for place, (family, kind, protocol, _, address) in enumerate(found):
        dialled = socket.socket(family, kind, protocol)
        try:
            left = max(deadline - time.monotonic(), 0.1)
            dialled.settimeout(left / (len(found) - place))
            dialled.connect(address)
            # The control protocol is short lines, each waited for.
            dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return dialled
        except OSError as error:
            dialled.close()
            failed = not_reached(_named(host, str(address[0]), port), error)
        except BaseException:
            dialled.close()
            raise
    raise failed


def _named(host: str, address: str, port: int) -> str:
    return f"{host} port {port}" if address == host else f"{host} ({address}) port {port}"
