"""Where the system's ssh gets in and we do not: which setting it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from smolrun.launch.doctor.system_ssh import compared, differences, parsed
from smolrun.launch.remote.machine import HostSpec

DEFAULTS = """\
host mini2.local
user anna
hostname mini2.local
port 22
identityagent SSH_AUTH_SOCK
pkcs11provider none
gssapiauthentication no
hostbasedauthentication no
canonicalizehostname false
verifyhostkeydns false
identityfile ~/.ssh/id_ed25519
identityfile ~/.ssh/id_rsa
"""
OURS = {"hostname": "mini2.local", "port": "22", "user": "anna"}


def test_defaults_differ_in_nothing():
    said = parsed(DEFAULTS)
    assert said["identityfile"] == ["~/.ssh/id_ed25519", "~/.ssh/id_rsa"]
    assert differences(said, OURS) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("port 22", "port 2222", "port is 2222 for ssh and 22 for us"),
        ("SSH_AUTH_SOCK", "~/.1password/agent.sock", "identityagent ~/.1password/agent.sock"),
        ("gssapiauthentication no", "gssapiauthentication yes", "gssapiauthentication yes"),
        ("pkcs11provider none", "pkcs11provider /lib/p11.so", "pkcs11provider /lib/p11.so"),
    ],
)
def test_what_differs_is_named(old: str, new: str, words: str):
    ((what, hint),) = differences(parsed(DEFAULTS.replace(old, new)), OURS)
    assert words in what
    assert hint


def test_a_shared_connection_is_named():
    said = parsed(DEFAULTS + "controlpath /run/cm\n")
    assert "ControlPath /run/cm" in differences(said, OURS, shares=True)[0][0]


@pytest.mark.skipif(os.name != "posix", reason="the fake ssh is an sh script")
def test_ssh_is_asked_without_prompts_and_without_learning_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake = tmp_path / "ssh"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        'for word in "$@"; do\n'
        "  case $word in -G) echo identityagent /agent;; -O) exit 1;; esac\ndone\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    spec = HostSpec("mini2", "anna@127.0.0.1:1", timeout_s=1.0)
    found = compared(spec)
    assert found is not None and "identityagent /agent" in found.what
    first, *_ = (tmp_path / "asked").read_text().splitlines()
    assert "BatchMode=yes" in first and "StrictHostKeyChecking=yes" in first
    assert first.startswith("-l anna -p 1 ") and first.endswith("127.0.0.1 exit 0")
    fake.write_text("#!/bin/sh\nexit 255\n")
    assert compared(spec) is None
    assert compared(HostSpec("mini2", "-oProxyCommand=x")) is None
