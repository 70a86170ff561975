"""task=doctor on this machine, its texts, and what it writes into a cluster file."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from smolrun.cli.compose import compose
from smolrun.driver import doctor_text, doctor_write
from smolrun.driver.doctor_hosts import HostReports, with_hosts
from smolrun.errors import ConfigError
from smolrun.launch.doctor import links
from smolrun.launch.doctor.findings import Finding
from smolrun.launch.doctor.host_report import HostReport

HOME = """\
# At home
name: home
hosts:
  - {name: mini1, ssh: mini1.local, address: 192.168.1.1}   # kitchen
  - name: pi5
    ssh: pi@pi5.local
    address: pi5.local   # whatever the router says
    memory_gb: 6         # of its 8
    device: cpu
"""


def facts(os: str, memory: float, flops: float) -> dict[str, Any]:
    folder = {"path": "/w", "found": "/w", "free": 50e9, "is_folder": True, "is_writable": True}
    system = {"os": os, "system": "Debian GNU/Linux 12 (bookworm)", "arch": "arm64", "bits": 64}
    system |= {"user": "anna", "model": "Mac", "cpu": "M4", "cores": 8, "usable_cores": 8}
    system |= {"memory_total": memory, "memory_available": 1e9, "gpus": [], "folder": folder}
    packages = {"torch": "2.9.0"}
    environment = {"python": "3.12.1", "packages": packages, "cuda": False, "mps": os == "darwin"}
    score = {"flops": flops, "memory_bytes_per_s": flops, "device": "cpu"}
    interfaces = [{"name": "en0", "kind": "ethernet", "speed_mbps": 1000.0, "addresses": []}]
    return {
        "system": system,
        "environment": environment | {"score": score},
        "clock": {"offset_s": 0.5, "uncertain_s": 0.1},
        "network": {"interfaces": interfaces},
    }


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostReports:
    """Two hosts that were looked at; the first has a Thunderbolt cable."""
    file = tmp_path / "conf" / "cluster" / "home.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(HOME)
    monkeypatch.chdir(tmp_path)
    made = HostReports.of(compose(["cluster=home", "task=doctor"]))
    made.by_host = {
        "mini1": HostReport("mini1", facts("darwin", 17.1e9, 4e12), []),
        "pi5": HostReport("pi5", facts("linux", 8.2e9, 1e11), [Finding("warning", "hot", "a fan")]),
    }
    cable = links.NetworkInterface("bridge0", "thunderbolt", None, ("10.10.0.1/24",))
    lan = links.NetworkInterface("en0", "ethernet", 1000.0, ("192.168.1.1/24",))
    made.places = {
        "mini1": links.HostAddresses("mini1", ("192.168.1.1",), (lan, cable)),
        "pi5": links.HostAddresses("pi5", ("192.168.1.5",), ()),
    }
    rows = [
        {"address": address, "error": None, "local": ""} for address in ("192.168.1.1", "10.10.0.1")
    ]
    made.reach = {
        "mini1": {
            "dialed": {"pi5": [{"address": "192.168.1.5", "error": None, "local": "192.168.1.1"}]}
        },
        "pi5": {"dialed": {"mini1": rows}},
    }
    made.routes = links.routes(made.places, made.reach)
    made.links = [{"from": "mini1", "to": "pi5", "rtt_s": 0.0004, "bytes_per_s": 117e6}]
    return made


def test_the_report_has_a_table_that_fits_and_a_command_for_each_finding(
    reports: HostReports, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    doctor_text.report(reports)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 100
    assert "Debian 12 arm64" in said
    assert "mini1: fine" in said and "pi5: usable, but hot" in said
    assert "! hot\n      -> a fan" in said
    assert "0.40 ms" in said and "936.0 Mbit/s" in said and "Ethernet (en0, 1,000 Mbit/s)" in said


def test_the_table_fits_80_columns_too(reports: HostReports):
    out = io.StringIO()
    Console(file=out, width=80).print(doctor_text._hosts(reports))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "mini1" in out.getvalue() and "usable" in out.getvalue()


def test_the_document_is_plain_json(reports: HostReports):
    told = json.loads(json.dumps(doctor_text.document(reports, 0)))
    assert [host["name"] for host in told["hosts"]] == ["mini1", "pi5"]
    assert told["hosts"][1]["status"]["findings"][0]["hint"] == "a fan"
    assert told["links"][0]["over"] == "Ethernet (en0, 1,000 Mbit/s)"


def test_a_report_for_a_bug_has_no_names_of_people_and_no_secrets(reports: HostReports):
    facts = reports.by_host["mini1"].facts
    facts["system"] |= {"hostname": "Annas-Mac.local", "model": "annals, of anna"}
    facts["network"]["interfaces"][0]["addresses"] = ["192.168.1.1/24", "2600:1f18::1/64"]
    secret = {"HTTPS_PROXY": "http://anna:geheim@proxy", "STYLE": "private"}
    hosts = [
        host.model_copy(update={"env": secret, "ssh": "anna@mini1.local"})
        for host in reports.config.cluster.hosts or []
    ]
    cluster = reports.config.cluster.model_copy(update={"hosts": hosts})
    config = reports.config.model_copy(update={"cluster": cluster})
    file = doctor_write.write_report(doctor_text.document(reports, 0), config)
    assert file == Path("outputs/doctor-report.md")
    text = file.read_text()
    for word in ("geheim", "private", "Annas-Mac", " anna", '"anna"', "2600:"):
        assert word not in text, word
    assert "annals, of ***" in text
    told = json.loads(text.partition("```json")[2].partition("```")[0])
    assert told["config"]["hosts"][0]["ssh"] == "***@mini1.local"
    assert told["hosts"][0]["network"]["interfaces"][0]["addresses"] == ["192.168.1.1/24", "***/64"]
    assert told["hosts"][1]["status"]["findings"][0]["hint"] == "a fan"


def test_what_is_missing_is_written_and_what_you_wrote_stays(reports: HostReports):
    said: list[str] = []
    doctor_write.write(reports, said.append)
    file = Path("conf/cluster/home.yaml")
    mini, pi = yaml.safe_load(file.read_text())["hosts"]
    assert mini == {
        "name": "mini1",
        "ssh": "mini1.local",
        "address": ["10.10.0.1", "192.168.1.1"],
        "os": "darwin",
        "device": "mps",
        "memory_gb": 11.9,  # all but a quarter
    }
    assert pi == {
        "name": "pi5",
        "ssh": "pi@pi5.local",
        "address": "pi5.local",
        "memory_gb": 6,
        "device": "cpu",
        "os": "linux",
        "speed": 0.03,
    }
    assert "# kitchen" in file.read_text() and "# of its 8" in file.read_text()
    assert Path("conf/cluster/home.yaml.bak").read_text() == HOME
    assert any(line.startswith("+  - {name: mini1") for line in said)
    again = HostReports.of(compose(["cluster=home", "task=doctor"]))
    again.by_host, again.places, again.reach = reports.by_host, reports.places, reports.reach
    doctor_write.write(again, said.append)
    assert "nothing to change" in said[-1]


def speeds(reports: HostReports) -> dict[str, float]:
    return {
        name: keys["speed"] for name, keys in doctor_write.news(reports).items() if "speed" in keys
    }


def test_a_speed_is_written_where_all_were_measured_and_nobody_knows_better(reports: HostReports):
    assert speeds(reports) == {"pi5": 0.03}
    reports.hosts["mini1"] = reports.hosts["mini1"].model_copy(update={"ranks": 2})
    assert speeds(reports) == {"pi5": 0.05}, "half of the fastest host is a rank's"
    reports.hosts["pi5"] = reports.hosts["pi5"].model_copy(update={"speed": 0.048})
    assert speeds(reports) == {}, "two trials differ by as much"
    reports.hosts["pi5"] = reports.hosts["pi5"].model_copy(update={"speed": "auto"})
    assert speeds(reports) == {}
    reports.hosts["pi5"] = reports.hosts["pi5"].model_copy(update={"speed": 1.0})
    del reports.by_host["mini1"].facts["environment"]["score"]
    assert speeds(reports) == {}, "a speed is relative to all others"


def test_what_hosts_say_is_text_and_nothing_else(
    reports: HostReports, capsys: pytest.CaptureFixture[str]
):
    """No escape sequence, no markup of rich, no line of its own."""
    evil = "[red]x[/]\x1b[2J\x9b2J\r\n\u202emini1: fine[link=https://evil]here[/link]"
    one = facts("linux", 8.2e9, 1e11)
    one["system"] |= {"system": evil, "arch": evil, "user": evil, "model": evil, "cpu": evil}
    one["system"] |= {"gpus": [{"name": evil}]}
    one["environment"] |= {"python": evil, "packages": {"torch": evil}}
    one["network"]["interfaces"][0] |= {"name": evil, "addresses": [evil]}
    reports.by_host["pi5"] = HostReport("pi5", one, [Finding("warning", evil, evil)])
    doctor_text.report(reports)
    shown = capsys.readouterr().out
    assert "[red]x[/]" in shown
    assert "[link=https://evil]" in shown.replace("\n", "")
    assert all(line.isprintable() for line in shown.split("\n"))
    assert sum(line.startswith("mini1: ") for line in shown.split("\n")) == 1


def test_a_cluster_without_a_file_and_one_without_hosts(reports: HostReports):
    Path("conf/cluster/home.yaml").unlink()
    with pytest.raises(ConfigError, match="does not list the hosts"):
        doctor_write.write(reports, print)
    said: list[str] = []
    doctor_write.write(HostReports.of(compose(["task=doctor"])), said.append)
    assert "lists no hosts" in said[0]


def test_a_shipped_file_is_copied_beside_your_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    file, text = doctor_write.find("macmini3", ["mini1", "mini2", "mini3"])
    assert file == Path("conf/cluster/macmini3.yaml")
    assert text.startswith("# Three Mac minis")


def test_links_are_measured_by_one_rank_a_host(reports: HostReports):
    config = with_hosts(reports.config, ["pi5"])
    assert [(host.name, host.ranks) for host in config.cluster.hosts or []] == [("pi5", 1)]
    assert reports.fit_for_mesh() == ["mini1", "pi5"]
    reports.by_host["pi5"].findings.append(Finding("error", "no disk"))
    assert reports.fit_for_mesh() == []  # one host has no link


@pytest.mark.timeout(120)
def test_this_machine_alone(tmp_path: Path):
    command = [sys.executable, "-m", "smolrun.cli", "task=doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110)
    assert done.returncode in (0, 3), done.stderr
    told = json.loads(done.stdout)
    (host,) = told["hosts"]
    assert host["environment"]["packages"]["torch"]
    assert {(one["from"], one["to"]) for one in told["links"]} == {("local", "local")}
    assert list(tmp_path.iterdir()) == []
