"""The handshake: two ranks prove to each other that they know the run's secret, before any frame is
read.

    dialer                                                   acceptor
      HELLO  version, rank, channel, nonce               ->
                                                         <-  CHALLENGE  rank, nonce, proof
      PROOF  generation, config hash, proof              ->
                                                         <-  WELCOME | REFUSED  reason, generation
      higher rank                                              lower rank
      KEEP  proof                                        ->
                                                         <-  KEPT  proof

proof = HMAC-SHA256(secret, role + hash of the run's id and of all messages so far, this one
included). The role label prevents a reflected proof, the two fresh nonces a replayed one. A reason
is sent only to a peer that has authenticated. Either rank may dial, and two ranks may have several
handshakes at once; the higher rank is the controlling one and nominates one of them (KEEP), and a
connection carries frames only after KEPT. A message is a JSON object behind a 2-byte
length, 1 KiB at most. Sans-IO like FrameDecoder: `buffer()` is the memory to fill, `filled(n)`
returns what to send.

Source: RFC 2104 (HMAC); RFC 8445 (ICE) for the controlling side and nomination."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass
from typing import Any

from smolrun.errors import EarlierGeneration, HandshakeError
from smolrun.wire.frame import VERSION

# What a connection is for: control goes both ways, "up" carries large tensors from the higher rank
# to the lower one, "down" the other way.
CHANNELS = ("control", "up", "down")
_MAX_MESSAGE = 1024
_NONCE_BYTES = 16


@dataclass(frozen=True)
class Identity:
    """A rank and its run; its repr does not show the secret."""

    rank: int
    world_size: int
    run_id: str
    config_hash: str
    generation: int
    secret: bytes

    def __repr__(self) -> str:
        return f"Identity(rank={self.rank}, world_size={self.world_size}, run_id={self.run_id!r})"


class Handshake:
    """What both sides share: reading messages, the transcript, proofs."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.peer: int | None = None  # the other rank, once it has authenticated
        self.channel = ""
        self.is_authenticated = False  # both ends, and their runs match
        self.is_done = False  # and this connection is nominated: what follows are frames
        self._has_nominated = False
        self._transcript = hashlib.sha256(identity.run_id.encode())
        self._memory = memoryview(bytearray(2 + _MAX_MESSAGE))
        self._need = 2
        self._have = 0

    def buffer(self) -> memoryview:
        """The memory that must be filled next."""
        return self._memory[self._have : self._need]

    def filled(self, count: int) -> bytes:
        """`count` new bytes are in `buffer()`; returns what must be sent now, maybe nothing. Raises
        HandshakeError."""
        self._have += count
        if self._have < self._need:
            return b""
        if self._need == 2:
            length = int.from_bytes(self._memory[:2], "little")
            if not 2 <= length <= _MAX_MESSAGE:
                raise HandshakeError(
                    f"handshake message of {length} bytes: the other side is not smolrun"
                )
            self._need = 2 + length
            return b""
        try:
            message = json.loads(bytes(self._memory[2 : self._need]))
        except (ValueError, RecursionError):
            message = None
        self._need, self._have = 2, 0
        if not isinstance(message, dict):
            raise HandshakeError(
                "the handshake is not a JSON object: the other side is not smolrun"
            )
        proof = message.pop("proof", None)
        self._record(message)
        if self.is_authenticated:
            return self._nomination(message, proof)
        return self._received(message, proof)

    @property
    def is_controlling(self) -> bool:
        """Whether this side nominates the connection: the higher rank."""
        return self.peer is not None and self.identity.rank > self.peer

    def nominate(self) -> bytes:
        """The message that selects this connection; for the controlling side, once."""
        assert self.is_controlling and self.is_authenticated and not self._has_nominated
        self._has_nominated = True
        return self._message({"type": "keep"}, prove_as="keeper")

    def _nomination(self, message: dict[str, Any], proof: object) -> bytes:
        """Messages after the proofs: the higher rank nominates, the lower one confirms."""
        match message.get("type"), self.is_controlling:
            case "keep", False:
                self._check("keeper", proof)
                self.is_done = True
                return self._message({"type": "kept"}, prove_as="kept")
            case "kept", True if self._has_nominated:
                self._check("kept", proof)
                self.is_done = True
                return b""
        raise _unexpected(message)

    def _received(self, message: dict[str, Any], proof: object) -> bytes:
        raise NotImplementedError

    def _message(self, message: dict[str, Any], prove_as: str | None = None) -> bytes:
        self._record(message)
        proof = {"proof": self._proof(prove_as)} if prove_as else {}
        raw = json.dumps({**message, **proof}).encode()
        return len(raw).to_bytes(2, "little") + raw

    def _record(self, message: dict[str, Any]) -> None:
        self._transcript.update(json.dumps(message, sort_keys=True).encode())

    def _proof(self, role: str) -> str:
        return hmac.new(
            self.identity.secret, role.encode() + self._transcript.digest(), hashlib.sha256
        ).hexdigest()

    def _check(self, role: str, proof: object) -> None:
        is_text = isinstance(proof, str) and proof.isascii()  # compare_digest refuses the rest
        if not is_text or not hmac.compare_digest(self._proof(role), str(proof)):
            raise HandshakeError(f"the {role} does not know this run's secret")


