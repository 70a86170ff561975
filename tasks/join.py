"""task=join: this machine joins a cluster of the local network, and runs its ranks until Ctrl-C.

    find a cluster -- pair, by the code on its screen -- run what it asks for
      ^                                                           |
      +---- its run has ended, or the connection is lost ---------+

It runs the smolrun that is installed here. The other user's own files run here after this machine's
user has allowed them.
"""

from __future__ import annotations

import contextlib
import platform
import queue
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

import platformdirs

from smolrun.config import RunConfig
from smolrun.config.base import SHIPPED_TARGETS
from smolrun.config.suggest import problem
from smolrun.errors import ConfigError, ProtocolError, SmolrunError
from smolrun.launch.delivery.versions import own_versions
from smolrun.launch.nearby.agent import JoinAgent, Question, named, own_code_hash
from smolrun.launch.nearby.discovery import (
    NOTHING_FOUND,
    Announcement,
    Browser,
    NearbyService,
    choose,
    key_hint,
    own_addresses,
)
from smolrun.launch.nearby.joined import SessionMachines
from smolrun.launch.nearby.messages import (
    CodeNeeded,
    NotListening,
    OtherVersion,
    PairingError,
    TooManyWrongCodes,
    WrongCode,
)
from smolrun.launch.nearby.pairing import Paired, ThisMachine, connect
from smolrun.launch.nearby.protocol import HELLO_S, PORT, PROTOCOL, JoinAccepted, JoinRequest
from smolrun.launch.nearby.transport import Transport
from smolrun.launch.on_host.prelude import usable_cores
from smolrun.launch.supervisor_events import EXIT_FAILED, EXIT_STOPPED
from smolrun.launch.wake import AwakeSwitch
from smolrun.sanitize import echo, indented, one_line, printable
from smolrun.tracking.formatting import counted

if TYPE_CHECKING:
    from smolrun.config.settings import JoinConfig

_LOOK_S = 5.0  # an announcement takes a second or two
_AGAIN_S = 2.0
_POLL_S = 0.2
_CHOICE_S = 1.5  # for a second cluster to be found beside the first


class _Refused(SmolrunError):
    """The coordinator does not take this machine, and says why."""


def drive(config: RunConfig) -> int:
    """Exit code 130 after Ctrl-C, 3 where a cluster does not take this machine."""
    joiner = _Joiner(config)
    with _interrupts(), contextlib.closing(joiner):
        try:
            joiner.run()
        except (KeyboardInterrupt, EOFError):
            echo("\nthis machine has left")
            return EXIT_STOPPED
        except (PairingError, _Refused) as error:
            echo(indented(f"smolrun: {error}"), error=True)
            return EXIT_FAILED


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """SIGTERM and a closed terminal end it as Ctrl-C does."""
    found = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP", "SIGBREAK")]
    before = {one: signal.signal(one, signal.default_int_handler) for one in found if one}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@dataclass(frozen=True)
class _Target:
    """A coordinator: what it calls itself, and where it listens. `id` is new for each of its
    starts, `key` a hint of its fingerprint; both are empty where it was not announced."""

    shown: str
    addresses: Sequence[str]
    port: int
    id: str = ""
    key: str = ""


