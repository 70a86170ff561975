from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from smolrun.errors import HostError, HostErrors
from smolrun.launch.remote.machine import HostSpec
from smolrun.launch.ssh import connect as module
from smolrun.launch.ssh.connect import connect, dial, open_machines, scan
from smolrun.launch.ssh.hop import ConnectFailure
from tests import waiting
from tests.launch.ssh.server import Server, make_key, ssh_server


def refused(server: Server, target: str = "box", timeout_s: float = 10.0, **options) -> str:
    """The sentence with which it is not connected; no thread of the attempt stays."""
    with pytest.raises(HostError) as caught:
        connect(HostSpec("box", target, ssh_config=str(server.config), timeout_s=timeout_s,
                         cluster="home"), **options)  # fmt: skip
    waiting.until(lambda: not [name for name in thread_names() if name.startswith("smolrun-ssh")])
    return str(caught.value)


def thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_a_known_host(server: Server):
    connection = connect(HostSpec("box", "box", ssh_config=str(server.config)))
    assert connection.run("echo hello").out == b"hello\n"
    assert connection.address == "127.0.0.1"
    assert connection.lost is None
    connection.close()
    assert connection.lost is None


def test_user_and_port_of_the_target_come_first(server: Server):
    server.configure("Port 1", "User nobody", host="other")
    me = subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()
    target = f"{me}@127.0.0.1:{server.port}"
    connection = connect(HostSpec("x", target, ssh_config=str(server.config)))
    connection.close()


# --- host keys ------------------------------------------------------------------------------------


def fingerprint(key: Path) -> str:
    return subprocess.run(
        ["ssh-keygen", "-lf", key], capture_output=True, text=True, check=True
    ).stdout.split()[1]


def test_an_unknown_key(server: Server):
    server.known_hosts.write_text("")
    sentence = refused(server)
    assert sentence.startswith(f"box: the SSH key of 127.0.0.1 port {server.port} is not known yet")
    assert fingerprint(server.host_key) in sentence
    assert "smolrun task=trust cluster=home" in sentence
    assert server.known_hosts.read_text() == ""


def test_a_changed_key(server: Server, tmp_path: Path):
    other = make_key(tmp_path / "other")
    server.know(Path(f"{other}.pub"))
    before = server.known_hosts.read_text()
    sentence = refused(server)
    assert "CHANGED" in sentence
    assert fingerprint(other) in sentence
    assert fingerprint(server.host_key) in sentence
    assert "another machine answers at its address" in sentence
    assert "task=trust" in sentence
    assert server.known_hosts.read_text() == before


def test_another_type_than_the_known_one_is_a_change(server: Server, tmp_path: Path):
    server.know(Path(f"{make_key(tmp_path / 'other', 'rsa')}.pub"))
    assert "CHANGED" in refused(server)


def test_one_of_several_known_keys_is_enough(server: Server, tmp_path: Path):
    other = Path(f"{make_key(tmp_path / 'other')}.pub").read_text().split()
    lines = f"{server.entry} {other[0]} {other[1]}\n" + server.known_hosts.read_text()
    server.known_hosts.write_text(lines)
    connect(HostSpec("box", "box", ssh_config=str(server.config))).close()


def test_a_revoked_key(server: Server):
    kind, data = Path(f"{server.host_key}.pub").read_text().split()[:2]
    server.known_hosts.write_text(f"{server.entry} {kind} {data}\n@revoked * {kind} {data}\n")
    assert "@revoked" in refused(server)


