"""The end of a training run: its outcome with advice, summary.json, the last lines of the terminal,
and the same read back from summary.json for attach and stop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import msgspec

from smolrun.checkpoints.run_names import named
from smolrun.config import RunConfig, config_hash, world_size
from smolrun.config.models import DecoderConfig, HuggingFaceConfig, SmolLM2Config
from smolrun.driver.preflight import emulated
from smolrun.driver.runs import config_of
from smolrun.driver.trackers import can_quantize
from smolrun.errors import CheckpointError, HostError, HostErrors
from smolrun.launch.machine_memory import gb
from smolrun.launch.supervisor_events import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, RunOutcome
from smolrun.sanitize import echo, indented, one_line
from smolrun.tracking.bottleneck import TimeReport
from smolrun.tracking.console import Console
from smolrun.tracking.formatting import accuracy, clock, counted, number, rate
from smolrun.tracking.past_runs import is_server
from smolrun.tracking.run_end import RunEnd
from smolrun.tracking.run_folder import OUTPUTS, RunFolder
from smolrun.tracking.run_record import RunRecord
from smolrun.tracking.run_view import Ended, View

_MOST_LOSS = 20.0  # of which a perplexity is shown
_SERVED = (DecoderConfig, HuggingFaceConfig, SmolLM2Config)  # models that write text, of ours
_LEARNT = (
    "how these texts sound, not what they say: it will make up names, numbers and facts. "
    "Search the texts themselves for those"
)
_PROMPTS = {"python_stdlib": "def main(", "shakespeare": "ROMEO:"}  # by data
_EXIT_CODES = {"done": EXIT_DONE, "stopped": EXIT_STOPPED, "failed": EXIT_FAILED}


def _is_pretrained(config: RunConfig) -> bool:
    """Whether the run began with weights that knew language already."""
    return bool(getattr(config.model, "pretrained", False) or config.checkpoint.weights)


def with_advice(config: RunConfig, outcome: RunOutcome) -> RunOutcome:
    """The outcome; of a run that ran out of memory with the settings that save most."""
    if not outcome.out_of_memory:
        return outcome
    try:
        from smolrun.driver.prepare import spec_of
        from smolrun.estimate.dry_run import estimate  # loads torch

        made = estimate(config, spec_of(config))
        now = made.total(made.places[0], made.setting)
        best = " or ".join(
            f"{remedy.keys[0]} (saves about {gb(now - remedy.total)})"
            for remedy in made.best_switches()
        )
    except Exception as error:  # a run that has failed must still say why
        best = f"a smaller training.micro_batch_size (no estimate: {error})"
    best = best or "fewer ranks on that host, or a smaller model"
    return dataclasses.replace(outcome, reason=f"{outcome.reason}; try {best}")


def not_equipped(error: HostError | HostErrors) -> RunOutcome:
    """A run that could not begin, because a host cannot have what its ranks need."""
    first = error.errors[0] if isinstance(error, HostErrors) else error
    host = first.host if isinstance(first, HostError) else None
    return RunOutcome("failed", EXIT_FAILED, str(error), failed_host=host, is_lost=host is not None)


@dataclass(frozen=True)
class RunSummary:
    """The end of a run: summary.json, and the last lines of the terminal."""

    config: RunConfig
    folder: RunFolder
    record: RunRecord
    times: TimeReport
    host_versions: Mapping[str, Mapping[str, str | None]]
    restarts: Sequence[Mapping[str, Any]] = ()
    earlier_wall_s: float = 0.0  # of the starts that a resumed run had before

    def report(self, outcome: RunOutcome, wall_s: float, console: Console) -> None:
        """Write summary.json, and print how the run ended."""
        end = self._end(outcome, wall_s, console)
        summary = {**self.summary(outcome, wall_s), "end": msgspec.to_builtins(end)}
        self._write_summary(summary)
        commands: list[tuple[str, str]] = []
        if outcome.status != "failed":  # of a failure stderr says more
            facts = Ended.read(summary)
            commands += _commands(
                self.config, self.folder, outcome.status, facts, is_short=console.is_live
            )
        console.show_end(dataclasses.replace(end, folder=str(self.folder.path), commands=commands))
        if outcome.status == "failed":
            console.log(f"error: {outcome.reason}")
            with contextlib.suppress(OSError):  # stderr is closed
                self._complain(outcome)

    def _end(self, outcome: RunOutcome, wall_s: float, console: Console) -> RunEnd:
        record, found = self.record, self.times.bottleneck
        reason = f" ({outcome.reason})" if outcome.status == "stopped" else ""
        if outcome.status == "done" and record.divergence:
            reason = " (diverged)"
        shown = record.sample or record.sample_before
        return RunEnd(
            status=outcome.status,
            headline=f"{outcome.status}{reason}: {record.progress(wall_s)}",
            figures=list(self._figures(outcome, console.unit)),
            shares=found.parts if found else (),
            advice=found.advice if found else "",
            time_line=self.times.line,
            notes=list(self._notes()),
            prompt=shown.prompt if shown else None,
            samples=list(self._samples()),
            is_answer=shown is not None and shown.is_answer,
        )

    def _figures(self, outcome: RunOutcome, unit: str) -> Iterator[tuple[str, str]]:
        record = self.record
        if record.train_loss is not None:
            yield "loss", f"{record.train_loss:.4f}"
        if record.eval_loss is not None:
            yield "evaluation loss", f"{record.eval_loss:.4f}"
            # Of the cross entropy of a token; e^20 is no model of anything.
            is_entropy = unit == "tokens" and self.config.model.loss is None
            if is_entropy and record.eval_loss < _MOST_LOSS:
                yield "perplexity", f"{math.exp(record.eval_loss):,.1f}"
        if record.eval_accuracy is not None:
            yield "accuracy", accuracy(record.eval_accuracy).removeprefix("accuracy ")
        if record.tokens_per_s is not None:
            yield f"{unit}/s", rate(record.tokens_per_s)
        peaks = [peak for peak in self._peak_memory(outcome) if peak is not None]
        if peaks:
            yield "peak memory", f"{gb(max(peaks))}{' a rank' if len(peaks) > 1 else ''}"

    def _samples(self) -> Iterator[tuple[str, str]]:
        before, after = self.record.sample_before, self.record.sample
        for sample, when in ((before, " before"), (after, " after")):
            if sample is not None:
                what = "answer" if sample.is_answer else "sample"
                yield f"{what}{when if before is not None else ''}", sample.text

    def _notes(self) -> Iterator[tuple[str, str]]:
        record = self.record
        if record.missed:
            yield "steps missed", record.missed
        if record.pushes.line:
            yield "updates by worker", record.pushes.line
        if advice := record.pushes.advice(can_quantize=can_quantize(self.config)):
            yield "slow links", advice
        if self.config.data.name == "text" and _is_pretrained(self.config):
            yield "learnt", _LEARNT
        if record.divergence:
            yield "the run diverged", f"{record.divergence}; a lower optimizer.lr may help"

    def _peak_memory(self, outcome: RunOutcome) -> list[int | None]:
        reports = outcome.summaries
        size = world_size(self.config)
        return [reports.get(r, {}).get("peak_memory_bytes") for r in range(size)]

    def summary(self, outcome: RunOutcome, wall_s: float) -> dict[str, Any]:
        """The content of summary.json. Its keys are a contract: other programs read them."""
        config = self.config
        ended = datetime.now().astimezone()
        started = ended - timedelta(seconds=wall_s)
        return {
            "status": outcome.status,
            "exit_code": outcome.exit_code,
            "reason": outcome.reason or self.record.divergence or None,
            "failed_rank": outcome.failed_rank,
            "failed_host": outcome.failed_host,
            "command": shlex.join(["smolrun", *config.typed]) if config.typed else None,
            "overrides": [word for word in config.typed if not word.startswith("-")],
            **self.record.summary(),
            "wall_s": round(self.earlier_wall_s + wall_s, 3),
            "started_at": started.isoformat(timespec="seconds"),
            "ended_at": ended.isoformat(timespec="seconds"),
            "world_size": world_size(config),
            "algorithm": config.algorithm.name,
            "config_hash": config_hash(config),
            "versions": outcome.versions,
            "host_versions": self.host_versions,
            "peak_memory_bytes": self._peak_memory(outcome),
            "time": self.times.summary(),
            "restarts": self.restarts,
            "departures": outcome.departures,
            "emulated": emulated(config),
        }

    def _write_summary(self, summary: Mapping[str, Any]) -> None:
        try:
            self.folder.write_summary(summary)
        except OSError as error:
            where = self.folder.path
            echo(f"smolrun: cannot write the summary of {where}: {error}", error=True)

    def _complain(self, outcome: RunOutcome) -> None:
        """Why the run failed, and the last lines of the log of the rank that broke it."""
        echo(indented(f"smolrun: {outcome.reason}"), error=True)
        for line in outcome.log_tail:
            echo(f"  | {one_line(line)}", error=True)
        if self.record.checkpoint is not None:
            command = f"smolrun checkpoint.resume={name_to_type(self.folder)}"
            text = f"to resume from {self.record.checkpoint}: {command}"
        elif every := self.config.checkpoint.every:
            often = "every step" if every == 1 else f"every {every:,} steps"
            text = f"no checkpoint yet: one is saved {often} (checkpoint.every)"
        else:
            text = "no checkpoints are saved: checkpoint.every=100 saves one every 100 steps"
        echo(f"smolrun: {text}", error=True)


def exit_code(view: View) -> int:
    """The exit code of the run's driver; if unknown, by the run's state."""
    code = view.ended.exit_code
    return _EXIT_CODES.get(view.state, EXIT_FAILED) if code is None else code


def end_of(folder: RunFolder, view: View, *, is_short: bool = False) -> RunEnd:
    """The end of a run that another process drove, or whose driver has died: as it was shown there,
    with the commands that are right here. `is_short`: with short names of runs."""
    ended = view.ended
    if view.state == "died":
        resume = [] if is_server(folder) else [("to resume", resume_command(folder))]
        return RunEnd("died", _died(folder, view), commands=resume)
    reason = f" ({ended.reason})" if ended.reason else ""
    if ended.url is not None:  # a server saves nothing
        served = f"served for {clock(ended.wall_s)}" if ended.wall_s is not None else "served"
        headline = f"{view.state}{reason}: {served}"
        return RunEnd(view.state, headline, folder=str(folder.path))
    shown = RunEnd.read(view.summary.get("end")) or _by_figures(view.state, ended)
    if view.state == "failed":  # the run itself said the reason on stderr
        shown = dataclasses.replace(
            shown, headline=shown.headline.replace("failed:", f"failed{reason}:", 1)
        )
    commands = list(_commands(config_of(folder), folder, view.state, ended, is_short=is_short))
    return dataclasses.replace(shown, folder=str(folder.path), commands=commands)


def _by_figures(state: str, ended: Ended) -> RunEnd:
    """Of a run of an earlier version, or one whose summary is damaged."""
    reason = f" ({ended.reason})" if ended.reason and state != "failed" else ""
    steps = "unknown steps" if ended.steps is None else counted(ended.steps, "step")
    took = "" if ended.wall_s is None else f", {clock(ended.wall_s)} from start to end"
    losses = {"loss": ended.final_train_loss, "evaluation loss": ended.final_eval_loss}
    figures = [(name, number(loss)) for name, loss in losses.items() if loss is not None]
    return RunEnd(state, f"{state}{reason}: {steps}{took}", figures)


def _commands(
    config: RunConfig | None, folder: RunFolder, status: str, ended: Ended, *, is_short: bool
) -> Iterator[tuple[str, str]]:
    """What can be done next. Without a configuration, only what every run can."""
    name = name_to_type(folder, is_short=is_short)
    if ended.checkpoint is None:
        if status != "done":
            yield "to resume", "no checkpoint was saved"
    elif status != "done":
        yield "to resume", f"smolrun checkpoint.resume={name}"
    elif not ended.diverged:
        if config is not None:
            yield _first_use(config, folder, name)
        yield "to export it", f"smolrun task=export model.run={name}"
        if ended.steps is not None:
            steps = f"training.steps={2 * ended.steps}"
            yield "to train longer", f"smolrun checkpoint.resume={name} {steps}"


def _first_use(config: RunConfig, folder: RunFolder, name: str) -> tuple[str, str]:
    if isinstance(config.model, _SERVED) and config.data.produces == "tokens":
        return "to talk to it", f"smolrun {_talk(config, folder)} model.run={name}"
    return "in Python", f'model, tokenizer = smolrun.load("{name}")'


def _talk(config: RunConfig, folder: RunFolder) -> str:
    from smolrun.serving.text import has_template  # loads the tokenizers

    with contextlib.suppress(OSError, ValueError):
        if has_template(folder.path / "tokenizer"):
            return "task=chat"
    prompt = _PROMPTS.get(config.data.name, "Once upon a time")
    return f'task=generate prompt="{prompt}"'


def resume_command(folder: RunFolder) -> str:
    """The command that resumes the run."""
    return f"smolrun checkpoint.resume={name_to_type(folder)}"


def name_to_type(folder: RunFolder, *, is_short: bool = False) -> str:
    """What to type for this run: its name below outputs/, the end of it where that is enough and
    `is_short`; elsewhere its path."""
    if folder.path.parent.resolve() != OUTPUTS.resolve():
        return str(folder.path)
    end = folder.run_id.rpartition("-")[2]
    with contextlib.suppress(CheckpointError):
        if is_short and named(end, OUTPUTS) == folder.path.resolve():
            return end
    return folder.run_id


def _died(folder: RunFolder, view: View) -> str:
    host = view.driver.get("host")
    where = f" on {host}" if host else ""
    return (
        f"{folder.run_id} has no driver: its process{where} was killed, or the machine went down; "
        "its ranks ended with it"
    )