class _Joiner:
    """One run of the task."""

    def __init__(self, config: RunConfig) -> None:
        """ConfigError for an address that cannot be one."""
        self._join: JoinConfig = config.join
        self._fixed = _address(config.join.address) if config.join.address else None
        self._known = SessionMachines()
        self._me = replace(ThisMachine.load(), remembered=self._known)
        self._name = self._me.name.partition("@")[2]
        self._codes = _Codes(config.pairing_code)
        self._id = secrets.token_hex(8)
        self._has_joined = False
        self._ended: set[str] = set()  # starts of clusters that need this machine no longer
        self._said: set[str] = set()
        self._workdir = platformdirs.user_cache_path("smolrun") / "joined"
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._agent = JoinAgent(self._workdir, SHIPPED_TARGETS)
        self._browser = None if self._fixed else Browser()
        me = NearbyService(
            role="joiner",
            name=self._name,
            machine=self._me.name,
            port=0,
            key=key_hint(self._me.key.fingerprint),
        )
        self._announcement = Announcement(me)

    def close(self) -> None:
        """Neither announce nor look any longer."""
        self._announcement.close()
        if self._browser is not None:
            self._browser.close()

    def run(self) -> NoReturn:
        """Join one cluster after the other, until KeyboardInterrupt. PairingError, _Refused: the
        first one does not take this machine."""
        while True:
            target = self._fixed or self._found()
            try:
                paired = self._paired(target)
            except PairingError as error:
                is_final = isinstance(error, CodeNeeded | WrongCode | OtherVersion)
                if is_final and not self._has_joined:
                    raise
                if isinstance(error, NotListening):
                    self._ended.add(target.id)  # it died, and its announcement is not over yet
                self._say_once(f"{target.shown}: {error}; trying again")
                time.sleep(_AGAIN_S)
                continue
            self._known.add_for_now("coordinator", paired.fingerprint)
            try:
                if self._serve(paired):
                    self._ended.add(target.id)
            except _Refused as error:
                if not self._has_joined:
                    raise
                self._ended.add(target.id)
                self._say_once(str(error))
            self._said.clear()
            time.sleep(_AGAIN_S)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            echo(text)

    # -- which cluster ----

    def _found(self) -> _Target:
        """The cluster to join, waited for."""
        assert self._browser is not None, "without an address it looks for clusters"
        name = self._join.name
        wanted = f"cluster {name}" if name else "a cluster"
        self._say_once(f"looking for {wanted} to join as {self._me.name}; Ctrl-C ends it")
        explain_at = time.monotonic() + _LOOK_S
        while True:
            found = self._browser.wait_for(lambda found: bool(self._open(found)), _POLL_S)
            if self._open(found):
                if name is None and not self._has_joined:
                    time.sleep(_CHOICE_S)
                    found = self._browser.found()
                if (target := self._picked(self._open(found))) is not None:
                    return target
            elif time.monotonic() > explain_at and not self._has_joined:
                others = [one.name for one in choose(found, None)]
                seen = f"found: {', '.join(others)}" if others else NOTHING_FOUND
                self._say_once(self._browser.problem or seen)

    def _open(self, found: Sequence[NearbyService]) -> list[NearbyService]:
        """The clusters that this machine may join."""
        return [one for one in choose(found, self._join.name) if one.id not in self._ended]

    def _picked(self, found: Sequence[NearbyService]) -> _Target | None:
        """One of them, by its number where there are several; None where nobody can be asked."""
        if not found:
            return None
        if len(found) > 1 and not sys.stdin.isatty():
            ids = ", ".join(f"{one.name} of {one.machine}: join.name={one.id}" for one in found)
            self._say_once(f"{len(found)} clusters can be joined, which one? {ids}")
            return None
        chosen = found[0] if len(found) == 1 else _ask_which(found)
        shown = f"cluster {chosen.name} ({chosen.machine})"
        return _Target(shown, chosen.addresses, chosen.port, chosen.id, chosen.key)

    # -- one cluster ----

    def _paired(self, target: _Target) -> Paired:
        """A connection to it that is trusted. PairingError; CodeNeeded if there is no code."""
        code = None if self._may_know(target) else self._code(target)
        while True:
            try:
                return connect(
                    target.addresses,
                    target.port,
                    self._me,
                    code=code,
                    remember=self._join.remember,
                )
            except TooManyWrongCodes as error:
                echo(str(error))
                time.sleep(error.wait_s)
            except (CodeNeeded, WrongCode) as error:
                if isinstance(error, WrongCode):
                    echo(str(error))
                code = self._code(target)

    def _code(self, target: _Target) -> str:
        """The next one to try; CodeNeeded if there is none."""
        code = self._codes.next(target.shown)
        if code is None:
            raise CodeNeeded(
                "it needs a pairing code, and stdin has none (join.remember=true keeps a machine "
                "for later runs)"
            )
        return code

    def _may_know(self, target: _Target) -> bool:
        """Whether the two may remember each other, so that no code is needed."""
        known = [one.fingerprint for one in self._known.all() if one.role == "coordinator"]
        return any(key_hint(one) == target.key or not target.key for one in known)

    def _serve(self, paired: Paired) -> bool:
        """Run what the coordinator asks for, until the connection ends: whether it has said that it
        needs this machine no longer. _Refused."""
        transport = Transport(paired.socket, paired.machine, on_open=self._agent.on_open)
        transport.start()
        why = "its user has stopped it"
        try:
            transport.say_hello(self._hello())
            welcome: JoinAccepted = transport.receive_hello(JoinAccepted, HELLO_S)
            cluster = one_line(welcome.cluster)
            host = one_line(welcome.machine)
            echo(f"joined cluster {cluster} of {host} as {one_line(welcome.host)}; Ctrl-C leaves")
            self._has_joined = True
            self._work(transport, host)
            echo(f"cluster {cluster}: {one_line(transport.lost or 'ended')}")
        except (ProtocolError, OSError) as error:
            if transport.said_goodbye:
                raise _Refused(str(error)) from None
            echo(f"{paired.machine}: {error}")
        except BaseException:
            raise
        else:
            why = ""
        finally:
            transport.close(why)
        return transport.said_goodbye

    def _work(self, transport: Transport, host: str) -> None:
        """Until the connection ends. The machine stays awake while workers run."""
        was_busy = False
        with AwakeSwitch() as awake:
            while not transport.wait_end(_POLL_S):
                with contextlib.suppress(queue.Empty):
                    _answer(self._agent.questions.get_nowait(), host, is_yes=self._join.yes)
                is_busy = self._agent.num_workers > 0
                if is_busy != was_busy:
                    was_busy = is_busy
                    awake.set(is_busy)
                    echo(f"a run of {host} uses this machine" if is_busy else "idle")

    def _hello(self) -> JoinRequest:
        return JoinRequest(
            protocol=PROTOCOL,
            agent=self._id,
            name=self._name,
            versions=own_versions(),
            code=own_code_hash(),
            os=platform.system().lower(),
            cores=usable_cores() or 1,
            home=str(self._workdir),
            workdir=self._workdir.resolve().as_posix(),
            python=sys.executable,
            addresses=list(own_addresses())[:64],
        )


