from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import psutil
import pytest

from smolrun.errors import HostError
from smolrun.launch.remote.machine import HostSpec
from smolrun.launch.ssh import files
from smolrun.launch.ssh.connection import SshConnection
from tests.launch.ssh.server import ssh_server

MIB = 1 << 20


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A folder of the host, which is this machine."""
    (tmp_path / "there").mkdir()
    return tmp_path / "there"


@pytest.mark.parametrize("size", [0, 1, 32768, 5 * MIB + 1])
def test_there_and_back(box: SshConnection, tmp_path: Path, there: Path, size: int):
    data = hashlib.shake_128(b"x").digest(size)
    source = tmp_path / "source"
    source.write_bytes(data)
    sent: list[int] = []
    got: list[int] = []
    box.put(source, f"{there}/it's a file", sent.append)
    box.get(f"{there}/it's a file", tmp_path / "back", got.append, most_bytes=size)
    assert (tmp_path / "back").read_bytes() == data
    assert sum(sent) == sum(got) == size
    assert min([*sent, *got, 1]) > 0
    assert [path.name for path in there.iterdir()] == ["it's a file"]


def test_bytes_in_place_of_what_was_there(box: SshConnection, there: Path):
    box.put(b"old", f"{there}/file")
    box.put(b"new", f"{there}/file")
    assert (there / "file").read_bytes() == b"new"


def test_a_folder_that_is_not_there(box: SshConnection, tmp_path: Path):
    with pytest.raises(HostError, match=r"box: could not write .*/no/file: No such file"):
        box.put(b"x", f"{tmp_path}/no/file")
    with pytest.raises(HostError, match=r"box: could not read .*/no/file: No such file"):
        box.get(f"{tmp_path}/no/file", tmp_path / "back", most_bytes=1)
    assert list(tmp_path.iterdir()) == []
    assert box.run("echo well").out == b"well\n"


def test_a_source_that_is_not_here(box: SshConnection, tmp_path: Path, there: Path):
    with pytest.raises(HostError, match="No such file"):
        box.put(tmp_path / "nothing", f"{there}/file")
    assert list(there.iterdir()) == []


def test_half_a_file_is_no_file(box: SshConnection, tmp_path: Path, there: Path):
    (tmp_path / "source").write_bytes(b"x" * MIB)

    def break_off(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        box.put(tmp_path / "source", f"{there}/file", break_off)
    assert list(there.iterdir()) == []
    box.put(tmp_path / "source", f"{there}/file")
    with pytest.raises(KeyboardInterrupt):
        box.get(f"{there}/file", tmp_path / "back", break_off, most_bytes=MIB)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "there"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_a_full_disk(box: SshConnection, tmp_path: Path):
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    client = box._files
    with pytest.raises(HostError, match="often is a full disk"), client._session("write x") as sftp:
        sftp.putfo(__import__("io").BytesIO(b"x" * MIB), str(full))
    box.put(b"x", f"{tmp_path}/well")


@pytest.mark.soak
def test_a_large_file_does_not_fill_the_memory(box: SshConnection, tmp_path: Path, there: Path):
    size = 150 * MIB
    with (tmp_path / "source").open("wb") as file:
        file.truncate(size)
    before = psutil.Process().memory_info().rss
    most = 0

    def measure(count: int) -> None:
        nonlocal most
        most = max(most, psutil.Process().memory_info().rss - before)

    box.put(tmp_path / "source", f"{there}/file", measure)
    box.get(f"{there}/file", tmp_path / "back", measure, most_bytes=size)
    assert (tmp_path / "back").stat().st_size == size
    assert most < 60 * MIB


def test_a_file_that_is_larger_than_was_promised_is_not_fetched(
    box: SshConnection, tmp_path: Path, there: Path
):
    (there / "file").write_bytes(b"x" * 11)
    with pytest.raises(HostError, match="has 11 bytes, at most 10 were expected") as caught:
        box.get(f"{there}/file", tmp_path / "back", most_bytes=10)
    assert caught.value.host == "box"
    assert os.listdir(tmp_path) == ["there"]


def test_a_server_that_answers_with_more_than_was_asked_for_fills_no_disk(tmp_path: Path):
    class Generous:
        """An SFTP client whose server sends a MiB for each block."""

        def open(self, path: str, mode: str) -> Generous:
            return self

        def __enter__(self) -> Generous:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def readv(self, places: list[tuple[int, int]]) -> list[bytes]:
            return [b"x" * MIB for _ in places]

    with (tmp_path / "back").open("wb") as file:
        assert not files._read(Generous(), "file", 10, file, None)  # type: ignore[arg-type]
        assert file.tell() == 0


def test_a_server_without_sftp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from smolrun.launch.ssh.connect import connect

    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with ssh_server(tmp_path, "Subsystem sftp /bin/false") as server:
        connection = connect(HostSpec("box", "box", ssh_config=str(server.config)))
        with pytest.raises(HostError, match=r"offers no SFTP.*Subsystem sftp internal-sftp"):
            connection.put(b"x", str(tmp_path / "file"))
        connection.close()


def test_after_the_end_of_the_connection(box: SshConnection, tmp_path: Path, there: Path):
    box.put(b"x", f"{there}/file")
    box.close()
    with pytest.raises(HostError, match="the SSH connection was lost"):
        box.get(f"{there}/file", tmp_path / "back", most_bytes=1)
    assert os.listdir(tmp_path) == ["there"]
