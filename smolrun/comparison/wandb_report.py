"""A comparison as a W&B report, made by a process of its own, so that W&B and its server cannot
slow or end a sweep.

    comparison   `publish`: what the report says, over stdin; waits a bounded time
    process      `python -m smolrun.comparison.wandb_report`: builds it with `wandb_workspaces`,
                 whose objects ask the server while they are made, and answers with its address

Only for runs that are in W&B: the files of each say where. The key is W&B's own.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlparse

import msgspec

from smolrun.comparison.report import ComparisonReport, as_markdown
from smolrun.comparison.run_figures import RunFigures
from smolrun.sanitize import one_line
from smolrun.tracking.wandb import kill_tree, read_status, short_error

LIMIT_S = 60.0  # to import W&B, and for some ten requests
_MAX_TITLE = 128  # W&B's own limit
_MOST_RANKS = 8  # lines of a panel
_MOST_NAMED = 200  # runs that a report names one by one
_NAME = re.compile(r"\w[\w.-]{0,127}", re.ASCII)  # of an entity, a project or a run
_GROUP = re.compile(r"[\w.=,+-]{1,128}", re.ASCII)


class ReportOrder(msgspec.Struct, frozen=True):
    """The line to the process. The runs are those of `group`, or `run_ids` where it is None."""

    entity: str
    project: str
    title: str
    markdown: str
    group: str | None
    run_ids: list[str]
    num_ranks: int


class _Answer(msgspec.Struct):
    url: str = ""
    error: str = ""


def publish(report: ComparisonReport, say: Callable[[str], None], limit_s: float = LIMIT_S) -> None:
    """Make the report, if runs are in W&B, and pass its address to `say`; what went wrong is a
    sentence."""
    runs = [run for part in report.sections for cell in part.cells for run in cell.runs.values()]
    if (order := order_for(report, runs)) is None:
        return
    if find_spec("wandb_workspaces") is None:
        say("no W&B report: it needs pip install 'smolrun[reports]'")
        return
    answer = _ask(msgspec.json.encode(order) + b"\n", limit_s)
    say(f"W&B report: {answer.url}" if answer.url else f"no W&B report: {answer.error}")


def order_for(report: ComparisonReport, runs: Sequence[RunFigures]) -> ReportOrder | None:
    """What to make of these runs; None if none is in W&B. Runs of other projects than the one that
    has most of them are left out."""
    found = [(place, run) for run in runs if (place := _place(run)) is not None]
    if not found:
        return None
    (entity, project), _ = Counter(place[:2] for place, _ in found).most_common(1)[0]
    here = [(place[2], run) for place, run in found if place[:2] == (entity, project)]
    groups = {run.config.get("tracker.group", "") for _, run in here}
    group = groups.pop() if len(groups) == 1 else ""
    return ReportOrder(
        entity=entity,
        project=project,
        title=one_line(report.title)[:_MAX_TITLE] or "Comparison",
        markdown=as_markdown(report),
        group=group if group != "null" and _GROUP.fullmatch(group) else None,
        run_ids=[run_id for run_id, _ in here[:_MOST_NAMED]],
        num_ranks=min(_MOST_RANKS, max(run.world_size or 1 for _, run in here)),
    )


def _place(run: RunFigures) -> tuple[str, str, str] | None:
    """Entity, project and id of a run in W&B; None if it is not there, or its files say what
    cannot be."""
    status = read_status(run.folder.path)
    if status is None or status.state != "done" or not status.url:
        return None
    try:
        parts = urlparse(status.url).path.strip("/").split("/")
    except ValueError:
        return None
    if len(parts) != 4 or parts[2] != "runs" or not all(map(_NAME.fullmatch, parts)):
        return None
    return parts[0], parts[1], parts[3]


def _ask(order: bytes, limit_s: float) -> _Answer:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "smolrun.comparison.wandb_report"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        out, _ = process.communicate(order, limit_s)
        return msgspec.json.decode(out, type=_Answer)
    except subprocess.TimeoutExpired:
        return _Answer(error=f"W&B's server did not take it within {limit_s:g} s")
    except ValueError:
        return _Answer(error=f"the process that makes it died, exit code {process.returncode}")
    finally:
        if process.poll() is None:
            kill_tree(process)


def main() -> int:
    """Make one report; the answer goes to stdout, what W&B prints to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.pop("WANDB_MODE", None)  # the runs are online
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=ReportOrder)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer = _Answer(url=_saved(order))
    except Exception as error:  # any error of W&B is one sentence
        answer = _Answer(error=f"W&B: {short_error(error)}")
    sys.stdout.buffer.write(msgspec.json.encode(answer))
    return 0


def _saved(order: ReportOrder) -> str:
    """The address of the saved report."""
    import wandb_workspaces.reports.v2

    wr: Any = wandb_workspaces.reports.v2  # its names are not declared as exported
    report = wr.Report(entity=order.entity, project=order.project, title=order.title)
    wanted = order.group is not None
    filters = (
        f"Metric('Group') == '{order.group}'" if wanted else f"Metric('ID') in {order.run_ids}"
    )
    runs = wr.Runset(
        entity=order.entity, project=order.project, name=order.group or "runs", filters=filters
    )
    report.blocks = [
        wr.MarkdownBlock(order.markdown),
        wr.PanelGrid(runsets=[runs], panels=_panels(wr, order.num_ranks)),
    ]
    report.save()
    return str(report.url).replace("\\", "/")  # it is joined as a path of this system


def _panels(wr: Any, num_ranks: int) -> list[Any]:
    """Two in a row: loss by steps and by time, evaluation, speed; where each rank waits, and its
    memory; what differs."""
    ranks = range(num_ranks)
    line, bar = wr.LinePlot, wr.BarPlot
    panels = [
        line(title="Loss by step", x="Step", y=["train/loss"]),
        line(title="Loss by time", x="RelativeTime(Process)", y=["train/loss"]),
        line(title="Evaluation loss", x="Step", y=["eval/loss"]),
        bar(title="Throughput", metrics=["train/tokens_per_s"]),
        line(title="Seconds a step waits", x="Step", y=[f"rank{r}/wait_s" for r in ranks]),
        line(title="Memory", x="Step", y=[f"rank{r}/memory_bytes" for r in ranks]),
        wr.RunComparer(diff_only="split"),
    ]
    for index, panel in enumerate(panels):
        panel.layout = wr.Layout(x=12 * (index % 2), y=8 * (index // 2), w=12, h=8)
    return panels


if __name__ == "__main__":
    sys.exit(main())
