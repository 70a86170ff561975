"""What strangers may try: relays, replays, floods, garbage, and fake coordinators."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from spake2 import SPAKE2_A, SPAKE2_B

from smolrun.errors import SmolrunError
from smolrun.launch.nearby import codes, messages, pairing, pairing_server
from smolrun.launch.nearby.machine_key import MachineKey
from smolrun.launch.nearby.messages import (
    Answer,
    Challenge,
    CodeNeeded,
    Hello,
    Messages,
    PairingError,
    Proof,
    Refused,
    Welcome,
    WrongCode,
)
from smolrun.launch.nearby.pairing import ThisMachine, connect
from tests.launch.nearby.machines import Coordinator, coordinator, is_closed, tls_server, tls_to
from tests.waiting import SOON_S, until

VERSION = pairing.version("smolrun")


def is_open(server: Coordinator, joiner: ThisMachine, host: str = "127.0.0.1") -> bool:
    """Whether an honest machine still gets in."""
    connect([host], server.port, joiner, code=server.code).socket.close()
    server.paired.get(timeout=SOON_S).socket.close()
    return server.paired.empty()


# --- a relay that ends TLS on both sides -------------------------------------------------------


def hello_of(relay: MachineKey, real: Hello, challenge: Challenge, coordinator_key: bytes) -> Hello:
    """The joiner's message with the relay's key in place of the joiner's, properly signed."""
    text = pairing._signed_text(challenge.nonce, coordinator_key)
    return msgspec.structs.replace(real, public_key=relay.public_key, signature=relay.sign(text))


@pytest.mark.parametrize("signs_itself", [False, True])
def test_a_relay_between_the_two_gets_nothing(
    server: Coordinator, joiner: ThisMachine, signs_itself: bool
):
    relay = MachineKey.make()
    passed: list[str] = []

    def talk(to_joiner: Messages) -> None:
        with tls_to(server.port) as (sock, to_server):
            challenge = to_server.receive(Challenge)
            to_joiner.send(challenge)
            hello = to_joiner.receive(Hello)
            if signs_itself:
                key = pairing._key_of_server(sock)
                hello = hello_of(relay, hello, challenge, key)
            to_server.send(hello)
            to_joiner.send(to_server.receive(Answer))
            passed.append("answer")
            to_server.send(to_joiner.receive(Proof))
            try:
                to_joiner.send(to_server.receive(Welcome))
                passed.append("welcome")
            except WrongCode:
                to_joiner.send(Refused("wrong_code"))

    with tls_server(relay, talk) as port, pytest.raises(PairingError):
        connect(["127.0.0.1"], port, joiner, code=server.code, remember=True)
    until(lambda: bool(server.refused))
    # With the joiner's own signature it fails before the code is of any use.
    assert passed == (["answer"] if signs_itself else [])
    expected = "has typed another code" if signs_itself else "does not hold the key"
    assert expected in server.refused[0]
    assert server.paired.empty()
    assert joiner.remembered.all() == server._me.remembered.all() == []


def test_a_fake_coordinator_without_the_code_is_not_believed(joiner: ThisMachine):
    """It accepts every proof, and has none of its own."""
    fake = MachineKey.make()
    macs: list[bytes | None] = [None, b"", bytes(32)]

    def talk(channel: Messages) -> None:
        channel.send(Challenge(1, VERSION, "home", "mini", bytes(32)))
        hello = channel.receive(Hello)
        names = pairing._identities(hello.public_key, fake.public_key)
        guess = SPAKE2_B(b"0000-0000", *names)
        share = guess.start()
        guess.finish(hello.share or b"")
        channel.send(Answer(share))
        channel.receive(Proof)
        channel.send(Welcome(macs.pop(), remembers=True))

    with tls_server(fake, talk) as port:
        while macs:
            with pytest.raises(WrongCode, match="does not prove"):
                connect(["127.0.0.1"], port, joiner, code="7KQM-3XWP", remember=True)
    assert joiner.remembered.all() == []


def test_a_fake_coordinator_cannot_skip_the_code(joiner: ThisMachine):
    def talk(channel: Messages) -> None:
        channel.send(Challenge(1, VERSION, "home", "mini", bytes(32)))
        channel.receive(Hello)
        channel.send(Welcome(None, remembers=True))

    with tls_server(MachineKey.make(), talk) as port:
        with pytest.raises(CodeNeeded):
            connect(["127.0.0.1"], port, joiner, code=None, remember=True)
        with pytest.raises(PairingError, match="out of order"):
            connect(["127.0.0.1"], port, joiner, code="7KQM-3XWP", remember=True)
    assert joiner.remembered.all() == []