class _Codes:
    """Pairing codes: of the configuration, typed, or a line of stdin each."""

    def __init__(self, given: str | None) -> None:
        self._given = given

    def next(self, shown: str) -> str | None:
        """The next one to try with that cluster; None if there is none."""
        if self._given is not None:
            given, self._given = self._given, None
            return given
        if sys.stdin.isatty():
            return input(f"pairing code of {printable(shown)}: ")
        return sys.stdin.readline().strip() or None


def _address(text: str) -> _Target:
    """HOST, HOST:PORT or [IPV6]:PORT."""
    host, _, port = text.rpartition(":") if "]" not in text else text.partition("]:")
    host, port = (host.lstrip("["), port) if host and port.isdecimal() else (text, str(PORT))
    if text.count(":") > 1 and "]" not in text:  # a bare IPv6 address
        host, port = text, str(PORT)
    host = host.strip("[]")
    if not host or not 0 < int(port) < 65536:
        raise ConfigError(problem("join.address", text, "is no address", allowed="HOST:PORT"))
    return _Target(f"{host} port {port}", (host,), int(port))


def _ask_which(found: Sequence[NearbyService]) -> NearbyService:
    """The one whose number is typed."""
    for number, one in enumerate(found, start=1):
        echo(f"  {number}  cluster {one.name} of {one.machine}: {one.present} of {one.ranks} there")
    while True:
        typed = input("which one? ").strip()
        if typed.isdecimal() and 1 <= int(typed) <= len(found):
            return found[int(typed) - 1]


def _answer(question: Question, host: str, *, is_yes: bool) -> None:
    """Ask this machine's user whether the files of another user may run here."""
    files = question.files
    what = f"{host} wants to run {counted(len(files), 'file')} here ({named(files)})"
    if not files:
        what = f"{host} wants to run {named(question.targets)} here"
    if is_yes:
        echo(f"{what}: allowed by join.yes=true")
        question.reply(True)
        return
    if not sys.stdin.isatty():
        echo(f"{what}: not allowed, as nobody can be asked; join.yes=true allows it")
        question.reply(False)
        return
    while (typed := input(f"{what}: show / run / no? ").strip().lower()) not in ("run", "no"):
        for name, data in files.items() if typed == "show" else ():
            echo(f"--- {name}\n{data.decode('utf-8', 'replace')}")
    question.reply(typed == "run")
