"""Keys of hosts change in the text of a cluster file, and nothing else does."""

from __future__ import annotations

import pytest
import yaml

from smolrun.driver.cluster_file import changed, host_names, written
from smolrun.errors import ConfigError

FLOW = """\
# Our machines
name: home
hosts:
  # the fast one first
  - {name: mini1, ssh: mini1.local, memory_gb: 16}   # in the kitchen
  - {name: mini2, ssh: mini2.local}
device: auto   # both
"""
BLOCK = """\
name: home
hosts:
  - name: pi5            # Raspberry Pi 5
    ssh: pi@192.168.1.11
    env:
      A: "1"
    memory_gb: 6         # of its 8

  # the PC
  - name: pc
    address:
      - 10.0.0.2
      - pc.local
    ssh: me@pc   # by name
start_timeout_s: 300     # patience
"""


def lines(before: str, after: str) -> list[str]:
    """The lines that are new."""
    return [line for line in after.splitlines() if line not in before.splitlines()]


def test_flow_style_keeps_comments_and_gets_new_keys_at_the_end():
    new = changed(FLOW, {"mini1": {"os": "darwin", "memory_gb": 15.5}, "mini2": {"os": "darwin"}})
    assert lines(FLOW, new) == [
        "  - {name: mini1, ssh: mini1.local, memory_gb: 15.5, os: darwin}   # in the kitchen",
        "  - {name: mini2, ssh: mini2.local, os: darwin}",
    ]
    assert len(new.splitlines()) == len(FLOW.splitlines())


def test_block_style_gets_lines_of_its_own():
    new = changed(BLOCK, {"pi5": {"os": "linux", "memory_gb": 7.9}, "pc": {"os": "windows"}})
    assert lines(BLOCK, new) == [
        "    memory_gb: 7.9         # of its 8",
        "    os: linux",
        "    os: windows",
    ]
    told = yaml.safe_load(new)
    pi5 = {"name": "pi5", "ssh": "pi@192.168.1.11", "env": {"A": "1"}}
    assert told["hosts"][0] == pi5 | {"memory_gb": 7.9, "os": "linux"}
    assert told["hosts"][1]["os"] == "windows"
    assert "# the PC" in new and "# by name" in new and "# patience" in new


def test_a_list_is_replaced_whole_and_addresses_stay_text():
    new = changed(BLOCK, {"pc": {"address": ["10.9.9.2", "fd00::2", "pc.local"]}})
    assert yaml.safe_load(new)["hosts"][1]["address"] == ["10.9.9.2", "fd00::2", "pc.local"]
    assert yaml.safe_load(new)["hosts"][1]["ssh"] == "me@pc"


def test_the_same_again_changes_nothing():
    once = changed(FLOW, {"mini1": {"os": "darwin"}})
    assert changed(once, {"mini1": {"os": "darwin"}}) == once
    assert changed(FLOW, {}) == FLOW


def test_a_host_that_is_not_listed_and_a_file_that_is_none_are_refused():
    assert host_names(FLOW) == ["mini1", "mini2"]
    with pytest.raises(ConfigError, match="no host mini9"):
        changed(FLOW, {"mini9": {"os": "linux"}})
    with pytest.raises(ConfigError, match="cannot be read"):
        changed("a: [", {"x": {}})


@pytest.mark.parametrize("value", ["no", "10.0.0.1", "fe80::1", 7.5, 16, True, "a b", ["x", "1"]])
def test_what_is_written_is_read_back_as_it_was(value: object):
    assert yaml.safe_load(f"key: {written(value)}") == {"key": value}
