from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec
import pytest
from cryptography import x509

from smolrun.errors import SmolrunError
from smolrun.launch.nearby.machine_key import MachineKey, fingerprint, is_signed
from smolrun.launch.nearby.remembered import RememberedMachine, RememberedMachines, shown_name

KEY = MachineKey.make().fingerprint


@pytest.fixture
def known(tmp_path: Path) -> RememberedMachines:
    return RememberedMachines(tmp_path / "remembered")


def test_what_is_added_is_there_until_it_is_forgotten(known: RememberedMachines):
    assert known.all() == []
    known.add("joiner", "anna@pi", KEY)
    known.add("coordinator", "bob@mini", KEY)
    assert [(one.role, one.name) for one in known.all()] == [
        ("coordinator", "bob@mini"),
        ("joiner", "anna@pi"),
    ]
    assert known.has("joiner", KEY)
    assert not known.has("joiner", KEY[:-1])
    known.forget(known.all()[1])
    assert not known.has("joiner", KEY)
    assert known.has("coordinator", KEY)
    known.forget(RememberedMachine("joiner", "gone", KEY))  # twice is no error


def test_a_machine_has_one_entry_under_its_newest_name(known: RememberedMachines):
    known.add("joiner", "anna@pi", KEY)
    known.add("joiner", "anna@pi5", KEY)
    assert [one.name for one in known.all()] == ["anna@pi5"]


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_others_cannot_read_the_files(known: RememberedMachines, tmp_path: Path):
    known.add("joiner", "anna@pi", KEY)
    key = tmp_path / "own" / "key.pem"
    MachineKey.load(key)
    files = [*known.folder.iterdir(), key]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600, 0o600]
    assert stat.S_IMODE(known.folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[1]", b'{"role":"root","name":"x","fingerprint":"y"}', b"[" * 4000, b"x" * 9000],
)
def test_what_cannot_be_read_is_not_trusted(known: RememberedMachines, data: bytes):
    known.add("joiner", "anna@pi", KEY)
    (file,) = known.folder.iterdir()
    file.write_bytes(data)
    assert known.all() == []
    assert not known.has("joiner", KEY)


def test_a_file_under_the_name_of_another_machine_is_not_trusted(known: RememberedMachines):
    known.add("joiner", "anna@pi", KEY)
    (file,) = known.folder.iterdir()
    other = RememberedMachine("joiner", "eve", MachineKey.make().fingerprint)
    file.write_bytes(msgspec.json.encode(other))
    assert known.all() == []
    assert not known.has("joiner", KEY)


def test_a_name_that_was_written_by_hand_is_safe_to_show(known: RememberedMachines):
    known.add("joiner", "\x1b[2J\nx", KEY)
    (file,) = known.folder.iterdir()
    file.write_bytes(msgspec.json.encode(RememberedMachine("joiner", "\x1b[31m" * 99, KEY)))
    assert known.all()[0].name.isprintable()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("", "unnamed"),
        ("\n\t ", "unnamed"),
        ("a\x1b]0;x\x07b", "a ]0;x b"),
        ("a\N{RIGHT-TO-LEFT OVERRIDE}b", "a b"),
        ("x" * 99, "x" * 60),
        ("Anna's mini", "Anna's mini"),
        ("미니 1", "미니 1"),
    ],
)
def test_names_of_others(name: str, shown: str):
    assert shown_name(name) == shown


def test_the_key_stays_the_same(tmp_path: Path):
    path = tmp_path / "nearby" / "identity.pem"
    first, second = MachineKey.load(path), MachineKey.load(path)
    assert first.public_key == second.public_key
    assert fingerprint(first.public_key) == first.fingerprint
    assert is_signed(second.public_key, first.sign(b"text"), b"text")
    assert not is_signed(second.public_key, first.sign(b"text"), b"other")
    assert not is_signed(MachineKey.make().public_key, first.sign(b"text"), b"text")


@pytest.mark.parametrize("data", [b"", b"no key", b"x" * 99_999])
def test_a_damaged_key_is_named(tmp_path: Path, data: bytes):
    path = tmp_path / "identity.pem"
    path.write_bytes(data)
    with pytest.raises(SmolrunError, match=r"identity\.pem"):
        MachineKey.load(path)


def test_a_key_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(SmolrunError, match="cannot be read or made"):
        MachineKey.load(tmp_path / "file" / "identity.pem")


def test_a_clock_that_is_wrong_by_years_does_not_matter(tmp_path: Path):
    path = tmp_path / "identity.pem"
    MachineKey.load(path)
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    assert certificate.not_valid_before_utc.year == 1970
    assert certificate.not_valid_after_utc.year == 9999
