"""The questions of task=doctor, asked of this machine; and that an old Python can read them."""

from __future__ import annotations

import ast
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from smolrun.launch.on_host import clock, environment, firewall, power, prelude, system
from smolrun.launch.remote import answers

FOLDER = Path(clock.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_python_38_can_read_it_and_it_needs_nothing_but_python(name: str):
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"), feature_version=(3, 8))
    found = {
        node.module if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    found.discard(prelude.__name__)
    assert {(name or "").partition(".")[0] for name in found} <= {*sys.stdlib_module_names}


def test_a_file_that_another_driver_renames_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(prelude.os, "listdir", lambda folder: [".mark-renamed"])
    prelude.sweep(str(tmp_path), ".mark-")


def test_the_clock_is_this_machines():
    assert abs(clock.main({})["time_s"] - time.time()) < 5.0


def test_the_system_says_what_it_is_and_json_can_carry_it(tmp_path: Path):
    told = system.main({"workdir": str(tmp_path / "not" / "there")})
    assert json.loads(json.dumps(told)) == told
    assert told["os"] in ("linux", "darwin", "windows")
    assert told["cores"] >= told["usable_cores"] >= 1
    assert told["memory_total"] >= told["memory_available"] > 0
    assert told["folder"]["found"] == str(tmp_path)
    assert told["folder"]["is_writable"] and told["folder"]["free"] > 0


def test_power_and_firewall_answer_without_any_tool(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert set(power.main({})) == {"sleep", "throttle"}
    assert set(firewall.main({})) == {"kind", "is_on"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads files of Linux")
def test_a_pi_tells_what_its_firmware_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "get_throttled").write_text("50005\n")
    monkeypatch.setattr(power, "_PI", str(tmp_path / "get_throttled"))
    core = tmp_path / "cpu0" / "cpufreq"
    core.mkdir(parents=True)
    (core / "scaling_max_freq").write_text("1200000\n")
    (core / "cpuinfo_max_freq").write_text("2400000\n")
    monkeypatch.setattr(power, "_CPU", str(tmp_path))
    throttle = power.main({})["throttle"]
    assert (throttle["pi_bits"], throttle["frequency_cap"]) == (0x50005, 0.5)


def ask(**changes: Any) -> dict[str, Any]:
    request = {"pythons": [sys.executable], "packages": ["pytest", "nobody-has-this"]}
    request |= {"torch": False, "device": "auto", "measure": False, "path": "", "env": {}}
    return environment.main({**request, "timeout_s": 60.0, **changes})


def test_an_environment_tells_its_versions():
    told = ask(pythons=["/nowhere/python", sys.executable])
    assert told["python"] == sys.version.split()[0]
    assert told["packages"]["pytest"]
    assert told["packages"]["nobody-has-this"] is None


def test_an_environment_is_told_its_path_and_variables(tmp_path: Path):
    info = tmp_path / "mine-3.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 3.1\n")
    assert ask(packages=["mine"], path=str(tmp_path))["packages"] == {"mine": "3.1"}
    assert ask(packages=["mine"], env={"PYTHONPATH": str(tmp_path)})["packages"] == {"mine": "3.1"}


def test_errors_of_any_length_are_cut_to_what_an_answer_may_have(tmp_path: Path):
    (tmp_path / "torch.py").write_text("raise ImportError('x' * 9000)")
    told = ask(torch=True, path=str(tmp_path))
    assert told["torch_error"].startswith("ImportError: xxx")
    assert answers.checked("environment", None, told) == told
    if sys.platform == "win32":
        return  # the fake below is a sh script
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nprintf %09000d 1 >&2; exit 7\n")
    fake.chmod(0o755)
    told = ask(pythons=[str(fake)])
    assert "ended with 7: 000" in answers.checked("environment", None, told)["error"]


def test_torch_is_asked_what_it_can_use_and_how_fast():
    told = ask(torch=True, device="cpu", measure=True)
    assert told["packages"]["torch"]
    assert {"cuda", "mps", "cuda_build"} <= set(told)
    assert told["score"]["flops"] > 1e8 and told["score"]["memory_bytes_per_s"] > 1e8


def test_a_python_that_is_missing_breaks_or_hangs_is_told(tmp_path: Path):
    assert ask(pythons=["/nowhere/python"]) == {
        "error": "/nowhere/python is not there",
        "is_missing": True,
    }
    if sys.platform == "win32":
        return  # the fakes below are sh scripts
    for text, words in (
        ("echo oh no >&2; exit 7", "ended with 7: oh no"),
        ("exec sleep 60", "in 0.5 s"),
    ):
        fake = tmp_path / "python"
        fake.write_text(f"#!/bin/sh\n{text}\n")
        fake.chmod(0o755)
        assert words in ask(pythons=[str(fake)], timeout_s=0.5)["error"]
