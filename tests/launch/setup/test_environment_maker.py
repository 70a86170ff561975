"""An environment is made beside its place and renamed when whole; a log tells all of it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import platformdirs
import pytest

from smolrun.errors import HostError
from smolrun.launch.remote.connection import Completed
from smolrun.launch.setup import environment_maker
from smolrun.launch.setup.environment_maker import EnvironmentMaker, fetch_uv, program_of, wheel_of
from smolrun.launch.setup.setup_plan import CPU_WHEELS, UV_VERSION, BlankHost, Plan

PLAN = Plan(
    host="pi5",
    environment="/w/envs/e",
    python="/usr/bin/python3",
    version="3.11",
    has_pip=True,
    uv="/usr/bin/uv",
    brings_uv=False,
    torch="cpu",
    requirements=("torch>=2.6", "numpy"),
)


class Host:
    """Writes down what it is told; a command with one of `fails` in it fails."""

    workdir = "/w"
    spec = SimpleNamespace(env={"PIP_INDEX_URL": "https://mirror.home"})

    def __init__(self, *fails: str) -> None:
        self.fails = fails
        self.lines: list[str] = []
        self.puts: list[str] = []

    def run(self, argv: list[str], *, env: Any, timeout_s: float) -> Completed:
        assert env == self.spec.env
        line = " ".join(argv)
        self.lines.append(line)
        if any(text in line for text in self.fails):
            return Completed(1, b"", b"\n".join(b"line %d" % n for n in range(20)) + b"\nno room\n")
        return Completed(0, b"fine\n", b"")

    def put(self, source: bytes, path: str) -> None:
        self.puts.append(path)


def make(tmp_path: Path, host: Host, **changes: Any) -> list[str]:
    said: list[str] = []
    plan = Plan(**{**vars(PLAN), **changes})
    EnvironmentMaker(host, BlankHost(), plan, tmp_path / "pi5.log", said.append).make()  # type: ignore[arg-type]
    return said


def steps(host: Host) -> list[str]:
    """The commands that do the work, without those of the shell."""
    return [line for line in host.lines if not line.startswith("sh -c")]


def test_by_uv_with_the_build_of_torch_that_was_planned(tmp_path: Path):
    host = Host()
    said = make(tmp_path, host)
    venv, install = steps(host)
    assert venv.startswith(
        "/usr/bin/uv venv --relocatable --python /usr/bin/python3 /w/envs/.e.part-"
    )
    assert "--torch-backend=cpu torch>=2.6 numpy" in install
    part = venv.split()[-1]
    assert host.lines[-2:] == [
        f"sh -c [ -e /w/envs/e ] || mv {part} /w/envs/e",
        f"sh -c rm -rf {part}",
    ]
    assert said[0] == "pi5: make the environment..." and said[1].endswith(" s")
    assert "fine" in (tmp_path / "pi5.log").read_text()


def test_where_uv_cannot_pip_does_it(tmp_path: Path):
    host = Host("uv pip install")
    said = make(tmp_path, host)
    assert any("uv could not" in line for line in said)
    venv, torch, everything = steps(host)[-3:]
    assert venv.startswith("/usr/bin/python3 -m venv /w/envs/.e.part-")
    # One index for torch alone, another for all else: a name of one is never taken from the other.
    assert "pip install" in torch and f"--no-deps --index-url {CPU_WHEELS} torch>=2.6" in torch
    assert not torch.endswith("numpy")
    assert everything.endswith("torch>=2.6 numpy") and "index-url" not in everything


def test_a_failure_tells_the_last_lines_and_clears_away(tmp_path: Path):
    host = Host("pip install")
    with pytest.raises(HostError) as failure:
        make(tmp_path, host, has_pip=False)
    text = str(failure.value)
    assert text.startswith("pi5: `/usr/bin/uv pip install")
    assert str(tmp_path / "pi5.log") in text
    assert "  | no room" in text and "  | line 3" not in text
    assert host.lines[-1].startswith("sh -c rm -rf /w/envs/.e.part-")
    assert not any("mv " in line for line in host.lines)


def test_a_blank_host_gets_uv_and_a_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment_maker, "fetch_uv", lambda host, found: b"program")
    host = Host()
    make(tmp_path, host, uv=None, brings_uv=True, python=None, version="3.12", has_pip=False)
    assert host.puts == [f"/w/bin/uv-{UV_VERSION}"]
    assert steps(host)[0] == f"/w/bin/uv-{UV_VERSION} python install 3.12"
    assert " --python 3.12 /w/envs/.e.part-" in steps(host)[1]


def test_without_uv_a_python_with_pip_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fetch(host: str, found: BlankHost) -> bytes:
        raise HostError(host, "pip cannot fetch uv for it: offline")

    monkeypatch.setattr(environment_maker, "fetch_uv", fetch)
    host = Host()
    said = make(tmp_path, host, uv=None, brings_uv=True)
    assert any("offline" in line for line in said)
    assert steps(host)[0].startswith("/usr/bin/python3 -m venv")
    with pytest.raises(HostError, match="offline"):
        make(tmp_path, Host(), uv=None, brings_uv=True, has_pip=False)


@pytest.mark.parametrize(
    ("found", "platform"),
    [
        (
            BlankHost(system="linux", architecture="x86_64", libc="glibc 2.36"),
            "manylinux_2_17_x86_64",
        ),
        (BlankHost(system="linux", architecture="x86_64", libc="musl"), "musllinux_1_1_x86_64"),
        (BlankHost(system="linux", architecture="aarch64"), "manylinux_2_17_aarch64"),
        (BlankHost(system="linux", architecture="arm64", libc="musl"), "manylinux_2_17_aarch64"),
        (BlankHost(system="darwin", architecture="arm64"), "macosx_11_0_arm64"),
        (BlankHost(system="darwin", architecture="x86_64"), "macosx_10_12_x86_64"),
    ],
)
def test_every_system_has_a_pinned_wheel(found: BlankHost, platform: str):
    package = wheel_of("pi5", found)
    assert package.platform == platform and platform in package.file
    assert package.version == UV_VERSION and len(package.sha256) == 64


def test_a_system_without_a_pinned_wheel_is_refused():
    with pytest.raises(HostError, match="no uv is pinned") as refusal:
        wheel_of("pi5", BlankHost(system="linux", architecture="riscv64"))
    assert refusal.value.host == "pi5"


def test_another_wheel_of_that_name_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = BlankHost(system="linux", architecture="x86_64", libc="glibc 2.36")
    with zipfile.ZipFile(tmp_path / wheel_of("pi5", found).file, "w") as archive:
        info = f"uv-{UV_VERSION}.dist-info"
        archive.writestr(f"uv-{UV_VERSION}.data/scripts/uv", b"program")
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: uv\nVersion: {UV_VERSION}\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache")
    with pytest.raises(HostError, match="DO NOT MATCH") as refusal:
        fetch_uv("pi5", found)
    assert refusal.value.host == "pi5"
    assert not list((tmp_path / "cache" / "data" / "packages").iterdir())


def test_the_program_is_taken_out_of_the_wheel(tmp_path: Path):
    wheel = tmp_path / "uv-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("uv/__init__.py", "")
        archive.writestr("uv-1.0.data/scripts/uvx", b"other")
        archive.writestr("uv-1.0.data/scripts/uv", b"program")
    assert program_of("pi5", wheel) == b"program"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("uv/__init__.py", "")
    with pytest.raises(HostError, match="no program"):
        program_of("pi5", wheel)
