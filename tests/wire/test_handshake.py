"""Only a rank of this run, of this generation and with this config is let in, and nobody else
learns why not."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolrun.errors import HandshakeError
from smolrun.wire.handshake import AcceptorHandshake, DialerHandshake, Handshake, Identity

ZERO = Identity(0, 4, "run-1", "cafe", 0, b"s" * 32)
TWO = dataclasses.replace(ZERO, rank=2)


def say(listener: Handshake, data: bytes) -> bytes:
    """Feeds bytes to a side in small pieces; returns all it answers."""
    answer = b""
    while data:
        room = listener.buffer()
        count = min(3, len(room), len(data))
        room[:count] = data[:count]
        answer += listener.filled(count)
        data = data[count:]
    return answer


def talk(dialer: DialerHandshake, acceptor: AcceptorHandshake) -> list[bytes]:
    """Lets the two talk to the end; returns every message, in order."""
    said = [dialer.start()]
    listeners: list[Handshake] = [acceptor, dialer]
    while said[-1]:
        said.append(say(listeners[(len(said) - 1) % 2], said[-1]))
    return said


@pytest.mark.parametrize("channel", ["control", "up", "down"])
def test_two_ranks_of_a_run_authenticate_each_other(channel: str) -> None:
    dialer, acceptor = DialerHandshake(TWO, 0, channel), AcceptorHandshake(ZERO)
    said = talk(dialer, acceptor)
    assert dialer.is_authenticated and acceptor.is_authenticated
    assert not dialer.is_done and not acceptor.is_done
    assert (dialer.peer, acceptor.peer, acceptor.channel) == (0, 2, channel)
    assert not any(
        TWO.secret in message or TWO.secret.hex().encode() in message for message in said
    )


@pytest.mark.parametrize(("dials", "called"), [(TWO, ZERO), (ZERO, TWO)], ids=["up", "down"])
def test_the_higher_rank_nominates(dials: Identity, called: Identity) -> None:
    dialer, acceptor = DialerHandshake(dials, called.rank, "control"), AcceptorHandshake(called)
    talk(dialer, acceptor)
    higher, lower = (dialer, acceptor) if dials is TWO else (acceptor, dialer)
    assert higher.is_controlling and not lower.is_controlling
    kept = say(lower, higher.nominate())
    assert lower.is_done and not higher.is_done
    assert say(higher, kept) == b""
    assert higher.is_done


def test_a_nomination_needs_a_proof() -> None:
    dialer, acceptor = DialerHandshake(TWO, 0, "control"), AcceptorHandshake(ZERO)
    talk(dialer, acceptor)
    forged = b'{"type": "keep", "proof": "' + b"0" * 64 + b'"}'
    with pytest.raises(HandshakeError, match="the keeper does not know"):
        say(acceptor, len(forged).to_bytes(2, "little") + forged)
    assert not acceptor.is_done


def test_the_lower_rank_may_not_nominate() -> None:
    dialer, acceptor = DialerHandshake(TWO, 0, "control"), AcceptorHandshake(ZERO)
    talk(dialer, acceptor)
    with pytest.raises(HandshakeError, match="unexpected"):
        say(dialer, acceptor._message({"type": "keep"}, prove_as="keeper"))
    assert not dialer.is_done


def test_a_rank_with_the_certificate_of_another_is_refused() -> None:
    with pytest.raises(HandshakeError, match="claims to be rank 2 with rank 3's key"):
        talk(DialerHandshake(TWO, 0, "control"), AcceptorHandshake(ZERO, certified=3))


@pytest.mark.parametrize(
    ("dialer", "acceptor", "words"),
    [
        (
            dataclasses.replace(TWO, secret=b"t" * 32),
            ZERO,
            "acceptor does not know this run's secret",
        ),
        (dataclasses.replace(TWO, run_id="run-2"), ZERO, "acceptor does not know"),
        (dataclasses.replace(TWO, rank=0), ZERO, "no rank 0 dials rank 0"),
        (dataclasses.replace(TWO, rank=4), ZERO, "no rank 4 dials rank 0"),
        (dataclasses.replace(TWO, rank=-1), ZERO, "no rank -1 dials rank 0"),
        (TWO, dataclasses.replace(ZERO, rank=1), "dialed rank 0, but rank 1 answered"),
        (
            dataclasses.replace(TWO, config_hash="beef"),
            ZERO,
            "rank 0 refused: your config_hash is 'beef', mine is 'cafe'",
        ),
        (
            dataclasses.replace(TWO, generation=1),
            ZERO,
            "rank 0 refused: your generation is 1, mine is 0",
        ),
    ],
)
def test_all_others_are_refused(dialer: Identity, acceptor: Identity, words: str) -> None:
    with pytest.raises(HandshakeError, match=words):
        talk(DialerHandshake(dialer, 0, "control"), AcceptorHandshake(acceptor))


def test_a_dialer_that_does_not_know_the_secret_is_refused_by_the_acceptor() -> None:
    liar, acceptor = (
        DialerHandshake(dataclasses.replace(TWO, secret=b"t" * 32), 0, "control"),
        AcceptorHandshake(ZERO),
    )
    liar._check = lambda role, proof: None  # type: ignore[method-assign]  # a liar does not check
    with pytest.raises(HandshakeError, match="dialer does not know"):
        talk(liar, acceptor)
    assert acceptor.peer is None


def test_a_replayed_handshake_is_refused() -> None:
    recorded = talk(DialerHandshake(TWO, 0, "control"), AcceptorHandshake(ZERO))
    fresh = AcceptorHandshake(ZERO)
    assert say(fresh, recorded[0]), "the hello alone is harmless"
    with pytest.raises(HandshakeError, match="dialer does not know"):
        say(fresh, recorded[2])


def test_a_reflected_proof_is_refused() -> None:
    acceptor, dialer = AcceptorHandshake(ZERO), DialerHandshake(TWO, 0, "control")
    challenge = say(acceptor, dialer.start())
    reflected = challenge.replace(b'"challenge"', b'"proof"')
    with pytest.raises(HandshakeError):
        say(acceptor, (len(reflected) - 2).to_bytes(2, "little") + reflected[2:])


@given(st.binary(min_size=1, max_size=300))
def test_garbage_raises_nothing_but_handshake_errors(data: bytes) -> None:
    for side in (AcceptorHandshake(ZERO), DialerHandshake(TWO, 0, "up")):
        try:
            say(side, data)
        except HandshakeError:
            pass  # the only way to fail; anything else fails the test
        assert not side.is_done


def test_the_secret_is_not_printed() -> None:
    assert "sss" not in repr(ZERO)
