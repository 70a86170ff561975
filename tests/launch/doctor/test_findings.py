"""What facts about a host mean, and the sentence of its status."""

from __future__ import annotations

from typing import Any

import pytest

from smolrun.launch.doctor import findings
from smolrun.launch.doctor.findings import Finding, status

SETUP = "smolrun task=setup cluster=home"


def system(**changes: Any) -> dict[str, Any]:
    folder = {"path": "/w", "found": "/w", "free": 50e9, "is_folder": True, "is_writable": True}
    told = {"bits": 64, "arch": "aarch64", "folder": folder}
    return {**told, "memory_total": 8e9, "memory_available": 6e9, **changes}


def environment(**changes: Any) -> dict[str, Any]:
    packages = {"smolrun": None, "torch": "2.9.0", "numpy": "2.1"}
    told = {"python": "3.12.1", "executable": "/e/bin/python", "packages": packages}
    return {**told, "cuda": False, "cuda_build": None, "mps": False, **changes}


def of_environment(found: dict[str, Any], **changes: Any) -> list[Finding]:
    orders = {"needed": ["torch", "numpy"], "smolrun": None, "is_given": False, "setup": SETUP}
    return list(findings.of_environment(found, **{**orders, **changes}))


def test_a_good_host_has_no_findings():
    assert list(findings.of_system(system(), 6)) == []
    assert of_environment(environment()) == []
    assert list(findings.of_device(environment(), [], "auto", SETUP)) == []
    assert list(findings.of_clock(0.3, 0.1, "linux")) == []
    assert list(findings.of_sleep({"targets": ["masked", "masked"]}, "linux")) == []
    assert list(findings.of_throttle({"pi_bits": 0, "frequency_cap": 1.0})) == []


def test_32_bit_a_small_disk_little_memory_and_too_much_promised():
    folder = {**system()["folder"], "free": 3e9}
    told = system(bits=32, arch="armv7l", folder=folder, memory_available=1e9)
    found = list(findings.of_system(told, 16))
    assert [one.severity for one in found] == ["error", "warning", "warning", "warning"]
    assert "armv7l" in found[0].what and "64-bit" in str(found[0].hint)
    assert "3.0 GB free" in found[1].what
    assert "memory_gb: 5" in str(found[2].hint)
    full = list(findings.of_system(system(folder={**folder, "free": 0.2e9}), None))
    assert [one.severity for one in full] == ["error"]
    shut = {**folder, "free": 50e9, "is_writable": False}
    assert "cannot be written" in next(findings.of_system(system(folder=shut), None)).what


def test_an_environment_that_is_missing_or_lacks_something():
    (none,) = of_environment({"error": "/e/bin/python is not there", "is_missing": True})
    assert none == Finding("error", "there is no environment for smolrun there yet", SETUP)
    (given,) = of_environment({"error": "/opt/py is not there", "is_missing": True}, is_given=True)
    assert "/opt/py" in given.what and "`python:`" in str(given.hint)
    lacking = environment(packages={"torch": "2.9.0", "numpy": None})
    (one,) = of_environment(lacking, is_given=True)
    assert one.hint == "/e/bin/python -m pip install numpy"
    assert of_environment(lacking)[0].hint == SETUP
    assert "3.9.2" in of_environment(environment(python="3.9.2"))[0].what
    assert (
        "cannot be imported" in of_environment(environment(torch_error="OSError: libgomp"))[0].what
    )
    (other,) = of_environment(environment(), smolrun="0.2.0")
    assert other.what == "smolrun is not installed"


NVIDIA = [{"vendor": "nvidia", "name": "RTX 3060"}]


@pytest.mark.parametrize(
    ("found", "gpus", "device", "severity", "words"),
    [
        (environment(), NVIDIA, "auto", "warning", "GPU seen (RTX 3060), but this torch cannot"),
        (environment(), NVIDIA, "cuda", "error", "torch 2.9.0 is a CPU build"),
        (environment(cuda_build="12.8"), NVIDIA, "cuda", "error", "the driver may be old"),
        (environment(), [], "cuda", "error", "no NVIDIA GPU"),
        (environment(), [], "mps", "error", "device: mps"),
    ],
)
def test_a_gpu_that_torch_cannot_use(
    found: dict[str, Any], gpus: list[dict[str, str]], device: str, severity: str, words: str
):
    (one,) = findings.of_device(found, gpus, device, SETUP)
    assert (one.severity, words in one.what) == (severity, True)