def test_our_own_messages_are_not_accepted_from_the_other_side(
    server: Coordinator, joiner: ThisMachine
):
    """A reflection: SPAKE2's message comes back, and so does the proof."""

    def talk(channel: Messages) -> None:
        channel.send(Challenge(1, VERSION, "home", "mini", bytes(32)))
        hello = channel.receive(Hello)
        assert hello.share is not None
        channel.send(Answer(b"B" + hello.share[1:]))
        channel.send(Welcome(channel.receive(Proof).mac, remembers=False))

    with tls_server(MachineKey.make(), talk) as port, pytest.raises(PairingError, match="SPAKE2"):
        connect(["127.0.0.1"], port, joiner, code=server.code)


# --- replays ------------------------------------------------------------------------------------


def test_the_messages_of_an_earlier_pairing_are_refused(
    server: Coordinator, joiner: ThisMachine, monkeypatch: pytest.MonkeyPatch
):
    sent: list[messages._Message] = []
    real = Messages.send

    def send(self: Messages, message: messages._Message) -> None:
        sent.append(message)
        real(self, message)

    monkeypatch.setattr(Messages, "send", send)
    assert is_open(server, joiner)
    monkeypatch.setattr(Messages, "send", real)
    hello = next(one for one in sent if isinstance(one, Hello))
    with tls_to(server.port) as (_, stranger):
        stranger.receive(Challenge)
        stranger.send(hello)
        with pytest.raises(PairingError):
            stranger.receive(Answer)
    until(lambda: bool(server.refused))
    assert "does not hold the key" in server.refused[0]
    assert server.paired.empty()


def test_the_bytes_of_an_earlier_connection_are_refused(server: Coordinator, joiner: ThisMachine):
    recorded = bytearray()
    listener = socket.create_server(("127.0.0.1", 0))

    def relay() -> None:
        near, _ = listener.accept()
        far = socket.create_connection(("127.0.0.1", server.port), timeout=SOON_S)
        threading.Thread(target=copy, args=(far, near, None), daemon=True).start()
        copy(near, far, recorded)

    def copy(source: socket.socket, target: socket.socket, keep: bytearray | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if keep is not None:
                    keep += data
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    port = listener.getsockname()[1]
    connect(["127.0.0.1"], port, joiner, code=server.code).socket.close()  # a plain relay may
    server.paired.get(timeout=SOON_S).socket.close()
    thread.join(SOON_S)
    listener.close()
    assert server.code.encode() not in recorded
    with socket.create_connection(("127.0.0.1", server.port), timeout=SOON_S) as again:
        again.sendall(recorded)
        with contextlib.suppress(ConnectionError):
            while again.recv(65536):
                pass
    assert server.paired.empty()
    assert is_open(server, joiner)


# --- floods, slow and silent peers, garbage ----------------------------------------------------


def other_address() -> str:
    """One that counts as another machine than 127.0.0.1."""
    if not socket.has_dualstack_ipv6():
        pytest.skip("needs a second address of this machine: no IPv6")
    return "::1"


def test_silent_strangers_of_one_address_do_not_keep_others_out(
    server: Coordinator, joiner: ThisMachine
):
    here = other_address()
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), SOON_S))
        until(lambda: len(server._open) == pairing_server._OPEN_PER_ADDRESS)
        assert is_open(server, joiner, here)
        assert len(server._open) <= pairing_server._OPEN_PER_ADDRESS


def test_when_all_places_are_taken_the_oldest_goes(
    server: Coordinator, joiner: ThisMachine, monkeypatch: pytest.MonkeyPatch
):
    here = other_address()
    monkeypatch.setattr(pairing_server, "_OPEN", 2)
    with contextlib.ExitStack() as stack:
        strangers = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), SOON_S))
            for _ in range(2)
        ]
        until(lambda: len(server._open) == 2)
        assert is_open(server, joiner, here)
        assert is_closed(strangers[0])


def test_who_is_too_slow_is_closed(tmp_path: Path, joiner: ThisMachine):
    with coordinator(tmp_path, timeout_s=0.5) as server:
        with socket.create_connection(("127.0.0.1", server.port), SOON_S) as silent:
            assert is_closed(silent)
        with tls_to(server.port) as (sock, stranger):
            stranger.receive(Challenge)
            # One byte at a time, each within the timeout: the deadline is of the whole.
            start = time.monotonic()
            with contextlib.suppress(OSError):
                for byte in (100).to_bytes(2, "big") + bytes(100):
                    sock.sendall(bytes([byte]))
                    if time.monotonic() - start > SOON_S:
                        break
                    time.sleep(0.1)
            assert time.monotonic() - start < SOON_S
        until(lambda: not server._open)
        assert server.paired.empty()


