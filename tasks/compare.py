"""task=compare: runs or a sweep side by side, as a page, Markdown, CSV and a table.

    task=compare                             the newest sweep, else the five newest runs
    task=compare runs=RUN,RUN                runs, jobs (SWEEP/JOB), by name or path
    task=compare runs=RUN                    one run: its figures and plots
    task=compare sweep=latest                a sweep
    task=compare metric=tokens_per_s         sorted by that
    task=compare out=FOLDER                  the result goes there, not beside the runs

Only reads run folders, as data; starts nothing.
"""

from __future__ import annotations

from pathlib import Path

from smolrun.comparison import compare_runs
from smolrun.comparison.selection import select
from smolrun.config import RunConfig
from smolrun.errors import ConfigError
from smolrun.launch.supervisor_events import EXIT_DONE
from smolrun.sanitize import echo
from smolrun.tracking.run_folder import OUTPUTS


def drive(config: RunConfig) -> int:
    """Compares what `compare.runs` and `compare.sweep` name; exit code 0, or ConfigError where
    there is nothing of that name, or the result cannot be written."""
    wanted = config.compare
    selection = select(wanted.runs, wanted.sweep, OUTPUTS)
    out = Path(wanted.out).expanduser() if wanted.out else None
    metric = None if wanted.metric == "auto" else wanted.metric
    try:
        page = compare_runs(selection, say=echo, metric=metric, out=out, online=wanted.wandb)
    except OSError as error:
        where = error.filename or out or selection.out
        text = f"{where}: cannot be written: {error.strerror or error}; compare.out names a folder"
        raise ConfigError(text) from error
    echo(f"comparison: {page}, .md, .csv")
    return EXIT_DONE