def test_a_gpu_that_is_not_wanted_or_works_is_no_finding():
    assert list(findings.of_device(environment(), NVIDIA, "cpu", SETUP)) == []
    assert list(findings.of_device(environment(cuda=True), NVIDIA, "cuda", SETUP)) == []
    assert list(findings.of_device(environment(mps=True), [], "mps", SETUP)) == []


def test_a_clock_counts_as_wrong_only_where_that_is_sure():
    (one,) = findings.of_clock(-300.0, 0.5, "linux")
    assert "300 s behind" in one.what and "timedatectl" in str(one.hint)
    assert list(findings.of_clock(35.0, 10.0, "linux")) == []


@pytest.mark.parametrize(
    ("sleep", "os", "severity", "words"),
    [
        ({"pmset": {"sleep": 10}, "can_inhibit": True}, "darwin", "info", "after 10 min"),
        ({"pmset": {"sleep": 1}, "has_battery": True}, "darwin", "warning", "when its lid closes"),
        ({"standby_s": 1800, "can_inhibit": True}, "windows", "info", "after 30 min"),
        ({"desktop": "suspend", "desktop_s": 900}, "linux", "warning", "after 15 min"),
        ({"idle_action": "suspend", "can_inhibit": True}, "linux", "info", "when it is idle"),
        ({"has_battery": True, "lid": "suspend", "targets": ["static"]}, "linux", "warning", "lid"),
    ],
)
def test_a_host_that_falls_asleep(sleep: dict[str, Any], os: str, severity: str, words: str):
    (one,) = findings.of_sleep(sleep, os)
    assert (one.severity, words in one.what) == (severity, True)
    assert one.hint


@pytest.mark.parametrize(
    ("sleep", "os"),
    [({"pmset": {"sleep": 0}}, "darwin"), ({"standby_s": 0}, "windows"), ({}, "linux")],
)
def test_a_host_that_stays_awake(sleep: dict[str, Any], os: str):
    assert list(findings.of_sleep(sleep, os)) == []


def test_a_pi_with_a_weak_supply_now_and_heat_before():
    found = list(findings.of_throttle({"pi_bits": 0x1 | 0x4 << 16}))
    assert [(one.severity, one.what) for one in found] == [
        ("warning", "its power supply is too weak (under-voltage)"),
        ("info", "since it was switched on: it is throttled"),
    ]
    hot = {"frequency_cap": 0.5, "temperature_c": 90.0, "speed_limit_percent": 60}
    assert len(list(findings.of_throttle(hot))) == 3


def test_a_torch_that_differs_from_that_of_most():
    found = findings.of_versions({"a": "2.9.0", "b": "2.9.1+cpu", "c": "2.8.0", "d": None})
    assert list(found) == ["c"]
    assert "2.8 here, 2.9 on others" in found["c"][0].what
    assert findings.of_versions({"a": "2.9.0", "b": "2.9.1"}) == {}


def test_the_sentence_names_the_gravest_reason_first():
    note, limit = Finding("info", "it sleeps"), Finding("warning", "it is hot", "a fan")
    block = Finding("error", "no Python", SETUP)
    assert status([]).sentence == status([note]).sentence == "fine"
    assert status([note, limit]).sentence == "usable, but it is hot"
    whole = status([note, limit, block, block])
    assert (whole.state, whole.sentence) == ("cannot run", "cannot run: no Python")
    assert [one.severity for one in whole.findings] == ["error", "warning", "info"]
    assert whole.to_json()["findings"][0] == {
        "severity": "error",
        "what": "no Python",
        "hint": SETUP,
    }
    two = status([block, Finding("error", "no disk")])
    assert two.sentence == "cannot run: no Python (and 1 more)"
