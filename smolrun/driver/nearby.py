"""cluster=nearby: the driver's port for machines that join, and those that have joined.

    with joined(config, say) as config:     waits for the machines; `config` has their names
        machine_of(host)                    its connection now, for this start or the next
        ...                                 a machine that was lost may join again at any time

Its own machine has the pairing code on its screen, and nowhere else.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from smolrun.config import RunConfig, min_ranks_left
from smolrun.errors import HostError, ProtocolError
from smolrun.mesh.addresses import shown

if TYPE_CHECKING:
    from smolrun.launch.nearby.joined import JoinedMachine
    from smolrun.launch.nearby.pairing import Paired
    from smolrun.launch.nearby.pairing_server import PairingServer
    from smolrun.launch.nearby.protocol import JoinRequest
    from smolrun.launch.nearby.transport import Transport

TASKS = ("train", "serve", "generate", "chat", "bench")
_POLL_S = 0.2
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9.-]+")
_MOST_NAME_CHARS = 40


@dataclass
class _Place:
    """A host of the run, and the machine that has joined for it."""

    host: str
    has_own_name: bool  # given by the user; else it gets that of the machine
    agent: str = ""
    name: str = ""  # the machine's own
    machine: JoinedMachine | None = None

    @property
    def is_open(self) -> bool:
        return self.machine is not None and self.machine.connection.lost is None


class NearbyCluster:
    """The machines that have joined. `say` is called from any thread."""

    def __init__(self, config: RunConfig, say: Callable[[str], None]) -> None:
        """Listen, and announce it."""
        from smolrun.launch.nearby.agent import own_code_hash
        from smolrun.launch.nearby.discovery import Announcement, NearbyService, key_hint
        from smolrun.launch.nearby.joined import SessionMachines
        from smolrun.launch.nearby.pairing import ThisMachine

        cluster = config.cluster
        hosts = cluster.hosts or []
        self._known = SessionMachines()
        self._me = replace(ThisMachine.load(), remembered=self._known)
        self.name = config.run_name or self._me.name.partition("@")[2]
        self._say = say
        self._changed = threading.Condition()
        self._places = [_Place(one.name, not cluster.nearby) for one in hosts if one.nearby]
        self._others = {one.name for one in hosts if not one.nearby}
        self._is_here = any(one.is_here for one in hosts)
        self._may_rename, self._may_show = True, False
        self._here: dict[str, None] = {}  # this machine's addresses, as machines have reached it
        self._code = own_code_hash()
        self._server = self._listen()
        self._announcement = Announcement(
            NearbyService(
                role="coordinator",
                name=self.name,
                machine=self._me.name,
                port=self._server.port,
                key=key_hint(self._me.key.fingerprint),
                ranks=len(self._others) + len(self._places),
                present=len(self._others),
            )
        )

    def _listen(self) -> PairingServer:
        """On the usual port, so that `join.address=HOST` is enough; on any, if that is taken."""
        from smolrun.launch.nearby.pairing_server import PairingServer
        from smolrun.launch.nearby.protocol import PORT

        for port in (PORT, 0):
            try:
                return PairingServer(
                    self._me,
                    cluster=self.name,
                    on_code=self._show_code,
                    on_paired=self._take,
                    on_refused=lambda why: self._say(f"refused: {why}"),
                    port=port,
                )
            except OSError as error:
                failed = error
        raise HostError(self.name, f"it cannot listen for machines that join: {failed}")

    def _show_code(self, code: str) -> None:
        """A new one replaces one that was typed wrong three times."""
        if self._may_show:
            self._say(f"pairing code: {code}")

    def wait(self, least: int, timeout_s: float) -> None:
        """Until so many machines have joined; HostError after `timeout_s`."""
        from smolrun.launch.nearby.discovery import own_addresses

        self._say(self._waiting())
        if addresses := own_addresses():
            where = shown(addresses[0], self._server.port)
            self._say(f"where they find nothing: smolrun task=join join.address={where}")
        self._may_show = True
        self._show_code(self._server.code)
        give_up, told = time.monotonic() + timeout_s, self.num_joined
        while (there := self.num_joined) < least:
            if there != told:
                told = there
                self._say(self._waiting())
            if time.monotonic() > give_up:
                raise HostError(
                    self.name,
                    f"{there} of {least} machines joined within {timeout_s:g} s",
                    "smolrun task=join on each of them; task=nearby shows what is announced",
                )
            with self._changed:
                self._changed.wait(_POLL_S)  # in rounds: Windows notices no Ctrl-C during a wait
        self._may_rename = False

    def _waiting(self) -> str:
        total, there = len(self._others) + len(self._places), self.num_joined
        place = f"this machine is 1 of {total}" if self._is_here else f"{total} in all"
        has = f", {there} joined" if there else ""
        return (
            f"cluster {self.name}: waiting for {len(self._places) - there} more ({place}{has}); on "
            "each of them: smolrun task=join"
        )

    @property
    def num_joined(self) -> int:
        """How many machines are there now."""
        with self._changed:
            return sum(place.is_open for place in self._places)

    def machine(self, host: str) -> JoinedMachine:
        """The machine that has joined for a host; HostError if there is none now."""
        with self._changed:
            for place in self._places:
                if place.host == host and place.is_open:
                    assert place.machine is not None, "it is open"
                    return place.machine
        raise HostError(host, "it has not joined", "smolrun task=join on that machine")

    def named(self, config: RunConfig) -> RunConfig:
        """The configuration with the names of the machines that have joined, and this machine's
        address as they have reached it."""
        names = iter([place.host for place in self._places])
        hosts = []
        for host in config.cluster.hosts or []:
            update: dict[str, object] = {}
            if host.nearby:
                update = {"name": next(names)}
            elif host.is_here and host.address is None and self._here:
                update = {"address": sorted(self._here, key=_is_loopback)}
            hosts.append(host.model_copy(update=update))
        cluster = config.cluster.model_copy(update={"hosts": hosts})
        return config.model_copy(update={"cluster": cluster})

    def close(self, reason: str) -> None:
        """Let all machines go, and listen no longer. Never raises."""
        self._announcement.close()
        self._server.close()
        for place in self._places:
            if place.machine is not None:
                place.machine.joined.transport.close(reason)

    # -- in threads of the server ----

    def _take(self, paired: Paired) -> None:
        """A machine has paired: check its version, and give it a place."""
        from smolrun.launch.delivery.versions import own_versions
        from smolrun.launch.nearby.protocol import HELLO_S, JoinAccepted, JoinRequest, refusal
        from smolrun.launch.nearby.transport import Transport

        here = str(paired.socket.getsockname()[0])
        transport = Transport(paired.socket, paired.machine)
        transport.start()
        try:
            hello: JoinRequest = transport.receive_hello(JoinRequest, HELLO_S)
            why = refusal(hello, own_versions(), self._code, self.name)
            place = self._place_for(paired, hello, transport, here) if why is None else None
            if place is None:
                why = why or f"cluster {self.name} has all of its machines"
                transport.close(why)
                self._say(f"refused: {paired.machine} at {paired.address}: {why}")
                return
            welcome = JoinAccepted(self.name, self._me.name, place.host)
            transport.say_hello(welcome)
        except (ProtocolError, OSError) as error:
            transport.close()
            self._say(f"refused: {paired.machine} at {paired.address}: {error}")
            return
        self._known.add_for_now("joiner", paired.fingerprint)
        self._announcement.update(present=len(self._others) + self.num_joined)
        self._say(f"{place.host} has joined ({paired.machine} at {paired.address})")
        if paired.by_code and paired.is_remembered:
            self._say(f"{paired.machine} is remembered: it joins later runs without a code")
        with self._changed:
            self._changed.notify_all()
        transport.wait_end()
        if place.machine is not None and place.machine.joined.transport is transport:
            self._announcement.update(present=len(self._others) + self.num_joined)
            if transport.lost is not None:
                self._say(f"{place.host} has left: {transport.lost}")

    def _place_for(
        self, paired: Paired, hello: JoinRequest, transport: Transport, here: str
    ) -> _Place | None:
        """The place of a machine: the one that it had, else one that is free; None if all are
        taken."""
        from smolrun.launch.nearby.joined import joined_machine

        with self._changed:
            place = self._choose(hello)
            if place is None:
                return None
            if place.is_open and place.machine is not None:  # its old connection is not noticed yet
                place.machine.joined.transport.give_up("it has joined again")
            if self._may_rename and not place.has_own_name:
                taken = {one.host for one in self._places if one is not place} | self._others
                place.host = _unique(hello.name, taken)
            place.agent, place.name = hello.agent, hello.name
            addresses = list(dict.fromkeys([_bare(paired.address), *_usable(hello.addresses)]))
            place.machine = joined_machine(
                hello, transport, addresses, host=place.host, cluster=self.name
            )
            self._here[_bare(here)] = None
            return place

    def _choose(self, hello: JoinRequest) -> _Place | None:
        closed = [place for place in self._places if not place.is_open]
        choices = [
            *(place for place in self._places if place.agent == hello.agent),
            *(place for place in closed if hello.name in (place.name, place.host)),
            *(place for place in closed if place.machine is None),
            *closed,
        ]
        return next(iter(choices), None)


# The machines that have joined this process: one process drives one run.
_current: NearbyCluster | None = None


@contextlib.contextmanager
def joined(config: RunConfig, say: Callable[[str], None]) -> Iterator[RunConfig]:
    """Wait for the machines that the configuration says will join; it with their names. They are
    released at the end of the `with`."""
    global _current
    cluster = config.cluster
    needed = sum(host.nearby for host in cluster.hosts or [])
    if not needed:
        yield config
        return
    if (least := min_ranks_left(config)) is not None:  # the others may come later
        others = len(cluster.hosts or []) - needed
        needed = min(needed, max(0, least - others))
    reason = "the run could not begin"
    _current = NearbyCluster(config, say)
    try:
        _current.wait(needed, cluster.join_timeout_s)
        named = _current.named(config)
        reason = "the run has ended"
        yield named
    finally:
        _current.close(reason)
        _current = None


def machine_of(host: str) -> JoinedMachine:
    """The machine that has joined for a host; HostError if there is none now."""
    if _current is None:
        raise HostError(host, "no machine can join this task")
    return _current.machine(host)


def _unique(name: str, taken: Collection[str]) -> str:
    """A host's name for a machine that calls itself so."""
    plain = _NOT_IN_NAMES.sub("-", name.partition(".")[0])[:_MOST_NAME_CHARS].strip("-.")
    plain = plain or "machine"
    numbers = itertools.count(2)
    while plain in taken:
        plain = f"{plain.rpartition('-')[0] or plain}-{next(numbers)}"
    return plain


def _bare(address: str) -> str:
    """An address without the interface by which this machine reaches it."""
    return address.partition("%")[0].removeprefix("::ffff:")


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _usable(addresses: Collection[str]) -> Iterator[str]:
    """Those that others may reach it by; what is no address is left out."""
    for text in addresses:
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address(_bare(text))
            if not address.is_loopback and not address.is_unspecified and not address.is_multicast:
                yield str(address)