GARBAGE = [
    b"",
    b"\x00\x00",
    b"\x00\x02{}",
    b"\xff\xff" + bytes(65535),
    b"\x10\x01" + bytes(4097),
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x00\x04null",
    b"\x0f\xff" + b"[" * 4095,
    b"\x00\x10" + b'{"type":"Hello"}',
    b"\x00\x10" + b"\xff\xfe" * 8,
]


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_ends_one_connection_only(server: Coordinator, joiner: ThisMachine, data: bytes):
    with tls_to(server.port) as (sock, stranger):
        stranger.receive(Challenge)
        with contextlib.suppress(OSError):  # it may end before all is sent
            sock.sendall(data)
    with (
        socket.create_connection(("127.0.0.1", server.port), SOON_S) as plain,
        contextlib.suppress(OSError),
    ):
        plain.sendall(data)
        plain.shutdown(socket.SHUT_WR)
        while plain.recv(4096):
            pass
    until(lambda: not server._open)
    assert is_open(server, joiner)


def a_hello(key: MachineKey, challenge: Challenge, sock: object, **changes: object) -> Hello:
    text = pairing._signed_text(challenge.nonce, pairing._key_of_server(sock))  # type: ignore[arg-type]
    hello = Hello(VERSION, "pi", key.public_key, key.sign(text), False, False, None)
    return msgspec.structs.replace(hello, **changes)


BAD_HELLOS: list[dict[str, object]] = [
    {"public_key": b""},
    {"public_key": b"x" * 91},
    {"signature": b""},
    {"share": b""},
    {"share": b"A"},
    {"share": b"A" + b"\xff" * 32},
    {"share": b"A" + b"\x01" + bytes(31)},  # the group's neutral element
    {"share": b"B" + bytes(32)},
    {"share": b"A" * 3000},
    {"knows": True, "remember": True},
]


@pytest.mark.parametrize("changes", BAD_HELLOS, ids=range(len(BAD_HELLOS)))
def test_a_bad_first_message_is_refused(
    server: Coordinator,
    joiner: ThisMachine,
    changes: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(codes, "_FIRST_WAIT_S", 0.0)
    with tls_to(server.port) as (sock, stranger):
        challenge = stranger.receive(Challenge)
        stranger.send(a_hello(joiner.key, challenge, sock, **changes))
        with pytest.raises(PairingError):
            stranger.receive(Welcome)
    until(lambda: not server._open)
    assert is_open(server, joiner)
    assert server._me.remembered.all() == []


def test_who_has_no_proof_of_the_code_has_used_a_try(
    server: Coordinator, joiner: ThisMachine, monkeypatch: pytest.MonkeyPatch
):
    """Also who goes away instead, so that nobody can look without being counted."""
    monkeypatch.setattr(codes, "_FIRST_WAIT_S", 0.0)
    for _ in range(codes.TRIES):
        with tls_to(server.port) as (sock, stranger):
            challenge = stranger.receive(Challenge)
            names = pairing._identities(joiner.key.public_key, pairing._key_of_server(sock))
            share = SPAKE2_A(b"0000-0000", *names).start()
            stranger.send(a_hello(joiner.key, challenge, sock, share=share))
            stranger.receive(Answer)
    until(lambda: len(server.codes) == 2)
    assert is_open(server, joiner)


Broken = Callable[[Messages], None]


def _silent(channel: Messages) -> None:
    channel.receive(Hello)


def _wrong_kind(channel: Messages) -> None:
    channel.send(Refused("wait", 1e300))


def _wrong_order(channel: Messages) -> None:
    channel.send(Answer(b"B" + bytes(32)))


@pytest.mark.parametrize("talk", [_silent, _wrong_kind, _wrong_order])
def test_a_broken_coordinator_is_an_error_in_time(joiner: ThisMachine, talk: Broken):
    with tls_server(joiner.key, talk) as port:
        start = time.monotonic()
        with pytest.raises(SmolrunError):
            connect(["127.0.0.1"], port, joiner, code="0000-0000", timeout_s=0.5)
        assert time.monotonic() - start < SOON_S


def test_no_tls_is_an_error_in_time(joiner: ThisMachine):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(PairingError, match="no answer in time"):
            connect(["127.0.0.1"], port, joiner, code="0000-0000", timeout_s=0.3)
