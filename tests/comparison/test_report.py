"""The four forms of a comparison, and what they do with foreign text."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from smolrun.comparison.compare import compare_runs, make_report, tuning_command
from smolrun.comparison.selection import Job, Selection
from smolrun.tracking.run_folder import RunFolder
from tests.comparison.runs import config, events, write_run

EDP = {"algorithm__name": "edp"}
CONTRACT = [
    *("job", "status", "algorithm.name", "final_train_loss", "final_eval_loss", "tokens_per_s"),
    *("wall_s", "bytes_sent", "peak_memory_bytes"),
]


def selection(tmp_path: Path, *runs: dict[str, Any], **more: Any) -> Selection:
    jobs = []
    for number, change in enumerate(runs):
        folder = write_run(tmp_path / f"run{number}", config(**change), **more)
        jobs.append(Job(folder, folder.run_id))
    return Selection(jobs, tmp_path, "A title")


def written(chosen: Selection, **more: Any) -> tuple[list[str], str, str, list[list[str]]]:
    """What was said, the page, the Markdown and the rows of the CSV."""
    said: list[str] = []
    page = compare_runs(chosen, say=said.append, **more)
    assert page.name == "comparison.html"
    rows = list(csv.reader(io.StringIO(page.with_suffix(".csv").read_text())))
    return said, page.read_text(), page.with_suffix(".md").read_text(), rows


def test_two_runs(tmp_path: Path):
    said, page, markdown, rows = written(selection(tmp_path, {}, EDP))
    assert rows[0][: len(CONTRACT)] == CONTRACT
    assert rows[1][:3] == ["run0", "done", "classicdp"] and rows[1][4] == ""
    numbers = [float(rows[1][n]) for n in (3, 5, 6, 7, 8)]
    assert numbers == pytest.approx([3.1, 1000, 30, 4000, 1001])
    table = [line.split() for line in said if line.startswith(("algorithm ", "classicdp ", "edp "))]
    assert table[1][:2] == ["classicdp", "done"] and len(table) == 3
    assert "| algorithm | status | time to loss |" in markdown
    assert "## " not in markdown  # of real machines only
    for text in (*said, page, markdown):
        assert "None" not in text and "nan" not in re.sub(r"<[^>]*>", "", text).lower().split()


class Parsed(HTMLParser):
    """Tags, and the values of their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.values: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [(name, value or "") for name, value in attrs]


@pytest.mark.usefixtures("with_plots")
def test_the_page_needs_nothing_but_itself(tmp_path: Path):
    _, page, _, _ = written(selection(tmp_path, {}, EDP, {**EDP, "seed": 1}))
    parsed = Parsed(page)
    assert parsed.tags.count("figure") >= 5 and parsed.tags.count("svg") > 5
    forbidden = {"script", "link", "img", "iframe", "object", "form", "image", "a", "foreignobject"}
    assert not forbidden & set(parsed.tags)
    names = {name for name, _ in parsed.values}
    assert not {name for name in names if name.startswith("on") or name == "src"}
    links = [value for name, value in parsed.values if name.endswith("href")]
    assert links and all(value.startswith("#") for value in links)
    assert "default-src 'none'" in page and "@import" not in page and "url(http" not in page
    assert not re.findall(r"(?<!xmlns=\")(?<!xmlns:xlink=\")https?://", page)


@pytest.mark.usefixtures("with_plots")
def test_ids_of_two_plots_do_not_mix_up_their_clips(tmp_path: Path):
    _, page, _, _ = written(selection(tmp_path, {}, EDP))
    clips = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(clips) == len(set(clips)) >= 3


EVIL = [
    *("<script>alert(1)</script>", "'\"><img src=x onerror=alert(1)>", "</style><b>", "&lt;b&gt;"),
    *(
        "$\\frac{1",
        "|a|b|\n# h",
        "[x](javascript:alert(1))",
        "`x` **y** <u>",
        "https://evil.example",
    ),
    *("=cmd|' /C calc'!A1", "+1", "@SUM(1)", "-2+3", "\t=1", "a\r\nb", "\x00", "x" * 5000),
    *("\x1b[2J\x1b]0;x\x07", "\u202egnp.exe", "\ud800"),
]


