"""Pairing: a TLS connection becomes one between two machines that trust each other.

    coordinator                                    joiner
        ◄──────────── TLS 1.3: the coordinator's key ────────────►
    Challenge   nonce, names, version    ────►
                                         ◄────  Hello    key, its signature, SPAKE2 message
    Answer      SPAKE2 message           ────►                     (only where a code is used)
                                         ◄────  Proof    HMAC      (only where a code is used)
    Welcome     HMAC                     ────►                     or Refused

The joiner signs the nonce and the key that TLS has shown it, so the signature is of no use on
another connection. SPAKE2's identities are the SHA-256 of both keys: a relay that ends TLS on both
sides shows each side another key than the other side has, and the HMACs differ. The joiner proves
the code first: who guesses at the coordinator learns nothing but right or wrong, and each wrong
guess counts. Two machines that remember each other's key need no code.

Every function here ends
before its deadline. Source: Abdalla, Pointcheval, "Simple Password-Based Encrypted Key Exchange
Protocols" (2005), as the package spake2 implements it (Ed25519's group).
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import hmac
import platform
import secrets
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from spake2 import SPAKE2_A, SPAKE2_B, SPAKEError

from smolrun.errors import SmolrunError
from smolrun.launch.nearby.codes import CodeKeeper, normalized
from smolrun.launch.nearby.machine_key import (
    MachineKey,
    client_context,
    fingerprint,
    is_signed,
    public_key_of,
)
from smolrun.launch.nearby.messages import (
    Answer,
    Challenge,
    CodeNeeded,
    Hello,
    Messages,
    NotListening,
    OtherVersion,
    PairingError,
    Proof,
    Refused,
    TooManyWrongCodes,
    Welcome,
    WrongCode,
    reason,
)
from smolrun.launch.nearby.remembered import RememberedMachines, Role, shown_name

PROTOCOL = 1
_NONCE_BYTES = 32
_CONNECT_S = 5.0  # for each address


@dataclass(frozen=True)
class Paired:
    """A connection to a machine that is trusted for now; blocking, without a timeout.

    `machine` (USER@HOST) and `cluster` are what it says of itself, safe to show, not unique and
    not proven; `fingerprint` is that of its key, which is proven. One thread at a time may read
    from `socket` or write to it: OpenSSL's connections are not thread-safe.
    """

    machine: str
    cluster: str
    fingerprint: str
    address: str
    by_code: bool  # False: by its remembered key
    is_remembered: bool  # by both sides, for the next time
    socket: ssl.SSLSocket


@dataclass(frozen=True)
class ThisMachine:
    """What this side is, and whom it knows. `name` is USER@HOST, shown to the other side."""

    key: MachineKey
    remembered: RememberedMachines
    name: str

    @classmethod
    def load(cls) -> ThisMachine:
        """Of this account. SmolrunError as `MachineKey.load`."""
        host = platform.node().partition(".")[0] or "unnamed"
        try:
            user = getpass.getuser()
        except (KeyError, ImportError, OSError):  # an account without a name
            user = "user"
        return cls(MachineKey.load(), RememberedMachines(), f"{user}@{host}")


def pair_as_joiner(
    sock: ssl.SSLSocket,
    me: ThisMachine,
    *,
    code: str | None,
    remember: bool = False,
    address: str = "",
    timeout_s: float = 20.0,
) -> Paired:
    """The joiner's side, after TLS's handshake. `code` as typed; None: try without.

    CodeNeeded, WrongCode, PairingError; SmolrunError if the coordinator has to be remembered and
    cannot. Nothing is closed here.
    """
    messages = Messages(sock, timeout_s)
    server_key = _key_of_server(sock)
    challenge = messages.receive(Challenge)
    if challenge.protocol != PROTOCOL or challenge.smolrun != version("smolrun"):
        raise OtherVersion(_other_version(challenge.machine, challenge.smolrun))
    knows = me.remembered.has("coordinator", fingerprint(server_key))
    pake = None
    if code is not None:
        names = _identities(me.key.public_key, server_key)
        pake = SPAKE2_A(normalized(code).encode(), *names)
    hello = Hello(
        smolrun=version("smolrun"),
        machine=me.name,
        public_key=me.key.public_key,
        signature=me.key.sign(_signed_text(challenge.nonce, server_key)),
        knows=knows,
        remember=remember,
        share=None if pake is None else pake.start(),
    )
    messages.send(hello)
    if pake is not None:
        welcome = _exchange_as_joiner(messages, pake)
    elif knows:
        welcome = messages.receive(Welcome)
    else:
        messages.receive(Welcome)  # raises what an honest coordinator answers
        raise CodeNeeded("the coordinator's key is not remembered here")
    if remember and welcome.remembers:
        me.remembered.add("coordinator", challenge.machine, fingerprint(server_key))
    is_remembered = welcome.remembers and (remember or knows)
    return _paired(
        sock, hello, challenge.machine, challenge.cluster, server_key, address, is_remembered
    )


def pair_as_coordinator(
    sock: ssl.SSLSocket,
    me: ThisMachine,
    *,
    cluster: str,
    codes: CodeKeeper,
    may_remember: bool = True,
    address: str = "",
    timeout_s: float = 10.0,
) -> Paired:
    """The coordinator's side, after TLS's handshake. PairingError of any kind. Nothing is closed
    here."""
    messages = Messages(sock, timeout_s)
    nonce = secrets.token_bytes(_NONCE_BYTES)
    messages.send(Challenge(PROTOCOL, version("smolrun"), cluster, me.name, nonce))
    hello = messages.receive(Hello)
    if not is_signed(hello.public_key, hello.signature, _signed_text(nonce, me.key.public_key)):
        raise PairingError("the joiner does not hold the key that it names")
    if hello.smolrun != version("smolrun"):
        messages.send(Refused("version"))
        raise OtherVersion(_other_version(hello.machine, hello.smolrun))
    knows = me.remembered.has("joiner", fingerprint(hello.public_key))
    mac = None
    if hello.share is not None:
        mac = _exchange_as_coordinator(messages, me.key, hello, codes, address)
    elif not (knows and hello.knows):
        messages.send(Refused("code_needed"))
        raise CodeNeeded(f"{shown_name(hello.machine)} has to type the code")
    remembers = knows
    if hello.remember and may_remember:  # also one that is known for now only
        with contextlib.suppress(SmolrunError):  # the joiner sees that it needs a code next time
            me.remembered.add("joiner", hello.machine, fingerprint(hello.public_key))
            remembers = True
    messages.send(Welcome(mac, remembers))
    is_remembered = remembers and (hello.remember or hello.knows)
    return _paired(sock, hello, hello.machine, cluster, hello.public_key, address, is_remembered)


def _paired(
    sock: ssl.SSLSocket,
    hello: Hello,
    machine: str,
    cluster: str,
    public_key: bytes,
    address: str,
    is_remembered: bool,
) -> Paired:
    sock.settimeout(None)
    return Paired(
        machine=shown_name(machine),
        cluster=shown_name(cluster),
        fingerprint=fingerprint(public_key),
        address=address,
        by_code=hello.share is not None,
        is_remembered=is_remembered,
        socket=sock,
    )


def _key_of_server(sock: ssl.SSLSocket) -> bytes:
    try:
        return public_key_of(sock)
    except ValueError:
        raise PairingError("the other side shows a certificate that cannot be read") from None


def _exchange_as_joiner(messages: Messages, pake: SPAKE2_A) -> Welcome:
    key = _key(pake, messages.receive(Answer).share)
    digest = messages.digest()
    messages.send(Proof(_mac(key, "joiner", digest)))
    welcome = messages.receive(Welcome)
    expected = _mac(key, "coordinator", digest)
    if welcome.mac is None or not hmac.compare_digest(welcome.mac, expected):
        raise WrongCode("the coordinator does not prove that it knows the code")
    return welcome


def _exchange_as_coordinator(
    messages: Messages, own_key: MachineKey, hello: Hello, codes: CodeKeeper, address: str
) -> bytes:
    """The HMAC for Welcome, once the joiner's is right."""
    try:
        code = codes.begin(address)
    except TooManyWrongCodes as error:
        messages.send(Refused("wait", error.wait_s))
        raise
    is_right = False
    try:
        names = _identities(hello.public_key, own_key.public_key)
        pake = SPAKE2_B(code.encode(), *names)
        share = pake.start()
        key = _key(pake, hello.share or b"")
        messages.send(Answer(share))
        digest = messages.digest()
        proof = messages.receive(Proof)
        is_right = hmac.compare_digest(proof.mac, _mac(key, "joiner", digest))
    finally:
        codes.end(address, code, is_right=is_right)
    if not is_right:
        messages.send(Refused("wrong_code"))
        raise WrongCode(f"{shown_name(hello.machine)} has typed another code")
    return _mac(key, "coordinator", digest)


