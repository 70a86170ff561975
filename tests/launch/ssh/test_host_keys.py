from __future__ import annotations

import base64
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from smolrun.launch.ssh import host_keys
from smolrun.launch.ssh.host_keys import HostKey, KnownHosts, entry_name

ONE, TWO = HostKey("ssh-ed25519", b"one" * 11), HostKey("ssh-ed25519", b"two" * 11)
RSA = HostKey("ssh-rsa", b"rsa" * 99)
needs_keygen = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")


def text(key: HostKey) -> str:
    return f"{key.kind} {base64.b64encode(key.data).decode()}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "known_hosts"


def test_names_as_openssh_writes_them():
    assert entry_name("Mini1.Local") == "mini1.local"
    assert entry_name("mini1", 2222) == "[mini1]:2222"
    assert entry_name("fe80::1", 22) == "fe80::1"


@pytest.mark.parametrize(
    ("names", "name", "is_about"),
    [
        ("mini1", "mini1", True),
        ("mini1", "mini11", False),
        ("a,mini1,b", "mini1", True),
        ("Mini1", "mini1", True),
        ("*.local", "mini1.local", True),
        ("mini?", "mini1", True),
        ("*.local,!mini1.local", "mini1.local", False),
        ("[mini1]:2222", "[mini1]:2222", True),
        ("[mini1]:2222", "mini1", False),
        ("[mini*]:2222", "[mini1]:2222", True),
        ("m", "[mini1]:2222", False),
    ],
)
def test_patterns(file: Path, names: str, name: str, is_about: bool):
    file.write_text(f"{names} {text(ONE)}\n")
    assert KnownHosts([file]).keys(name) == ([ONE] if is_about else [])


def test_lines_that_say_nothing(file: Path, tmp_path: Path):
    file.write_text(
        f"# {text(ONE)}\n\nmini1\nmini1 ssh-ed25519\nmini1 ssh-ed25519 not!base64\n"
        f"@cert-authority mini1 {text(TWO)}\n  mini1   {text(ONE)} a comment\n|1|bad mini1 x\n"
    )
    assert KnownHosts([tmp_path / "absent", file]).keys("mini1") == [ONE]


def test_bytes_that_are_no_text(file: Path):
    file.write_bytes(b"\xff\xfe mini0 x\n" + f"mini1 {text(ONE)}\n".encode())
    assert KnownHosts([file]).keys("mini1") == [ONE]


def test_a_revoked_key_is_none(file: Path):
    file.write_text(f"mini1 {text(ONE)}\nmini1 {text(TWO)}\n@revoked * {text(ONE)}\n")
    known = KnownHosts([file])
    assert known.keys("mini1") == [TWO]
    assert known.revoked("mini1") == [ONE]


@needs_keygen
@pytest.mark.parametrize("kind", ["ed25519", "rsa", "ecdsa"])
def test_fingerprints_and_hashed_names_are_those_of_openssh(tmp_path: Path, kind: str):
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", key], check=True)
    told = subprocess.run(["ssh-keygen", "-lf", key], capture_output=True, text=True, check=True)
    file = tmp_path / "known_hosts"
    file.write_text(f"[mini1]:2222 {Path(f'{key}.pub').read_text()}")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", file], check=True, capture_output=True)
    assert "mini1" not in file.read_text()
    (found,) = KnownHosts([file]).keys("[mini1]:2222")
    assert found.fingerprint == told.stdout.split()[1]
    assert KnownHosts([file]).keys("mini1") == []


@needs_keygen
def test_openssh_finds_what_we_add(file: Path):
    key = file.parent / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    kind, data = Path(f"{key}.pub").read_text().split()[:2]
    host_keys.add_entry(file, "[mini1]:2222", HostKey(kind, base64.b64decode(data)))
    found = subprocess.run(
        ["ssh-keygen", "-F", "[mini1]:2222", "-f", file], capture_output=True, text=True
    )
    assert data in found.stdout


def test_adding_to_no_file_makes_one_that_is_private(tmp_path: Path):
    file = tmp_path / ".ssh" / "known_hosts"
    host_keys.add_entry(file, "mini1", ONE)
    assert KnownHosts([file]).keys("mini1") == [ONE]
    if os.name == "posix":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_adding_after_a_line_without_an_end(file: Path):
    file.write_text(f"mini1 {text(ONE)}")
    host_keys.add_entry(file, "mini2", TWO)
    assert KnownHosts([file]).keys("mini1") == [ONE]
    assert KnownHosts([file]).keys("mini2") == [TWO]


def test_many_add_at_once_and_nothing_is_lost(file: Path):
    def add(number: int) -> None:
        for turn in range(10):
            host_keys.add_entry(file, f"mini{number}-{turn}", ONE)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    lines = host_keys.read(file)
    assert len({line.names for line in lines}) == 80


def test_forgetting_touches_no_other_line(file: Path):
    before = f"# mine\nmini0 {text(ONE)}\nmini1,mini9 {text(ONE)} note\nmini1 {text(RSA)}\nend"
    file.write_text(before)
    file.chmod(0o640)
    known = KnownHosts([file])
    host_keys.remove_entries([line for line in known.lines if line.is_about("mini1")], "mini1")
    assert file.read_text() == f"# mine\nmini0 {text(ONE)}\nmini9 {text(ONE)} note\nend"
    if os.name == "posix":
        assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert [path.name for path in file.parent.iterdir()] == ["known_hosts"]


def test_forgetting_one_host_of_a_pattern(file: Path):
    file.write_text(f"*.local {text(ONE)}\n")
    host_keys.remove_entries(KnownHosts([file]).lines, "mini1.local")
    known = KnownHosts([file])
    assert known.keys("mini1.local") == []
    assert known.keys("mini2.local") == [ONE]


@needs_keygen
def test_forgetting_a_hashed_name(file: Path):
    file.write_text(f"mini1 {text(ONE)}\nmini2 {text(TWO)}\n")
    hashed = f"|1|{base64.b64encode(b's' * 20).decode()}|"
    import hashlib
    import hmac

    digest = hmac.new(b"s" * 20, b"mini1", hashlib.sha1).digest()
    file.write_text(f"{hashed}{base64.b64encode(digest).decode()} {text(ONE)}\nm2 {text(TWO)}\n")
    known = KnownHosts([file])
    assert known.keys("mini1") == [ONE]
    host_keys.remove_entries(known.where("mini1", ONE), "mini1")
    assert file.read_text() == f"m2 {text(TWO)}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_a_known_hosts_that_is_a_link_stays_one(file: Path):
    real = file.with_name("real")
    real.write_text(f"mini1 {text(ONE)}\n")
    file.symlink_to(real)
    host_keys.remove_entries(KnownHosts([file]).lines, "mini1")
    assert file.is_symlink()
    assert real.read_text() == ""
