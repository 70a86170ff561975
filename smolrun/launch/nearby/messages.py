"""The messages of a pairing, over a TLS connection: bounded, typed, before one deadline.

One message is a length (2 bytes, big-endian) and JSON, at most 4 KiB. pairing.py has their order.
"""

from __future__ import annotations

import hashlib
import ssl
import time
from collections.abc import Callable
from typing import Literal, TypeVar

import msgspec

from smolrun.errors import SmolrunError

T = TypeVar("T", bound=msgspec.Struct)

_MAX_BYTES = 4096


class PairingError(SmolrunError):
    """The connection was not paired, and is closed."""


class NotListening(PairingError):
    """The machine is there, and nothing listens on that port: the coordinator has ended."""


class CodeNeeded(PairingError):
    """The coordinator wants a code: the two machines do not remember each other."""


class WrongCode(PairingError):
    """The code is not the one that the coordinator shows, or something between the two machines
    changes what they send."""


class OtherVersion(PairingError):
    """The two machines have different versions of smolrun."""


class TooManyWrongCodes(PairingError):
    """Not now: after `wait_s` seconds."""

    def __init__(self, wait_s: float) -> None:
        self.wait_s = wait_s
        super().__init__(f"too many wrong codes from this address; try again in {wait_s:.0f} s")


class Challenge(msgspec.Struct, frozen=True, tag=True):
    """The coordinator's first message: who it is, and a nonce to sign."""

    protocol: int
    smolrun: str
    cluster: str
    machine: str
    nonce: bytes


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The joiner's first message: its key, the proof of it, and SPAKE2's message with a code."""

    smolrun: str
    machine: str
    public_key: bytes
    signature: bytes
    knows: bool  # whether the joiner remembers the coordinator's key
    remember: bool  # whether it wants both sides to remember the other
    share: bytes | None  # SPAKE2's message; None without a code


class Answer(msgspec.Struct, frozen=True, tag=True):
    """SPAKE2's message of the coordinator."""

    share: bytes


class Proof(msgspec.Struct, frozen=True, tag=True):
    """The joiner knows the code."""

    mac: bytes


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The coordinator knows the code, or remembers the joiner: the connection is paired."""

    mac: bytes | None  # None between machines that remember each other
    remembers: bool  # whether the coordinator remembers the joiner from now on


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Why the connection is closed."""

    why: Literal["code_needed", "wrong_code", "version", "wait"]
    wait_s: float = 0.0  # for "wait": no earlier than that


_Message = Challenge | Hello | Answer | Proof | Welcome | Refused


class Messages:
    """JSON messages over a TLS connection, all of them before one deadline."""

    def __init__(
        self, sock: ssl.SSLSocket, timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._socket = sock
        self._clock = clock
        self._deadline = clock() + timeout_s
        self._transcript = hashlib.sha256()

    def send(self, message: _Message) -> None:
        """PairingError where it does not get through in time."""
        data = msgspec.json.encode(message)
        self._transcript.update(len(data).to_bytes(2, "big") + data)
        self._socket.settimeout(self._left())
        try:
            self._socket.sendall(len(data).to_bytes(2, "big") + data)
        except OSError as error:
            raise PairingError(f"the connection is lost: {reason(error)}") from None

    def receive(self, kind: type[T]) -> T:
        """The next message, which has to be of that kind. PairingError for any other, also for one
        that is late or not JSON; CodeNeeded and others for a Refused."""
        size = int.from_bytes(self._read(2), "big")
        if size > _MAX_BYTES:
            raise PairingError("the other side sent no message of a pairing")
        data = self._read(size)
        self._transcript.update(size.to_bytes(2, "big") + data)
        try:
            message: _Message = msgspec.json.decode(data, type=_Message)
        except (ValueError, RecursionError):
            raise PairingError("the other side sent no message of a pairing") from None
        if isinstance(message, Refused):
            raise _refusal(message)
        if not isinstance(message, kind):
            raise PairingError("the other side sent a message of a pairing out of order")
        return message

    def digest(self) -> bytes:
        """SHA-256 of all messages until now, both directions."""
        return self._transcript.digest()

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            self._socket.settimeout(self._left())
            try:
                more = self._socket.recv(count - len(data))
            except OSError as error:
                raise PairingError(f"the connection is lost: {reason(error)}") from None
            if not more:
                raise PairingError("the other side closed the connection")
            data += more
        return data

    def _left(self) -> float:
        left = self._deadline - self._clock()
        if left <= 0:
            raise PairingError("the other side is too slow")
        return left


def _refusal(message: Refused) -> PairingError:
    if message.why == "code_needed":
        return CodeNeeded("the coordinator wants the code that it shows")
    if message.why == "wait":
        return TooManyWrongCodes(min(max(message.wait_s, 0.0), 3600.0))
    if message.why == "version":
        return OtherVersion("the coordinator runs another version of smolrun")
    return WrongCode("the code is wrong; three wrong codes retire it, then a new one is shown")


def reason(error: OSError) -> str:
    """Why a connection failed, in a few words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ssl.SSLError):
        return (error.reason or "TLS failed").lower().replace("_", " ")
    return error.strerror or str(error)