def connect(
    addresses: Sequence[str],
    port: int,
    me: ThisMachine,
    *,
    code: str | None,
    remember: bool = False,
    timeout_s: float = 20.0,
) -> Paired:
    """Join the coordinator at the first of its addresses that answers; as `pair_as_joiner`, and
    the connection is closed on an error. WrongCode at once for what cannot be a code."""
    code = None if code is None else normalized(code)
    reasons, num_refused = [], 0
    for address in addresses:
        try:
            sock = _tls_to(address, port, timeout_s)
        except OSError as error:
            reasons.append(f"{address} port {port}: {reason(error)}")
            num_refused += isinstance(error, ConnectionRefusedError)
            continue
        try:
            return pair_as_joiner(
                sock, me, code=code, remember=remember, address=address, timeout_s=timeout_s
            )
        except BaseException:
            sock.close()
            raise
    is_over = num_refused == len(reasons) > 0
    kind = NotListening if is_over else PairingError
    raise kind("; ".join(reasons) or "it announces no address")


def _tls_to(address: str, port: int, timeout_s: float) -> ssl.SSLSocket:
    plain = socket.create_connection((address, port), timeout=_CONNECT_S)
    try:
        plain.settimeout(timeout_s)
        return client_context().wrap_socket(plain)
    except BaseException:
        plain.close()
        raise


def _key(pake: SPAKE2_A | SPAKE2_B, share: bytes) -> bytes:
    try:
        return bytes(pake.finish(share))
    except (SPAKEError, ValueError, AssertionError):  # no element of the group
        raise PairingError("the other side sent no message of SPAKE2") from None


def _identities(joiner_key: bytes, coordinator_key: bytes) -> tuple[bytes, bytes]:
    return hashlib.sha256(joiner_key).digest(), hashlib.sha256(coordinator_key).digest()


def _signed_text(nonce: bytes, coordinator_key: bytes) -> bytes:
    return b"smolrun nearby 1, joiner" + nonce + hashlib.sha256(coordinator_key).digest()


def _mac(key: bytes, role: Role, digest: bytes) -> bytes:
    return hmac.digest(key, role.encode() + digest, "sha256")


def _other_version(machine: str, theirs: str) -> str:
    return (
        f"{shown_name(machine)} runs smolrun {shown_name(theirs)}, this machine "
        f"{version('smolrun')}: install the same version on both, as with `pip install "
        f"smolrun=={version('smolrun')}`"
    )
