"""The pages that docs/reference.py makes are complete, and up to date."""

from __future__ import annotations

from pathlib import Path

import msgspec

from docs import reference
from smolrun.events import EVENTS

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_pages_are_up_to_date(tmp_path: Path):
    reference.main(tmp_path)
    pages = sorted(tmp_path.iterdir())
    assert [page.name for page in pages] == ["combinations.md", "configuration.md", "outputs.md"]
    for page in pages:
        shipped = (DOCS / page.name).read_text(encoding="utf-8")
        assert shipped == page.read_text(encoding="utf-8"), f"docs/{page.name}: run `make docs`"


def test_the_page_about_outputs_has_every_key():
    text = (DOCS / "outputs.md").read_text(encoding="utf-8")
    public = {kind: event for kind, event in EVENTS.items() if event not in reference.PRIVATE}
    assert [kind for kind in public if f"\n### {kind}\n" not in text] == []
    used = {field.name for event in public.values() for field in msgspec.structs.fields(event)}
    assert used == {name.rpartition(".")[2] for name in reference.MEANINGS}


def test_the_page_about_combinations_has_every_algorithm():
    text = (DOCS / "combinations.md").read_text(encoding="utf-8")
    rows = [" ".join(row) for row in reference.combination_rows()]
    assert [row for row in rows if f"\n| `{row}` | " not in text] == []
    assert {"algorithm=single", "algorithm=classicdp", "algorithm=fsdp algorithm.stage=3"} <= {
        *rows
    }
    assert "refused (1)" in text and "sends nothing" in text


def test_the_page_of_keys_has_every_group_and_what_is_not_built():
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    for group in ("cluster", "algorithm", "model", "data", "training", "experiment"):
        assert f"\n## {group}\n" in text
    assert "| `cluster.hosts[].speed` | `1.0` | a number > 0 or auto |" in text
    assert "Planned, not built yet: mp" in text
    assert "| `data.path` |  | text or a list of text |" in text
