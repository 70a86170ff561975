"""docs/outputs.md: the files of a run folder, made from the classes of the events."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from smolrun.events import EVENTS, Event, ShardFailed, ShardSaved, kind

HEAD = """\
# What a run leaves

<!-- Made by `make docs` from smolrun/events.py and smolrun/cli/outputs.py. Change those. -->

Every run makes a folder of its own, `outputs/<date>-<time>-<algorithm>-<model>-<four digits>/`,
below the folder you are in, and writes nowhere else but to the cache of prepared data. `run_name`
takes the place of algorithm and model. `outputs/latest` points to the newest run.

| file | what it is |
| --- | --- |
| `config.yaml` | The configuration as it ran, with all choices and values resolved |
| `metrics.jsonl` | Every event of a training run, one JSON object a line, see below |
| `summary.json` | How the run ended, see below; written last |
| `tokenizer/tokenizer.json` | What turns text into tokens; only where the data is text |
| `checkpoints/step-00000100/` | All state after 100 steps; `manifest.json` is written last |
| `timeline.json` | What every rank did during a few steps, for https://ui.perfetto.dev |
| `driver.json` | Who drives the run: process, host, begin, steps |
| `driver.log` | What the driver said, where it has no terminal: `detach=true`, `driver=HOST` |
| `remote.json` | Only with `driver=HOST`: on which machine the run is driven, and where it lies |
| `stop` | How often somebody asked the run to stop, by `task=stop` |
| `model/` | The shape of a model of transformers, for `task=export` |
| `logs/rank0-local.log` | What each rank printed, one file a rank, with the name of its host; \
the newest 32 MiB, and the 32 MiB before them in `rank0-local.log.1` |
| `wandb/`, `tensorboard/` | Only with these trackers, see [tracking](tracking.md) |
| `bench.jsonl` | Only for `task=bench`, instead of metrics and summary: one result a line |

## summary.json

| key | meaning |
| --- | --- |
| `status` | `done`, `stopped` (by you) or `failed` |
| `exit_code` | Of the command: 0 done, 3 failed, 130 stopped and saved, 131 stopped at once |
| `reason` | Why, as a sentence; also how a run that is done has diverged; else null |
| `diverged` | In the end the loss is no number, or its median over 10 steps is more than twice \
the first one (and 2), or 3 updates and more are skipped; `status` and `exit_code` stay |
| `failed_rank`, `failed_host` | Which rank broke the run; else null |
| `steps` | Optimizer steps done |
| `wall_s` | Seconds from the command to the end, preparing data included |
| `final_train_loss`, `final_eval_loss` | The last ones; null: none, or not a number |
| `final_eval_accuracy` | Share of right answers, for classes; else null |
| `checkpoint` | The newest one, below `checkpoints/`; null: none |
| `world_size`, `algorithm` | How many ranks shared the work, and how |
| `config_hash` | Equal for equal configurations |
| `versions` | Of smolrun, Python and torch |
| `host_versions` | Of each host reached over SSH, transformers too |
| `peak_memory_bytes` | Peak of each rank; null where unknown |
| `time` | Where the time went, as shares of 1, and what to try; null: no step was timed |
| `emulated` | The emulated hosts, a sentence each; empty: all times are real |
| `gradients_dropped` | Rank -> how many of its gradients came too late (`straggler_timeout_s`) |
| `pushes` | edp: rank -> what became of its gradients, see below; empty: no such server |
| `restarts` | One for each time that the run was started again after a loss, see below |
| `departures` | One for each time that a run lost a rank and went on without it, see below |

Of a loss, with `cluster.restart`: `step` (steps done when it came), `lost_host`, `lost_rank`,
`reason`, `resumed_from` (steps in the checkpoint; 0: the beginning), `lost_steps` (made twice) and
`hosts` (those it went on with).

With `algorithm=edp`, the gradients of each rank: `pushes` (applied by the server),
`samples` and `share` of all samples, `mean_age` and `max_age` in updates, `dropped` (reason -> how
many; their samples went to others).

Of a departure: `rank`, `host`, `step` (of that rank), `after_s` (from the start of the ranks),
`reason`, `away_s` (until it was back; null: it never was) and `given_up` (it died at once too
often, so it was not started again).

## metrics.jsonl

Each line has its kind under `event`. `step` counts from 0 here, and from 1 in sentences. `time_s`
counts from the start of training. `rank` is null where an event is about the whole run. Numbers
that are not finite are written as null.

