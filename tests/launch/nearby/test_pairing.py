from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from smolrun.errors import SmolrunError
from smolrun.launch.nearby import codes, messages, pairing
from smolrun.launch.nearby.joined import SessionMachines
from smolrun.launch.nearby.messages import (
    CodeNeeded,
    NotListening,
    PairingError,
    TooManyWrongCodes,
    WrongCode,
)
from smolrun.launch.nearby.pairing import Paired, ThisMachine, connect
from tests.launch.nearby.machines import (
    Coordinator,
    coordinator,
    is_closed,
    machine,
    tls_server,
    tls_to,
)
from tests.waiting import SOON_S, until


def join(
    server: Coordinator, me: ThisMachine, code: str | None, *, remember: bool = False
) -> Paired:
    return connect(["127.0.0.1"], server.port, me, code=code, remember=remember)


def both(server: Coordinator, paired: Paired) -> Paired:
    """What the coordinator has of it, once a byte has gone both ways."""
    other = server.paired.get(timeout=SOON_S)
    paired.socket.sendall(b"to the coordinator")
    assert other.socket.recv(100) == b"to the coordinator"
    other.socket.sendall(b"and back")
    assert paired.socket.recv(100) == b"and back"
    return other


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_right_code_pairs(tmp_path: Path, server: Coordinator, joiner: ThisMachine, host: str):
    if host == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6")
    with connect([host], server.port, joiner, code=server.code.lower()).socket as sock:
        other = server.paired.get(timeout=SOON_S)
        assert sock.version() == "TLSv1.3"
        assert (other.machine, other.address, other.by_code) == ("anna@pi", host, True)
        assert other.fingerprint == joiner.key.fingerprint
    assert list(tmp_path.rglob("*.json")) == []  # nothing is kept without being asked


def test_both_know_whom_they_are_paired_with(server: Coordinator, joiner: ThisMachine):
    paired = join(server, joiner, server.code)
    with paired.socket:
        both(server, paired)
        assert (paired.machine, paired.cluster) == ("anna@mini", "home")
        assert paired.fingerprint == server._me.key.fingerprint
        assert not paired.is_remembered
        assert paired.socket.gettimeout() is None


def test_one_code_is_for_many_machines(tmp_path: Path, server: Coordinator):
    for name in ("pi1", "pi2", "pi3", "pi4"):
        with join(server, machine(tmp_path, name), server.code).socket:
            assert server.paired.get(timeout=SOON_S).machine == f"anna@{name}"
    assert server.codes == [server.code]


def test_a_wrong_code_is_refused_and_the_address_waits(server: Coordinator, joiner: ThisMachine):
    with pytest.raises(WrongCode, match="the code is wrong"):
        join(server, joiner, "0000-0000")
    with pytest.raises(TooManyWrongCodes, match="in 1 s"):
        join(server, joiner, server.code)
    until(lambda: bool(server.refused))
    assert "anna@pi has typed another code" in server.refused[0]
    assert server.paired.empty()


