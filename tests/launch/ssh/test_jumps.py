"""Hosts behind jump hosts and proxy commands."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smolrun.launch.doctor.system_ssh import parsed
from smolrun.launch.remote.machine import HostSpec
from smolrun.launch.ssh.connect import _route, connect, scan
from tests import waiting
from tests.launch.ssh.server import Server
from tests.launch.ssh.test_connect import refused, took


def two_hosts(server: Server, *lines: str) -> None:
    server.configure(*lines, first="")
    server.config.write_text(
        f"Host gate\n  HostName 127.0.0.1\n  Port {server.port}\n" + server.config.read_text()
    )


def test_through_a_jump_host(server: Server):
    two_hosts(server, "ProxyJump gate")
    connection = connect(HostSpec("box", "box", ssh_config=str(server.config)))
    assert connection.run("echo hello").out == b"hello\n"
    assert connection.address is None
    connection.close()


def test_several_jumps_are_taken_in_their_order(server: Server):
    server.config.write_text(
        "Host first\n  HostName 127.0.0.1\n"
        "Host second\n  HostName localhost\n"
        "Host box\n  HostName 127.0.0.1\n  ProxyJump first,second\n"
        f"Host *\n  Port {server.port}\n  IdentityFile {server.user_key}\n"
        f"  UserKnownHostsFile {server.known_hosts}\n  GlobalKnownHostsFile none\n"
    )
    found = scan(HostSpec("box", "box", ssh_config=str(server.config)))
    # localhost is not in known_hosts, so nothing behind it can be looked at.
    assert [(one.name, one.state) for one in found] == [
        ("127.0.0.1 (jump host)", "known"),
        ("localhost (jump host)", "new"),
    ]


def test_a_jump_host_that_is_not_known(server: Server):
    two_hosts(server, "ProxyJump gate", "HostKeyAlias box")
    server.known_hosts.write_text("")
    assert "box: on the way to it, the SSH key of 127.0.0.1" in refused(server)


def test_a_jump_host_that_cannot_go_on(server: Server):
    two_hosts(server, "ProxyJump gate")
    server.config.write_text(server.config.read_text().replace(f"Port {server.port}", "Port 1", 2)
                             .replace("Port 1", f"Port {server.port}", 1))  # fmt: skip
    assert "the jump host cannot reach 127.0.0.1 port 1" in refused(server)


def test_a_wildcard_jump_does_not_jump_to_itself(server: Server):
    two_hosts(server)
    server.config.write_text("Host *\n  ProxyJump gate\n" + server.config.read_text())
    connect(HostSpec("box", "box", ssh_config=str(server.config))).close()


def test_no_jump_by_the_word_none(server: Server):
    server.configure("ProxyJump none", "ProxyCommand none")
    connect(HostSpec("box", "box", ssh_config=str(server.config))).close()


RELAY = """
import os, socket, sys, threading
there = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
def back():
    while data := there.recv(65536):
        os.write(1, data)
    os._exit(0)
threading.Thread(target=back).start()
while data := os.read(0, 65536):
    there.sendall(data)
os._exit(0)
"""


def test_through_a_proxy_command(server: Server, tmp_path: Path):
    (tmp_path / "relay.py").write_text(RELAY)
    server.configure(f"ProxyCommand {sys.executable} {tmp_path}/relay.py %p")
    connection = connect(HostSpec("box", "box", ssh_config=str(server.config)))
    assert len(connection.run("cat", data=b"x" * 300_000).out) == 300_000
    assert connection.address is None
    connection.close()


def test_a_proxy_command_that_fails(server: Server):
    server.configure("ProxyCommand /no/such/program %h")
    sentence = refused(server)
    assert "its ProxyCommand reaches no SSH server (No such file or directory)" in sentence
    assert sentence.endswith("try it by hand: /no/such/program 127.0.0.1")
    (server.folder / "fails.sh").write_text("echo no way >&2; exit 7")
    server.configure(f"ProxyCommand sh {server.folder}/fails.sh")
    assert "it ended with exit code 7: no way" in refused(server)
    # It ends later, and something it left running holds its pipe open.
    (server.folder / "fails.sh").write_text("sleep 50 > /dev/null & sleep 0.4; echo no >&2; exit 7")
    sentence, seconds = took(lambda: refused(server, timeout_s=50))
    assert "it ended with exit code 7: no)" in sentence
    assert seconds < waiting.SOON_S
    server.configure("ProxyCommand sleep 50")
    sentence, seconds = took(lambda: refused(server, timeout_s=1))
    assert "no answer within 1 s" in sentence
    assert seconds < waiting.SOON_S


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("Host pi1\n  ProxyCommand none\nHost *\n  ProxyJump jumphost\n", None),
        ("Host pi1\n  ProxyCommand nc %h 22\nHost *\n  ProxyJump jumphost\n", "nc pi1 22"),
        ("Host pi1\n  ProxyJump none\nHost *\n  ProxyCommand nc %h 22\n", "nc pi1 22"),
        ("Host pi1\n  ProxyJump a\nHost *\n  ProxyCommand nc %h 22\n", ["a"]),
        ("Host pi1\n  ProxyJump a\nHost *\n  ProxyJump b\n", ["a"]),
        ("Host pi1\n  ProxyJump none\nHost *\n  ProxyJump b\n", None),
        ("Host pi1\n  ProxyJump none\n  ProxyJump a\n", None),
        ("Host pi1\n  ProxyCommand nc %h 1\n  ProxyCommand none\n  ProxyJump a\n", "nc pi1 1"),
        ("Host other\n  ProxyCommand none\nHost *\n  ProxyJump a\n", ["a"]),
        ("Host *\n  ProxyCommand=none\nMatch host pi1\n  ProxyJump a\n", None),
        ("Host *\n  ProxyCommand None\n  Port 22\n", None),
        ("Host pi1\n  Port 22\n", None),
    ],
)
def test_the_first_of_proxyjump_and_proxycommand_counts(
    tmp_path: Path, lines: str, expected: str | list[str] | None
):
    """As the system's ssh has it, which is asked too where there is one."""
    file = tmp_path / "ssh_config"
    file.write_text(lines)
    *jumps, host = _route(HostSpec("pi1", "pi1", ssh_config=str(file)))
    # A jump host may have a ProxyJump of its own.
    way = host.proxy_command or [hop.settings.host for hop in jumps[-1:]] or None
    assert way == expected
    if (ssh := shutil.which("ssh")) is not None:
        command = [ssh, "-F", str(file), "-G", "pi1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        said = parsed(done.stdout)
        theirs = said["proxyjump"] if "proxyjump" in said else said.get("proxycommand", [None])[0]
        # ssh -G shows %h as it stands.
        assert theirs == (expected.replace("pi1", "%h") if isinstance(expected, str) else expected)
