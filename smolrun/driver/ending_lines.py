"""How a run ended, read back from its summary.json and told as the run itself told it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smolrun.launch.supervisor_events import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from smolrun.sanitize import one_line
from smolrun.tracking.formatting import clock, counted
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.run_view import View

_EXIT_CODES = {"done": EXIT_DONE, "stopped": EXIT_STOPPED, "failed": EXIT_FAILED}


def exit_code(view: View) -> int:
    """The exit code that the run's driver had, or that fits what became of it."""
    code = view.summary.get("exit_code")
    return (
        code
        if isinstance(code, int) and 0 <= code < 256
        else _EXIT_CODES.get(view.state, EXIT_FAILED)
    )


def lines(folder: RunFolder, view: View) -> list[str]:
    """What is to be said about a run that has ended, or whose driver is gone."""
    summary = view.summary
    if view.state == "died":
        return [one_line(_died(folder, view)), f"go on with: {resume_command(folder)}"]
    told = [f"{view.state}{_reason(summary)}: {', '.join(_figures(summary))}"]
    told.append(f"everything about this run: {folder.path}")
    if view.state in ("stopped", "failed"):
        is_saved = summary.get("checkpoint") is not None
        told.append(f"go on with: {resume_command(folder)}" if is_saved else "nothing was saved")
    return [one_line(line) for line in told]


def resume_command(folder: RunFolder) -> str:
    """What goes on with the run."""
    return f"smolrun checkpoint.resume={folder.run_id}"


def _died(folder: RunFolder, view: View) -> str:
    host = view.driver.get("host")
    where = f" on {host}" if host else ""
    return (
        f"{folder.run_id} has no driver any more: its process{where} was killed, or the machine "
        "went down; its ranks ended with it"
    )


def _reason(summary: Mapping[str, Any]) -> str:
    return f" ({reason})" if (reason := summary.get("reason")) else ""


def _figures(summary: Mapping[str, Any]) -> list[str]:
    steps, wall_s = summary.get("steps"), summary.get("wall_s")
    figures = [counted(steps, "step") if isinstance(steps, int) else "unknown steps"]
    if isinstance(wall_s, int | float):
        figures[0] += f", {clock(wall_s)} from start to end"
    for key, name in (("final_train_loss", "loss"), ("final_eval_loss", "evaluation loss")):
        if isinstance(loss := summary.get(key), int | float):
            figures.append(f"{name} {loss:.4f}")
    return figures