class DialerHandshake(Handshake):
    """The side that opened the connection, to `peer`, for `channel`, one of CHANNELS."""

    def __init__(self, identity: Identity, peer: int, channel: str) -> None:
        super().__init__(identity)
        self.dialed = peer
        self.channel = channel

    def start(self) -> bytes:
        """The first message."""
        nonce = secrets.token_hex(_NONCE_BYTES)
        rank = self.identity.rank
        return self._message(
            {
                "type": "hello",
                "version": VERSION,
                "rank": rank,
                "channel": self.channel,
                "nonce": nonce,
            }
        )

    def _received(self, message: dict[str, Any], proof: object) -> bytes:
        match message.get("type"), self.peer:
            case "challenge", None:
                self._check("acceptor", proof)
                if message.get("rank") != self.dialed:
                    raise HandshakeError(
                        f"dialed rank {self.dialed}, but rank {message.get('rank')} answered"
                    )
                self.peer = self.dialed
                facts = {
                    "generation": self.identity.generation,
                    "config_hash": self.identity.config_hash,
                }
                return self._message({"type": "proof", **facts}, prove_as="dialer")
            case "welcome", int():
                self.is_authenticated = True
                return b""
            case "refused", int():
                text = f"rank {self.peer} refused: {str(message.get('reason'))[:200]}"
                if _is_earlier(message, self.identity):
                    raise EarlierGeneration(text)
                raise HandshakeError(text)
        raise _unexpected(message)


class AcceptorHandshake(Handshake):
    """The side that accepted the connection. `claimed` is the rank in the dialer's HELLO, `peer`
    that rank once it is proved.

    `certified` is the rank in the other side's certificate, if there is one: HELLO must name the
    same."""

    def __init__(self, identity: Identity, certified: int | None = None) -> None:
        super().__init__(identity)
        self.refused_because = ""  # why an authenticated peer is refused
        self.is_of_earlier = False  # it is refused for its generation, an earlier one
        self.certified = certified
        self.claimed: int | None = None

    def _received(self, message: dict[str, Any], proof: object) -> bytes:
        match message.get("type"), self.claimed:
            case "hello", None:
                self._check_hello(message)
                nonce = secrets.token_hex(_NONCE_BYTES)
                return self._message(
                    {"type": "challenge", "rank": self.identity.rank, "nonce": nonce},
                    prove_as="acceptor",
                )
            case "proof", int():
                self._check("dialer", proof)
                self.peer = self.claimed
                reason = self.refused_because = self._mismatch(message)
                self.is_of_earlier = _is_earlier(message, self.identity)
                self.is_authenticated = not reason
                mine = self.identity.generation
                refused = {"type": "refused", "reason": reason, "generation": mine}
                return self._message(refused if reason else {"type": "welcome"})
        raise _unexpected(message)

    def _check_hello(self, message: dict[str, Any]) -> None:
        rank, channel = message.get("rank"), message.get("channel")
        if message.get("version") != VERSION:
            raise HandshakeError(
                f"the dialer speaks version {repr(message.get('version'))[:20]}, this is {VERSION}"
            )
        if (
            type(rank) is not int
            or not 0 <= rank < self.identity.world_size
            or rank == self.identity.rank
            or channel not in CHANNELS
        ):
            raise HandshakeError(
                f"no rank {repr(rank)[:20]} dials rank {self.identity.rank} "
                f"for {str(channel)[:20]!r}"
            )
        if self.certified not in (None, rank):
            raise HandshakeError(f"it claims to be rank {rank} with rank {self.certified}'s key")
        self.claimed, self.channel = rank, channel

    def _mismatch(self, message: dict[str, Any]) -> str:
        """Why a peer that knows the secret is refused; empty if it is not."""
        mine = {"generation": self.identity.generation, "config_hash": self.identity.config_hash}
        wrong = [
            f"your {key} is {message.get(key)!r}, mine is {mine[key]!r}"
            for key in mine
            if message.get(key) != mine[key]
        ]
        return "; ".join(wrong)


def _is_earlier(message: dict[str, Any], identity: Identity) -> bool:
    """Whether the sender of a proof, or of a refusal, is of an earlier generation."""
    generation = message.get("generation")
    return type(generation) is int and generation < identity.generation


def _unexpected(message: dict[str, Any]) -> HandshakeError:
    return HandshakeError(f"unexpected handshake message {str(message.get('type'))[:40]!r}")
