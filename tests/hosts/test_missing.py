"""Where there can be no lab, its tests skip with the true reason. These run everywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from tests.hosts import lab, network


@pytest.fixture(autouse=True)
def _a_machine_that_has_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 0, raising=False)
    monkeypatch.setattr(shutil, "which", lambda tool, path: f"/usr/sbin/{tool}")
    monkeypatch.setattr(lab, "command", lambda *argv: "")


def reason() -> str | None:
    return lab.missing.__wrapped__()  # what is behind its cache


def test_nothing_is_missing():
    assert reason() is None


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_another_system(monkeypatch: pytest.MonkeyPatch, system: str):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.delattr(os, "geteuid")
    assert reason() == "the lab of hosts needs Linux, for its network namespaces"


def test_no_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert reason() == "the lab of hosts needs root, for its network namespaces"


def test_tools_that_are_not_installed_with_the_line_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
):
    absent = {"tc", "nft", "/usr/sbin/sshd"}
    monkeypatch.setattr(shutil, "which", lambda tool, path: None if tool in absent else tool)
    assert reason() == (
        "the lab of hosts needs tc, nft, sshd: "
        "apt-get install --no-install-recommends iproute2 nftables openssh-server"
    )


def test_a_container_that_may_not(monkeypatch: pytest.MonkeyPatch):
    def refuse(argv: Sequence[str], **options: object) -> SimpleNamespace:
        return SimpleNamespace(returncode=1, stdout="", stderr="unshare: Operation not permitted\n")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(lab, "command", network.command)
    said = reason()
    assert said is not None
    assert said.startswith("this kernel or container allows no lab of hosts: ")
    assert said.endswith("Operation not permitted")