def test_a_key_by_the_name_of_its_alias(server: Server):
    server.configure("HostKeyAlias thebox")
    server.known_hosts.write_text(server.known_hosts.read_text().replace(server.entry, "thebox"))
    connect(HostSpec("box", "box", ssh_config=str(server.config))).close()


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_a_server_with_several_keys_shows_the_one_we_know(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    second = make_key(tmp_path / "second", kind)
    with ssh_server(tmp_path, f"HostKey {second}") as server:
        server.know(Path(f"{second}.pub"))
        connect(HostSpec("box", "box", ssh_config=str(server.config))).close()
        (found,) = scan(HostSpec("box", "box", ssh_config=str(server.config)))
        assert found.state == "known"


def test_a_look_at_the_key_does_not_log_in(server: Server):
    server.authorize()
    (found,) = scan(HostSpec("box", "box", ssh_config=str(server.config)))
    assert found.state == "known"
    server.known_hosts.write_text("")
    (found,) = scan(HostSpec("box", "box", ssh_config=str(server.config)))
    assert (found.state, found.settings.entry) == ("new", server.entry)
    assert found.key is not None
    assert found.key.fingerprint == fingerprint(server.host_key)


def test_a_look_at_what_is_not_there(server: Server):
    (found,) = scan(HostSpec("box", "127.0.0.1:1", ssh_config=str(server.config)))
    assert (found.state, found.key) == ("unreachable", None)
    assert "refuses the connection" in found.why


# --- who does not answer as an SSH server should --------------------------------------------------


@contextlib.contextmanager
def listener(answer: Callable[[socket.socket], object]) -> Iterator[int]:
    """A TCP server that does `answer` with each connection, and keeps it open until the end."""
    kept = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    kept.append(server.accept()[0])
                    answer(kept[-1])

        threading.Thread(target=serve, name="listener", daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    for connection in kept:
        connection.close()


def took(act: Callable[[], str]) -> tuple[str, float]:
    began = time.monotonic()
    return act(), time.monotonic() - began


def test_a_port_where_nobody_listens(server: Server):
    sentence = refused(server, "127.0.0.1:1")
    assert "box: 127.0.0.1 port 1 refuses the connection; does an SSH server run there" in sentence


def test_a_name_that_nobody_has(server: Server):
    sentence = refused(server, "nobody.invalid")
    assert "no address is found for nobody.invalid" in sentence


def test_a_banner_that_never_comes(server: Server):
    with listener(lambda connection: None) as port:
        sentence, seconds = took(lambda: refused(server, f"127.0.0.1:{port}", timeout_s=1))
    assert "accepts the connection, but sends no SSH version within 1 s" in sentence
    assert 0.9 < seconds < waiting.SOON_S


def test_a_server_that_speaks_something_else(server: Server):
    with listener(lambda connection: connection.sendall(b"HTTP/1.1 400 No\r\n\r\n")) as port:
        sentence = refused(server, f"127.0.0.1:{port}", timeout_s=3)
    assert "no SSH server" in sentence


def test_a_server_that_hangs_up(server: Server):
    with listener(lambda connection: connection.close()) as port:
        sentence, seconds = took(lambda: refused(server, f"127.0.0.1:{port}", timeout_s=50))
    assert "no SSH server answers" in sentence
    assert seconds < waiting.SOON_S


def test_a_server_that_falls_silent_after_its_banner(server: Server):
    with listener(lambda connection: connection.sendall(b"SSH-2.0-Slow\r\n")) as port:
        sentence, seconds = took(lambda: refused(server, f"127.0.0.1:{port}", timeout_s=1))
    assert "does not finish the key exchange within 1 s" in sentence
    assert seconds < waiting.SOON_S


def test_a_server_from_another_age(server: Server):
    with listener(lambda connection: connection.sendall(b"SSH-1.5-Old\r\n")) as port:
        assert "is not compatible" in refused(server, f"127.0.0.1:{port}")


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
def test_a_frozen_server(server: Server):
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        sentence, seconds = took(lambda: refused(server, timeout_s=1))
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    assert "sends no SSH version within 1 s" in sentence
    assert seconds < waiting.SOON_S


def test_ctrl_c_while_connecting(server: Server):
    """In a process of its own, as Ctrl-C goes to the main thread of one."""
    with listener(lambda connection: None) as port:
        code = (
            "from smolrun.launch.remote.machine import HostSpec\n"
            "from smolrun.launch.ssh.connect import connect\n"
            "print('begun', flush=True)\n"
            "try:\n"
            f"    file = {str(server.config)!r}\n"
            f"    spec = HostSpec('box', '127.0.0.1:{port}', ssh_config=file, timeout_s=50)\n"
            "    connect(spec)\n"
            "except KeyboardInterrupt:\n"
            "    print('stopped')\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        waiting.until(lambda: _is_connected_to(process.pid, port))
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=50)[0] == b"stopped\n"


def _is_connected_to(pid: int, port: int) -> bool:
    import psutil

    return any(
        one.raddr and one.raddr.port == port for one in psutil.Process(pid).net_connections("tcp")
    )


def named(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> None:
    """A name with these addresses."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *_, **__: found)


def test_the_first_address_that_answers(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        named(monkeypatch, ("127.0.0.1", 1), server.getsockname())
        dialled = dial("box", 22, 5)
        assert dialled.getpeername() == server.getsockname()
        assert dialled.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        dialled.close()


def test_a_silent_address_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as server, silent() as address:
        named(monkeypatch, address, server.getsockname())
        dial("box", 22, 2).close()


class silent:  # noqa: N801  # reads as a word
    """An address that swallows all packets: its queue of connections is full."""

    def __enter__(self) -> tuple[str, int]:
        self.server = socket.create_server(("127.0.0.1", 0), backlog=0)
        self.waiting = []
        for _ in range(4):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(self.server.getsockname())
            self.waiting.append(one)
        address: tuple[str, int] = self.server.getsockname()
        return address

    def __exit__(self, *_: object) -> None:
        for one in (*self.waiting, self.server):
            one.close()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "x"), "box (127.0.0.1) port 22 refuses"),
        (TimeoutError("timed out"), "box (127.0.0.1) port 22 does not answer"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"),
         "box (127.0.0.1) port 22 cannot be reached (network is unreachable)"),
    ],
)  # fmt: skip
def test_the_sentences(monkeypatch: pytest.MonkeyPatch, error: OSError, sentence: str):
    class Socket(socket.socket):
        def connect(self, address: object) -> None:
            raise error

    named(monkeypatch, ("127.0.0.1", 22))
    monkeypatch.setattr(module.socket, "socket", Socket)
    with pytest.raises(ConnectFailure) as caught:
        dial("box", 22, 1)
    assert caught.value.what.startswith(sentence)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["no.such.invalid", "a" * 300, "\udcff"])
def test_no_address_of_a_name(name: str):
    with pytest.raises(ConnectFailure, match="no address is found for"):
        dial(name, 22, 1)


def slow_and_dead(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], threading.Event]:
    """Opening machines is replaced: "dead" fails at once, "slow" when the event is set."""
    closed: list[str] = []
    event = threading.Event()

    class Opened:
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            closed.append(self.name)

    def open_one(spec: HostSpec, **_: object) -> Opened:
        if spec.name.startswith("dead"):
            raise HostError(spec.name, "does not answer")
        if spec.name == "slow":
            event.wait(20)
        return Opened(spec.name)

    monkeypatch.setattr(module, "open_machine", open_one)
    return closed, event


def test_every_host_that_fails_is_told(monkeypatch: pytest.MonkeyPatch):
    closed, event = slow_and_dead(monkeypatch)
    event.set()
    names = ["a", "dead1", "slow", "dead2"]
    with pytest.raises(HostErrors) as caught:
        open_machines([HostSpec(name, name) for name in names])
    assert str(caught.value) == "dead1: does not answer\ndead2: does not answer"
    assert sorted(closed) == ["a", "slow"]


def test_ctrl_c_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch):
    closed, event = slow_and_dead(monkeypatch)

    def interrupted(machines, act, what):
        act(machines["a"])
        threading.Thread(target=act, args=(machines["slow"],), name="late").start()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_on_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_machines([HostSpec("a", "a"), HostSpec("slow", "slow")])
    assert closed == ["a"]
    event.set()
    waiting.until(lambda: closed == ["a", "slow"])
