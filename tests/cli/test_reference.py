"""docs/configuration.md says what the classes and the files say."""

from __future__ import annotations

from pathlib import Path

import msgspec

from smolrun.cli import outputs, reference
from smolrun.events import EVENTS

FILE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_the_page_is_fresh():
    assert FILE.read_text(encoding="utf-8") == reference.text(), "run `make docs`"


def test_the_page_about_outputs_is_fresh_and_has_every_key():
    text = outputs.text()
    assert FILE.with_name("outputs.md").read_text(encoding="utf-8") == text, "run `make docs`"
    public = {kind: event for kind, event in EVENTS.items() if event not in outputs.PRIVATE}
    assert [kind for kind in public if f"\n### {kind}\n" not in text] == []
    used = {field.name for event in public.values() for field in msgspec.structs.fields(event)}
    assert used == {name.rpartition(".")[2] for name in outputs.MEANINGS}


def test_the_page_about_combinations_is_fresh_and_has_every_algorithm():
    text = reference.combinations()
    page = FILE.with_name("combinations.md")
    assert page.read_text(encoding="utf-8") == text, "run `make docs`"
    rows = [" ".join(row) for row in reference.combination_rows()]
    assert [row for row in rows if f"\n| `{row}` | " not in text] == []
    assert {"algorithm=single", "algorithm=classicdp", "algorithm=fsdp algorithm.stage=3"} <= {
        *rows
    }
    assert "refused (1)" in text and "sends nothing" in text


def test_it_has_every_group_and_tells_what_is_not_built():
    text = FILE.read_text(encoding="utf-8")
    for group in ("cluster", "algorithm", "model", "data", "training", "experiment"):
        assert f"\n## {group}\n" in text
    assert "| `cluster.hosts[].speed` | `1.0` | a number > 0 or auto |" in text
    assert "Planned, not built yet: mp" in text
    assert "| `data.path` |  | text or a list of text |" in text
