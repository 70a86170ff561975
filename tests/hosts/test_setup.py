"""task=setup on hosts without environment or key; with one tiny library instead of ours."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from smolrun.cli.compose import compose
from smolrun.config import RunConfig
from smolrun.driver.fleet import host_specs
from smolrun.errors import HostError
from smolrun.launch.delivery.versions import environment_name
from smolrun.launch.setup import environment_maker
from smolrun.tasks.setup import Setup
from tests.hosts.conftest import Maker
from tests.hosts.lab import Lab

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(150)]

TINY = "smolrun-tiny==1.0"


@pytest.fixture
def index(tmp_path: Path) -> dict[str, str]:
    """Variables that make pip and uv find one small library, and look nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "smolrun_tiny-1.0.dist-info"
    with zipfile.ZipFile(folder / "smolrun_tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("smolrun_tiny.py", "answer = 42\n")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: smolrun-tiny\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}


@pytest.fixture(autouse=True)
def _no_uv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fetch(host: str, found: object) -> bytes:
        raise HostError(host, "no uv in tests")

    monkeypatch.setattr(environment_maker, "fetch_uv", fetch)
    monkeypatch.chdir(tmp_path)


def composed(lab: Lab, folder: Path, env: dict[str, str], **keys: object) -> RunConfig:
    host_keys = {host.name: {"python": None, "env": env, **keys} for host in lab.hosts}
    lab.write_cluster(folder / "conf", "lab", host_keys=host_keys)
    return compose(["cluster=lab", "task=setup"])


def environment(lab: Lab, number: int, requirement: str = TINY) -> Path:
    return lab.hosts[number].workdir / "envs" / environment_name([requirement])


def test_a_blank_host_is_made_ready_once(
    make_lab: Maker,
    tmp_path: Path,
    index: dict[str, str],
    capsys: pytest.CaptureFixture[str],
):
    lab = make_lab(hosts=2)
    config = composed(lab, tmp_path, index)
    assert Setup(config, host_specs(config), requirements=[TINY]).run() == 0
    said = capsys.readouterr().out
    assert said.index("lab2: this will be done:") < said.index("lab1: make the environment: ")
    for number in (0, 1):
        python = environment(lab, number) / "bin" / "python"
        told = lab.hosts[number].run(str(python), "-c", "import smolrun_tiny as t; print(t.answer)")
        assert told == "42\n"
        assert [path.name for path in python.parents[2].iterdir()] == [environment_name([TINY])]
    assert "smolrun-tiny" in (tmp_path / "outputs" / "setup" / "lab1.log").read_text()

    made_at = environment(lab, 0).stat().st_mtime_ns
    assert Setup(config, host_specs(config), requirements=[TINY]).run() == 0
    assert "lab1: nothing to do\nlab2: nothing to do\n" in capsys.readouterr().out
    assert environment(lab, 0).stat().st_mtime_ns == made_at


def test_a_step_that_fails_is_told_with_its_last_lines_and_leaves_nothing(
    make_lab: Maker,
    tmp_path: Path,
    index: dict[str, str],
    capsys: pytest.CaptureFixture[str],
):
    lab = make_lab(hosts=1)
    config = composed(lab, tmp_path, index)
    missing = "smolrun-nowhere==9"
    assert Setup(config, host_specs(config), requirements=[missing]).run() == 3
    said = capsys.readouterr().err
    assert "lab1: `" in said
    assert "No matching distribution found for smolrun-nowhere" in said
    assert list((lab.hosts[0].workdir / "envs").iterdir()) == []


def test_a_host_without_our_key_asks_once_for_the_password(
    make_lab: Maker,
    tmp_path: Path,
    index: dict[str, str],
    capsys: pytest.CaptureFixture[str],
):
    lab = make_lab(hosts=1)
    (host,) = lab.hosts
    host.stop_sshd()
    host.start_sshd(
        PasswordAuthentication="yes",
        PermitRootLogin="yes",
        AuthorizedKeysFile=".ssh/authorized_keys",
    )
    hashed = host.run("openssl", "passwd", "-6", "open sesame").strip()
    host.run("sh", "-c", 'printf "root:%s:20000:0:99999:7:::\\n" "$1" > /etc/shadow', "sh", hashed)
    config = composed(lab, tmp_path, index)
    asked: list[str] = []

    def answer(who: str) -> str:
        asked.append(who)
        return "open sesame"

    specs = host_specs(config)
    assert Setup(config, specs, requirements=[TINY], ask_password=answer).run() == 0
    assert asked == ["lab1"]
    file = host.home / ".ssh" / "authorized_keys"
    kind_and_key = " ".join(lab.key.with_suffix(".pub").read_text().split()[:2])
    assert file.read_text() == f"{kind_and_key}\n"
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    out, err = capsys.readouterr()
    assert "lab1: the key is added" in out
    assert "open sesame" not in out + err

    assert Setup(config, specs, requirements=[TINY], ask_password=answer).run() == 0
    assert len(asked) == 1
    assert "lab1: nothing to do" in capsys.readouterr().out


def test_where_nobody_can_be_asked_the_command_is_told(
    make_lab: Maker,
    tmp_path: Path,
    index: dict[str, str],
    capsys: pytest.CaptureFixture[str],
):
    lab = make_lab(hosts=2)
    lab.authorize(lab.hosts[1])
    config = composed(lab, tmp_path, index)
    assert Setup(config, host_specs(config), requirements=[TINY]).run() == 3
    out, err = capsys.readouterr()
    assert f"ssh-copy-id -i {lab.key}.pub lab2" in err
    assert "lab1: ready" in out  # the other one is set up all the same
    assert not (lab.hosts[1].workdir / "envs").exists()


def test_a_python_of_the_users_own_is_only_checked(
    make_lab: Maker,
    tmp_path: Path,
    index: dict[str, str],
    capsys: pytest.CaptureFixture[str],
):
    lab = make_lab(hosts=1)
    config = composed(lab, tmp_path, index, python=lab.hosts[0].python)
    assert Setup(config, host_specs(config), requirements=["numpy>=2"]).run() == 0
    assert "has all that is needed; nothing to do" in capsys.readouterr().out
    assert Setup(config, host_specs(config), requirements=[TINY]).run() == 3
    assert f"{lab.hosts[0].python} -m pip install smolrun-tiny" in capsys.readouterr().err
    assert not (lab.hosts[0].workdir / "envs").exists()