def evil_selection(tmp_path: Path, evil: str) -> Selection:
    """Three runs with a text wherever a text of others may stand."""
    chosen = selection(tmp_path, {}, EDP, {**EDP, "quantization__kind": evil})
    reason = evil.replace("\ud800", "?")  # JSON cannot hold it
    summary = {"status": "failed", "reason": reason, "versions": {"smolrun": reason}}
    chosen.jobs[1].folder.write_summary(summary)
    jobs = [chosen.jobs[0], Job(chosen.jobs[1].folder, evil), chosen.jobs[2]]
    return Selection(jobs, tmp_path, evil, metric=evil, overrides=[evil], notes=[evil])


@pytest.mark.parametrize("evil", EVIL, ids=lambda text: ascii(text[:25]))
def test_foreign_text_is_text(tmp_path: Path, evil: str):
    said, page, markdown, rows = written(evil_selection(tmp_path, evil))
    assert_harmless(page)
    cells = [cell for row in rows for cell in row]
    shown = "".join([*said, page, markdown, *cells])
    assert not [c for c in shown if not (c.isprintable() or c == "\n")]
    formulas = [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t"))]
    assert not {*formulas} - {"-"}
    assert len({line.count(" | ") for line in markdown.splitlines() if line.startswith("| ")}) == 1
    assert not re.search(r"(?<!\\)\]\(", markdown) and "<" not in markdown.replace("\\<", "")
    assert "https://" not in markdown
    assert len(page) < 100_000


def assert_harmless(page: str) -> None:
    parsed = Parsed(page)
    assert not {"script", "img", "b", "u"} & set(parsed.tags)
    assert not [name for name, _ in parsed.values if name.startswith("on")]


@pytest.mark.usefixtures("with_plots")
def test_foreign_text_in_plots_is_text(tmp_path: Path):
    _, page, _, _ = written(evil_selection(tmp_path, "$\\frac{<script>'\"</svg><b onload=x>"))
    assert_harmless(page)
    assert page.count("<svg") == page.count("</svg>") > 5


def test_emulated_runs_have_a_table_of_their_own(tmp_path: Path):
    hosts = [{"name": "pi", "emulate": {"compute": 0.25}}]
    chosen = selection(tmp_path, {}, {"cluster__hosts": hosts}, EDP)
    said, page, markdown, rows = written(chosen)
    assert page.count("<table>") == 2 and "## Emulated machines" in markdown
    assert [row[rows[0].index("emulated")] for row in rows[1:]] == ["false", "false", "true"]
    assert "their times are not comparable" in page and "pi emulates a slower machine" in page
    assert said.index("Real machines") < said.index("Emulated machines")


def test_of_many_emulated_machines_two_are_named(tmp_path: Path):
    hosts = [{"name": f"pi{n}", "emulate": {"compute": 0.25}} for n in range(6)]
    _, page, _, _ = written(selection(tmp_path, {"cluster__hosts": hosts}))
    assert (
        "Times are those of 6 emulated machines: pi0 emulates a slower machine; pi1 emulates a"
        " slower machine; and 4 more."
    ) in page


def test_repeats_are_one_row_with_their_spread_and_rows_of_the_csv(tmp_path: Path):
    chosen = selection(tmp_path, {}, EDP, {"seed": 1}, {**EDP, "seed": 1})
    _, page, markdown, rows = written(chosen)
    assert len(rows) == 5 and [row[rows[0].index("repeat")] for row in rows[1:]] == ["0", "1"] * 2
    assert page.count("<tr>") == 3
    assert "| classicdp | 2 x done |" in markdown and "1,000 ± 0 %" in markdown


def test_of_many_rows_the_first_are_shown(tmp_path: Path):
    rates = [{"optimizer__lr": round(0.001 * n, 3)} for n in range(1, 211)]
    said, page, markdown, rows = written(selection(tmp_path, *rates, rows=events(steps=1)))
    assert len(rows) == 211
    assert page.count("<tr>") == 212 and "<details><summary>160 more rows</summary>" in page
    assert len(said) < 50 and "and 190 more rows, in the files" in said
    assert "10 more rows: comparison.html" in markdown


def test_a_job_that_does_not_get_to_the_loss_has_no_time_to_it(tmp_path: Path):
    slopes = {"a": 0.1, "b": 0.1, "c": 0.01}
    jobs = []
    for name, slope in slopes.items():
        folder = write_run(tmp_path / name, config(algorithm__name=name), events(slope=slope))
        jobs.append(Job(folder, name))
    _, page, _, rows = written(Selection(jobs, tmp_path, "A title"))
    assert page.count("<td>not reached</td>") == 1
    column = [row[rows[0].index("time_to_loss_s")] for row in rows[1:]]
    assert column == ["20.0", "20.0", ""]


def test_on_paper_nothing_scrolls(tmp_path: Path):
    """Of two rules of one element the later one counts: all columns were not printed once."""
    _, page, _, _ = written(selection(tmp_path, {}, EDP))
    style = page[page.index("<style>") : page.index("</style>")]
    assert ".wide { overflow: visible; }" in style[style.index("@media print") :]
    assert style.index("@media print") > style.index(".wide { overflow-x")


def test_figures_of_classifiers_are_of_samples(tmp_path: Path):
    chosen = selection(tmp_path, {}, EDP)
    for one in chosen.jobs:
        one.folder.write_driver(20, unit="samples")
    _, page, markdown, rows = written(chosen)
    assert "| samples/s | time per step |" in markdown and "tokens" not in markdown
    assert "tokens" not in page and "tokens_per_s" in rows[0]  # the name of a key stays


def test_markdown_escapes_no_more_than_it_must(tmp_path: Path):
    chosen = selection(tmp_path, {}, {"cluster__name": "sim/mac_pi_laptop"})
    _, _, markdown, _ = written(chosen)
    assert "| sim/mac_pi_laptop | done |" in markdown
    assert "(the lowest that both have reached, as a mean of 4 steps)" in markdown
    assert "\\" not in markdown


def test_the_table_is_sorted_by_the_metric(tmp_path: Path):
    write_run(tmp_path / "slow", config(), events(step_s=3.0))
    write_run(tmp_path / "fast", config(**EDP), events(step_s=1.0, slope=0.05))
    jobs = [Job(RunFolder(tmp_path / name), name) for name in ("slow", "fast")]
    chosen = Selection(jobs, tmp_path, "A title", metric="tokens_per_s")

    def first(metric: str | None) -> str:
        return next(iter(make_report(chosen, metric).sections[0].cells[0].runs.values())).name

    assert first(None) == "fast"
    assert first("final_train_loss") == "slow"
    assert "none of a comparison" in make_report(chosen, "nonsense").notes[-1]


def test_jobs_that_have_not_started_or_have_no_metrics_are_in_the_table(tmp_path: Path):
    chosen = selection(tmp_path, {}, EDP)
    chosen.jobs[1].folder.metrics.unlink()
    later = Job(RunFolder(tmp_path / "later"), "later")
    _, page, markdown, rows = written(Selection([*chosen.jobs, later], tmp_path, "A title"))
    assert [row[1] for row in rows[1:]] == ["done", "done", "not started"]
    assert "as not started yet: later." in page and "There is no metrics.jsonl: edp." in page
    assert "- | - | - |" in markdown


def test_a_page_without_plots_says_what_is_missing(tmp_path: Path):
    _, page, _, _ = written(selection(tmp_path, {}, EDP))
    assert "pip install matplotlib" in page and "<figure>" not in page


def test_the_command_that_tunes_holds_only_plain_words(tmp_path: Path):
    cells = make_report(selection(tmp_path, {}, EDP)).sections[0].cells
    overrides = [
        "algorithm=classicdp,edp",
        "cluster=sim/pi3",
        "a=$(rm -rf ~)",
        "model.target=evil:x",
    ]
    overrides += ["sweep.repeats=3", "optimizer.lr=1", "data.path=/etc"]
    rates = "optimizer.lr=0.0009,0.003,0.009"
    assert tuning_command(cells, overrides) == (
        f"smolrun -m algorithm=classicdp,edp cluster=sim/pi3 {rates}"
    )
    assert tuning_command(cells, []) == f"smolrun -m algorithm=classicdp,edp {rates}"
    assert tuning_command(cells[:1], []) is None
    next(iter(cells[0].runs.values())).config["optimizer.lr"] = "0.1"
    assert tuning_command(cells, []) is None