def test_three_wrong_codes_retire_it(
    server: Coordinator, joiner: ThisMachine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(codes, "_FIRST_WAIT_S", 0.0)
    first = server.code
    for _ in range(3):
        assert server.codes == [first]
        with pytest.raises(WrongCode):
            join(server, joiner, "0000-0000")
    until(lambda: len(server.codes) == 2)
    with pytest.raises(WrongCode):
        join(server, joiner, first)
    paired = join(server, joiner, server.code)
    with paired.socket:
        both(server, paired)


def test_what_cannot_be_a_code_never_leaves_this_machine(joiner: ThisMachine):
    with pytest.raises(WrongCode, match="8 letters"):
        connect(["192.0.2.1"], 1, joiner, code="12345")


def test_without_a_code_strangers_are_asked_for_one(server: Coordinator, joiner: ThisMachine):
    with pytest.raises(CodeNeeded):
        join(server, joiner, None)
    assert server.codes == [server.code]  # it is no try
    assert server.paired.empty()


def test_remembered_machines_need_no_code(server: Coordinator, joiner: ThisMachine):
    paired = join(server, joiner, server.code, remember=True)
    with paired.socket:
        assert both(server, paired).is_remembered
        assert paired.is_remembered
    again = join(server, joiner, None)
    with again.socket:
        other = both(server, again)
        assert (again.by_code, other.by_code) == (False, False)
        assert again.is_remembered
        assert other.is_remembered


def test_a_machine_that_is_known_for_now_can_be_kept(tmp_path: Path, joiner: ThisMachine):
    """Of both sides: those that were paired in this process need no code until it ends."""
    mini = machine(tmp_path, "mini")
    sides = [ThisMachine(me.key, SessionMachines(), me.name) for me in (mini, joiner)]
    for side, me in zip(sides, (mini, joiner), strict=True):
        side.remembered.folder = me.remembered.folder
    server = Coordinator(sides[0])
    try:
        join(server, sides[1], server.code).socket.close()
        sides[0].remembered.add_for_now("joiner", joiner.key.fingerprint)  # type: ignore[attr-defined]
        sides[1].remembered.add_for_now("coordinator", mini.key.fingerprint)  # type: ignore[attr-defined]
        join(server, sides[1], None).socket.close()
        assert mini.remembered.all() == joiner.remembered.all() == []
        join(server, sides[1], None, remember=True).socket.close()
        assert [one.role for one in mini.remembered.all()] == ["joiner"]
        assert [one.role for one in joiner.remembered.all()] == ["coordinator"]
    finally:
        server.close()


def test_a_coordinator_does_not_have_to_remember(tmp_path: Path, joiner: ThisMachine):
    with coordinator(tmp_path, may_remember=False) as server:
        paired = join(server, joiner, server.code, remember=True)
        with paired.socket:
            assert not paired.is_remembered
            assert not both(server, paired).is_remembered
        with pytest.raises(CodeNeeded):
            join(server, joiner, None)
    assert list(tmp_path.rglob("*.json")) == []


def test_either_side_can_forget(server: Coordinator, joiner: ThisMachine):
    for side in (server._me.remembered, joiner.remembered):
        join(server, joiner, server.code, remember=True).socket.close()
        join(server, joiner, None).socket.close()
        for one in side.all():
            side.forget(one)
        with pytest.raises(CodeNeeded):
            join(server, joiner, None)


def test_a_remembered_joiner_is_no_remembered_coordinator(tmp_path: Path):
    """Who may join my runs may not run its code here."""
    mini, pi = machine(tmp_path, "mini"), machine(tmp_path, "pi")
    servers = [Coordinator(mini), Coordinator(pi)]
    try:
        join(servers[0], pi, servers[0].code, remember=True).socket.close()
        with pytest.raises(CodeNeeded):
            join(servers[1], mini, None)
    finally:
        for server in servers:
            server.close()


def test_another_key_than_the_remembered_one_has_to_give_a_code(
    tmp_path: Path, server: Coordinator, joiner: ThisMachine
):
    join(server, joiner, server.code, remember=True).socket.close()
    stranger = machine(tmp_path, "stranger")
    impostor = ThisMachine(stranger.key, joiner.remembered, joiner.name)
    with pytest.raises(CodeNeeded):
        join(server, impostor, None)
    with coordinator(tmp_path / "other") as other, pytest.raises(CodeNeeded):
        join(other, joiner, None)


def test_a_joiner_that_cannot_remember_says_so(server: Coordinator, joiner: ThisMachine):
    joiner.remembered.folder.write_text("a file in place of the folder")
    with pytest.raises(SmolrunError, match="cannot be remembered"):
        join(server, joiner, server.code, remember=True)


def test_a_coordinator_that_cannot_remember_pairs_all_the_same(
    server: Coordinator, joiner: ThisMachine
):
    server._me.remembered.folder.write_text("a file in place of the folder")
    paired = join(server, joiner, server.code, remember=True)
    with paired.socket:
        assert not both(server, paired).is_remembered
        assert not paired.is_remembered


def test_names_are_shown_as_one_short_line(server: Coordinator, tmp_path: Path):
    evil = ThisMachine(
        machine(tmp_path, "x").key, machine(tmp_path, "x").remembered, "\x1b[2Jroot\n" + "x" * 500
    )
    with join(server, evil, server.code, remember=True).socket:
        other = server.paired.get(timeout=SOON_S)
    assert other.machine.isprintable()
    assert len(other.machine) == 60
    assert server._me.remembered.all()[0].name == other.machine


def test_the_first_address_that_answers_is_taken(server: Coordinator, joiner: ThisMachine):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(NotListening, match=f"127.0.0.1 port {port}: .*; ::1 port {port}"):
        connect(["127.0.0.1", "::1"], port, joiner, code=None)
    with connect(["0.0.0.1", "127.0.0.1"], server.port, joiner, code=server.code).socket:
        pass
    with pytest.raises(PairingError, match="no address"):
        connect([], server.port, joiner, code=None)


def test_a_joiner_of_another_version_is_named(server: Coordinator, joiner: ThisMachine):
    with tls_to(server.port) as (sock, stranger):
        challenge = stranger.receive(messages.Challenge)
        text = pairing._signed_text(challenge.nonce, pairing._key_of_server(sock))
        key = joiner.key
        stranger.send(
            messages.Hello("9.9", "pi", key.public_key, key.sign(text), False, False, None)
        )
        with pytest.raises(PairingError, match="another version"):
            stranger.receive(messages.Welcome)
    until(lambda: bool(server.refused))
    assert "pi runs smolrun 9.9, this machine" in server.refused[0]


@pytest.mark.parametrize("protocol", [1, 2])
def test_a_coordinator_of_another_version_is_named(joiner: ThisMachine, protocol: int):
    def old(messages_: messages.Messages) -> None:
        messages_.send(messages.Challenge(protocol, "9.9", "home", "mini", b"x" * 32))

    with (
        tls_server(joiner.key, old) as port,
        pytest.raises(PairingError, match=r"mini runs smolrun 9\.9, this machine"),
    ):
        connect(["127.0.0.1"], port, joiner, code="0000-0000")


def test_closing_is_prompt_and_frees_the_port(tmp_path: Path):
    server = Coordinator(machine(tmp_path, "mini"))
    idle = socket.create_connection(("127.0.0.1", server.port), timeout=SOON_S)
    start = time.monotonic()
    server.close()
    assert time.monotonic() - start < SOON_S
    assert is_closed(idle)  # who was not paired is closed too
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1.0)
    idle.close()
