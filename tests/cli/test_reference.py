"""docs/configuration.md says what the classes and the files say."""

from __future__ import annotations

from pathlib import Path

from smolrun.cli import reference

FILE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_the_page_is_fresh():
    assert FILE.read_text(encoding="utf-8") == reference.text(), "run `make docs`"


def test_it_has_every_group_and_tells_what_is_not_built():
    text = reference.text()
    for group in ("cluster", "algorithm", "model", "data", "training", "experiment"):
        assert f"\n## {group}\n" in text
    assert "| `cluster.hosts[].ssh` | `null` | null; the rest is not built yet |" in text
    assert "Planned, not built yet: fsdp, syncps, edp" in text
    assert "| `data.path` |  | text or a list of text |" in text
