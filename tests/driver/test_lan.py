"""serving.bind=lan: names, the link and its code, and who is answered, over real sockets."""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import segno

from smolrun.cli.compose import compose
from smolrun.cli.run import drive
from smolrun.driver import lan
from smolrun.driver.lan import LanNames, lan_names, qr_code, show_link
from smolrun.driver.serving import ServingRun
from smolrun.errors import ConfigError
from smolrun.launch.supervisor_events import RunOutcome
from smolrun.serving.messages import Ready
from smolrun.tracking import api_key as keys
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.run_view import Request, answer
from tests.driver.test_runs import a_server
from tests.ports import free_ports
from tests.tasks.served import model_in


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _own_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys.platformdirs, "user_config_path", lambda _: tmp_path / "config")
    monkeypatch.chdir(tmp_path)


def network(name: str, kind: str, *addresses: str) -> dict[str, Any]:
    return {"name": name, "kind": kind, "speed_mbps": None, "addresses": [*addresses]}


MAC = [
    network("lo0", "loopback", "127.0.0.1/8"),
    network("bridge0", "thunderbolt", "10.10.0.1/24"),
    network("en1", "ethernet", "169.254.7.7/16", "10.20.0.1/24"),
    network("en0", "wifi", "192.168.1.23/24", "fe80::1/64", "fd00::5/64"),
    network("utun4", "vpn", "100.64.0.9/32"),
]


def test_a_link_names_the_interface_that_other_devices_are_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lan, "interfaces", lambda _: {"interfaces": MAC})
    found = dict[str, tuple[str, ...]]()
    for default in ("192.168.1.23", "10.20.0.1", "100.64.0.9"):
        monkeypatch.setattr(lan, "outgoing_address", lambda default=default: default)
        found[default] = lan_names().addresses
    assert found["192.168.1.23"] == found["100.64.0.9"] == ("192.168.1.23", "10.20.0.1")
    assert found["10.20.0.1"] == ("10.20.0.1", "192.168.1.23")
    monkeypatch.setattr(lan, "interfaces", lambda _: {"interfaces": [MAC[0], MAC[1], MAC[4]]})
    with pytest.raises(ConfigError, match=r"serving\.bind = lan: .* has no address in a network"):
        lan_names()


def test_only_a_name_that_the_system_announces_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lan, "interfaces", lambda _: {"interfaces": MAC})
    monkeypatch.setattr(lan, "_AVAHI", avahi := tmp_path / "socket")
    monkeypatch.setattr(platform, "node", lambda: "Pi5.fritz.box")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    assert lan_names().announced is None
    avahi.touch()
    assert lan_names().announced == "pi5.local"
    monkeypatch.setattr(platform, "system", lambda: "Darwin")  # the name differs from node()
    monkeypatch.setattr(lan, "run", lambda *_: "Studio-2")
    names = lan_names()
    assert names.urls(7665)[0] == "http://studio-2.local:7665"
    assert any("Python may accept incoming connections" in line for line in names.notes(7665))
    monkeypatch.setattr(lan, "run", lambda *_: None)
    assert lan_names().announced is None


def test_a_public_address_is_warned_of() -> None:
    assert not any("warning" in line for line in LanNames(("192.168.1.5",), None).notes(1))
    warning = [*LanNames(("8.8.4.4",), None).notes(1)][-1]
    assert warning.startswith("warning: 8.8.4.4 is a public address")


LINK = "http://studio.local:7665/#key=Jkye_INeKugewF1-paoCtpQn9fE9plnx5D9SdJ2R4Gs"


def test_the_blocks_are_the_modules_of_the_code() -> None:
    lines = qr_code(LINK).split("\n")
    halves = {"█": (0, 0), "▀": (0, 1), "▄": (1, 0), " ": (1, 1)}
    rows = [[halves[c][half] for c in line] for line in lines for half in (0, 1)]
    expected = [[*row] for row in segno.make(LINK, error="l").matrix_iter(border=2)]
    assert rows[: len(expected)] == expected and len(expected) < 48
    assert all(not any(row[:2]) for row in rows)  # the quiet zone is light


def test_a_terminal_that_is_too_narrow_says_what_would_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    show_link(LINK)
    assert capsys.readouterr().out == f"{LINK}\n{qr_code(LINK)}\n"
    monkeypatch.setenv("COLUMNS", "30")
    show_link(LINK)
    said = capsys.readouterr().out
    assert (
        said
        == f"{LINK}\n(a terminal of {qr_code(LINK).index(chr(10))} columns shows a QR code of it)\n"
    )
    monkeypatch.setattr("sys.stdout", narrow := io.TextIOWrapper(io.BytesIO(), "ascii"))
    monkeypatch.setenv("COLUMNS", "200")
    show_link(LINK)
    assert narrow.buffer.getvalue().decode() == f"{LINK}\n"


def lan_address() -> str:
    """An address of this machine as other devices would use it; in a container without a network
    that of the loopback interface."""
    found = [one.address for rows in psutil.net_if_addrs().values() for one in rows]
    numbers = [one for one in found if one.count(".") == 3 and not one.startswith("127.")]
    return numbers[0] if numbers else "127.0.0.1"


