"""The pages that docs/reference.py makes are complete, and up to date."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from docs import reference
from smolrun.cli.compose import TARGETS
from smolrun.config.problems import known_keys
from smolrun.events import EVENTS

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_pages_are_up_to_date(tmp_path: Path):
    reference.main(tmp_path)
    pages = sorted(tmp_path.iterdir())
    assert [page.name for page in pages] == [
        "combinations.md",
        "configuration.md",
        "outputs.md",
        "serving_api.md",
    ]
    for page in pages:
        shipped = (DOCS / page.name).read_text(encoding="utf-8")
        assert shipped == page.read_text(encoding="utf-8"), f"docs/{page.name}: run `make docs`"


def test_the_page_of_the_http_api_has_every_field_and_its_meaning():
    text = (DOCS / "serving_api.md").read_text(encoding="utf-8")
    for path in ("POST /v1/chat/completions", "GET /readyz", "POST /chat"):
        assert f"\n## {path}\n" in text
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", text, flags=re.MULTILINE)
    assert len(rows) > 50 and [name for name, meaning in rows if not meaning.strip()] == []
    assert "| `temperature` | number >= 0 <= 2 |" in text


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
    assert "Planned, not built yet: diloco" in text
    assert "| `data.path` |  | text or a list of text |" in text


def test_every_key_has_a_meaning():
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.\[\]]+)` \|.*\| (.*) \|$", text, flags=re.MULTILINE)
    assert [key for key, meaning in rows if not meaning.strip()] == []
    named = {"optimizer.name", "bench.name", "model.loss"}
    named |= {f"{group}.{key}" for group in TARGETS for key in ("name", "target")}
    assert known_keys().keys() - {key for key, _ in rows} == named


def test_a_comment_belongs_to_the_key_in_front_of_it_and_goes_on_in_its_column(tmp_path: Path):
    file = tmp_path / "x.yaml"
    file.write_text(
        "# About the file\n"
        "defaults:\n"
        "  - task: train  # what to do\n"
        "  # about the list\n"
        "a: 1   # first\n"
        "       # second\n"
        "b:\n"
        "  c: 2 # inner\n"
        "# About nothing\n"
        "  d: 3\n"
    )
    assert reference._comments(file) == {"task": "what to do", "a": "first second", "b.c": "inner"}