A long run has a row of every step of the whole run, but fewer of single ranks: after 64 MiB of
`rank_step` and `push` rows only those of every second step are written, after 64 MiB more those of
every fourth, and so on; a `note` says when. The file ends at 8 GiB, with a warning.
"""

# Between the ranks and the driver, which makes checkpoints of them: never in metrics.jsonl.
PRIVATE = (ShardSaved, ShardFailed)

MEANINGS = {
    "step": "Which optimizer step, counted from 0",
    "rank": "Whose event it is; null = the whole run's",
    "time_s": "Seconds since training began",
    "loss": "Mean loss of a target token, or of a sample's label; null = not a number",
    "grad_norm": "Gradient norm before clipping; null = the step was skipped",
    "lr": "Learning rate of the step; with edp before staleness_lr_scale, by the age of each push",
    "tokens": "Targets that the loss is a mean of, on all ranks together",
    "tokens_per_s": "Of this step alone; with late gradients steps come in bursts",
    "bytes_sent": "To other ranks, headers included",
    "bytes_received": "From other ranks, headers included",
    "compute_s": "Seconds spent computing",
    "wait_s": "Seconds spent waiting for other ranks",
    "waited_for": "The rank that was slowest; null = none",
    "samples": "Of the global batch, how many this rank computed in this step",
    "cpu_percent": "Load of the process; 100 = one core",
    "memory_bytes": "Memory of the process",
    "device_memory_bytes": "Memory on the accelerator",
    "device_util": "Load of the accelerator; 100 = always busy",
    "temperature_c": "Of the hottest sensor, in degrees Celsius",
    "throttled": "Whether the machine slowed itself down: heat, or a weak power supply",
    "spans": "[what, lane, step, start_s, duration_s] each; timeline.json is made of them",
    "hashes": "One per rank, in rank order",
    "ranks": "Those whose gradient was not finite",
    "drift.ranks": "Those that had differed from rank 0",
    "difference": "The largest of any number of a replica to rank 0's; null = not a number",
    "gradient_dropped.rank": "Whose gradient was late",
    "push.step": "The step that this update belongs to; its work item may be of another",
    "push.rank": "Who computed the gradient",
    "push_dropped.rank": "Who would have computed the gradient",
    "ticket": "Number of the work item: part (ticket mod m) of step (ticket / m), m pushes a step",
    "version": "Number of updates in the weights that it was computed with",
    "age": "Number of updates between those weights and this one",
    "reason": "Why it is not applied; the work item goes to another rank",
    "membership.rank": "Who has joined, or is gone",
    "is_here": "Whether it has joined",
    "membership.reason": "`joined`; `left` after a clean shutdown; else the reason of its loss",
    "tickets": "Number of work items that it held when it was lost",
    "so_far": "How many of this rank were, this one included, since it was started",
    "accuracy": "Share of right answers, for classes; else null",
    "gradients": "Layer -> norm of its mean gradient, before clipping",
    "norms.parameters": "Layer -> norm of its parameters after the update; null = not asked for",
    "updates": "Layer -> norm of what the update changed; null = not asked for",
    "folder": "Its name below `checkpoints/`; the number in it counts updates",
    "bytes": "Size of all its files",
    "waited_s": "How long training paused for it, on the rank that waited longest",
    "write_s": "How long writing took, on the slowest rank, while training went on",
    "prompt": "How the text begins",
    "text": "What the model wrote",
    "parameters": "Numbers the model learns",
    "steps": "Steps the run is to have",
    "train_size": "Samples to train on",
    "eval_size": "Samples kept for evaluation",
    "device": "Where rank 0 computes",
    "row": "The result, with all its figures",
    "level": "debug, info, warning or error",
    "message": "The sentence",
}


def text() -> str:
    """The whole page."""
    lines = [HEAD.rstrip("\n")]
    public = {name: event for name, event in EVENTS.items() if event not in PRIVATE}
    for name, event in public.items():
        lines += ["", f"### {name}", "", _told(event), "", "| key | type | meaning |"]
        lines += ["| --- | --- | --- |", *_keys(event)]
    return "\n".join(lines) + "\n"


def _told(event: type[Event]) -> str:
    return " ".join((event.__doc__ or "").split())


def _keys(event: type[Event]) -> Iterator[str]:
    types_of = get_type_hints(event)
    for field in msgspec.structs.fields(event):
        meaning = MEANINGS.get(f"{kind(event)}.{field.name}") or MEANINGS[field.name]
        yield f"| `{field.name}` | {_type(types_of[field.name])} | {meaning} |"


def _type(annotation: object) -> str:
    if get_origin(annotation) in (types.UnionType, Union):
        return " or ".join(_type(member) for member in get_args(annotation))
    if get_origin(annotation) is Literal:
        return "text"
    words = {
        int: "integer",
        float: "number",
        str: "text",
        bool: "true or false",
        type(None): "null",
        list[int]: "list of integers",
        list[str]: "list of text",
    }  # fmt: skip  (a table)
    return words.get(annotation, "object")  # type: ignore[call-overload,no-any-return]