@contextmanager
def listening(
    monkeypatch: pytest.MonkeyPatch, model: Path, port: int, *overrides: str
) -> Iterator[ServingRun]:
    """The HTTP side of a server of the LAN; no rank is started."""
    names = LanNames((lan_address(),), "studio.local")
    monkeypatch.setattr("smolrun.driver.serving.lan_names", lambda: names)
    words = ["task=serve", "model=hf", f"model.name={model}", "serving.bind=lan", *overrides]
    config = compose([*words, f"serving.port={port}"])
    with ServingRun(config, lambda _: None, lambda *_: None) as run:
        yield run


def test_the_lan_is_answered_by_its_names_with_the_key_alone(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    with listening(monkeypatch, model, port, "serving.allowed_hosts=[nas.example]") as run:
        assert run.url == f"http://studio.local:{port}"
        place = f"http://{lan_address()}:{port}"
        key = {"authorization": f"Bearer {keys.api_key()[0]}"}

        def ask(path: str = "/v1/models", **headers: str) -> httpx.Response:
            return httpx.get(f"{place}{path}", headers=headers)

        assert ask().status_code == 401
        assert ask(authorization="Bearer wrong").status_code == 401
        assert ask(**key).status_code == 200  # by the address that it came to
        known = ("studio.local", "STUDIO.local", "localhost", "nas.example", platform.node())
        for name in known:
            assert ask(**key, host=f"{name}:{port}").status_code == 200, name
        for name in ("evil.example", "studio.local.evil.example", "203.0.113.9", "*"):
            refused = ask(**key, host=f"{name}:{port}")
            assert refused.json()["error"]["code"] == "host_not_allowed", name
        page = ask("/", host=f"studio.local:{port}")  # it asks a person for the key
        assert page.status_code == 200 and "text/html" in page.headers["content-type"]
        own = {"host": f"studio.local:{port}", "origin": f"http://studio.local:{port}"}
        assert ask(**key, **own).status_code == 200
        foreign = ask(**key, origin="http://evil.example")
        assert foreign.json()["error"]["code"] == "origin_not_allowed"


def test_key_and_port_survive_a_restart_and_a_port_that_is_taken_is_named(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    links = []
    for _ in range(2):
        with listening(monkeypatch, model, port) as run:
            links.append(keys.link(run.url))
            if len(links) == 2:
                with (
                    pytest.raises(ConfigError, match=r"listens there.*; end that process, or set"),
                    listening(monkeypatch, model, port),
                ):
                    pass
    assert links[0] == links[1] and "#key=" in links[0]
    assert keys.api_key_file().stat().st_mode & 0o077 == 0 or platform.system() == "Windows"


def test_a_key_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    if platform.system() == "Windows":
        pytest.skip("Windows has other permissions")
    keys.api_key_file().parent.mkdir()
    keys.api_key_file().write_text("by+hand/\n")
    keys.api_key_file().chmod(0o644)
    assert keys.link("http://studio.local:1") == "http://studio.local:1/#key=by%2Bhand%2F"
    assert keys.api_key_file().stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_key_goes_to_a_terminal_and_to_no_log(
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_terminal: bool,
) -> None:
    def serve(run: ServingRun, folder: RunFolder, *, on_ready: Any, **_: object) -> RunOutcome:
        on_ready(Ready(64, 512, 8))
        return RunOutcome("stopped", 130)

    key, _ = keys.api_key()
    monkeypatch.setattr(ServingRun, "serve", serve)
    monkeypatch.setattr(
        "smolrun.driver.serving.lan_names", lambda: LanNames(("192.0.2.7",), "studio.local")
    )
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    monkeypatch.setenv("TERM", "dumb")
    words = ["task=serve", "model=hf", f"model.name={model}", "serving.port=0", "serving.bind=lan"]
    assert drive(compose(words)) == 130
    out, err = capsys.readouterr()
    assert (key in out, key in err) == (is_terminal, False)
    assert ("█" in out) == is_terminal
    assert ("shows its QR code: smolrun task=attach" in out) != is_terminal
    assert "from other devices of this network: http://studio.local:" in out
    (run,) = (tmp_path / "outputs").glob("2*")
    assert json.loads((run / "summary.json").read_text())["bind"] == "lan"
    written = [file for file in (tmp_path / "outputs").rglob("*") if file.is_file()]
    assert written and not any(key.encode() in file.read_bytes() for file in written)


def test_attach_shows_the_link_again_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "http://studio.local:7665"
    server = a_server(tmp_path, "20260131-142502-serve-x-bbbb", url)
    here = str(server.path)
    assert answer(Request(here, link=True)).link is None  # it is for this machine alone
    server.write_summary({"status": "serving", "url": url, "bind": "lan"})
    key, _ = keys.api_key()
    assert answer(Request(here)).link is None
    assert answer(Request(here, link=True)).link == f"{url}/#key={key}"
    monkeypatch.setattr("smolrun.tasks.attach.Show.follow", lambda *_: 0)
    monkeypatch.setenv("TERM", "dumb")
    for is_terminal in (False, True):
        monkeypatch.setattr("sys.stdout.isatty", lambda value=is_terminal: value)
        assert drive(compose(["task=attach", f"attach.run={server.run_id}"])) == 0
        assert (f"{url}/#key={key}" in capsys.readouterr().out) == is_terminal
    server.write_summary({"status": "stopped", "url": url, "bind": "lan"})
    assert answer(Request(here, link=True)).link is None
