"""Makes the reference pages from the code: `make docs`; a test checks that they are up to date.

docs/configuration.md   every key and choice, from smolrun/config/ and conf/
docs/combinations.md    what goes with each algorithm: each cell is composed and checked
docs/outputs.md         the files of a run folder, from the classes of the events
docs/serving_api.md     the paths and fields of the HTTP API, from smolrun/serving/protocol.py
"""

from __future__ import annotations

import json
import re
import sys
import types
from collections import ChainMap
from collections.abc import Collection, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from pydantic import BaseModel

from smolrun.cli import choices, compose
from smolrun.cli.arguments import Arguments
from smolrun.config import RunConfig, validate
from smolrun.config.base import CustomTargetConfig
from smolrun.config.describe import NOT_BUILT, allowed_values, choices_of, keys_of, sections_of
from smolrun.errors import ConfigError
from smolrun.events import EVENTS, Event, ShardFailed, ShardSaved, kind
from smolrun.serving import api_reference
from smolrun.serving.api import build_routes
from smolrun.serving.frontend import Frontend
from smolrun.serving.generation import Service

DOCS = Path(__file__).resolve().parent

CONFIGURATION = """\
# Configuration

<!-- Made by `make docs` from smolrun/config/ and conf/. Change those, not this file. -->

A run is configured by choices and values. A choice picks a file of a group: `model=gpt_small` is
`conf/model/gpt_small.yaml`. A value sets one key: `training.steps=50`. `smolrun --cfg job` shows
what they give together, as composed, unchecked, and runs nothing.

- A folder `conf/` in the current folder has priority: `conf/cluster/home.yaml` is `cluster=home`,
  and a file with the name of a shipped one replaces it.
- Your own code: `model.target=my_code.model:build` (also `data.target`, `algorithm.target`). Every
  key beside `name` and `target` becomes a keyword argument of it. `model.loss=my_code:loss` trains
  any model with a loss of your own: [own_code.md](own_code.md#your-own-loss).
- Several runs: `smolrun -m algorithm=single,classicdp seed=1,2` runs all four combinations.
- What Hydra's grammar cannot parse is text where that is unambiguous: `data.path=größe.txt`.
  Values with commas, parentheses or quotes need quotes, inside those of the shell:
  `'data.path="a(b).txt"'`. `1e3` is an integer where one is asked for.
- Aliases: `algorithm=ddp` is `classicdp`, `training.gradient_checkpointing` is
  `training.recompute`; a task has short names of its keys: `task=stop run=NAME` is
  `task=stop stop.run=NAME`. `model.run=RUN` alone is `model=trained model.run=RUN`.
- `prompt=...` of task=generate and `system=...` of task=chat are text as they are typed.
- A key without a default must be given.
- All errors of names, keys and values are reported in one message, and nothing is started.

## Keys of the whole run
"""


COMBINATIONS = """\
# What goes together

<!-- Made by `make docs` from the checks in smolrun/config/ and from conf/. Change those, not this file. -->

`staleness.bound`, `quantization` and `mesh` for every algorithm. A combination that does not work is an
error before anything starts, for the reason below. `int8`, `fp16` and `bf16` are alike in this.
"""  # noqa: E501  (a comment of the page)

OUTPUTS = """\
# What a run leaves

<!-- Made by `make docs` from smolrun/events.py and docs/reference.py. Change those. -->

Every run makes a folder of its own, `outputs/<date>-<time>-<algorithm>-<model>-<four digits>/`,
below the folder you are in, and writes nowhere else but to the cache of prepared data. `run_name`
takes the place of algorithm and model. `outputs/latest` points to the newest run that began to
train. Wherever a run is asked for (`checkpoint.resume`, `model.run`, `attach.run`, `stop.run`),
`latest`, its name, any part of its name that no other run has, and its path mean it; a job of a
sweep is SWEEP/JOB. What a sweep leaves: [sweeps](sweeps.md).

| file | what it is |
| --- | --- |
| `config.yaml` | The configuration as it ran, with all choices and values resolved |
| `metrics.jsonl` | Every event of a training run, one JSON object a line, see below |
| `summary.json` | How the run ended, see below; written last |
| `tokenizer/tokenizer.json` | What turns text into tokens; only where the data is text |
| `checkpoints/step-00000100/` | All state after 100 steps; `manifest.json` is written last |
| `timeline.json` | What every rank did during a few steps, for https://ui.perfetto.dev |
| `driver.json` | Who drives the run: process, host, begin, steps |
| `driver.log` | What the driver said, where it has no terminal: `detach=true`, `driver=HOST`, \
jobs of sweeps |
| `remote.json` | Only with `driver=HOST`: on which machine the run is driven, and where it lies |
| `stop` | How often somebody asked the run to stop, by `task=stop` |
| `model/` | The shape of a model of transformers, for `task=export` |
| `logs/rank0-local.log` | What each rank printed, one file a rank, with the name of its host; \
the newest 32 MiB, and the 32 MiB before them in `rank0-local.log.1` |
| `logs/rank0-local.jsonl`, `logs/driver.jsonl` | The same as JSON, a record a line, and what the \
driver said: `task=logs` shows all in one order, see [logging](logging.md) |
| `wandb/`, `tensorboard/` | Only with these trackers, see [tracking](tracking.md) |
| `bench.jsonl` | Only for `task=bench`, instead of metrics and summary: one result a line |
| `comparison.html`, `.md`, `.csv` | Not in the folder but beside the runs, or in the sweep's: see \
[comparing runs](comparison.md) |

## summary.json

| key | meaning |
| --- | --- |
| `status` | `done`, `stopped` (by you) or `failed`; `serving` while a server runs |
| `url`, `model` | Only of `task=serve`: where it listens, and the name of the model there |
| `model_bytes`, `stages` | Only of `task=serve`: the weights of the whole model, and of each \
rank that holds layers `rank`, `host`, `layers` (first and last), `weight_bytes`, `cache_bytes` |
| `exit_code` | Of the command: 0 done, 3 failed, 130 stopped and saved, 131 stopped at once |
| `reason` | Why, as a sentence; also how a run that is done has diverged; else null |
| `diverged` | In the end the loss is no number, or its median over 10 steps is more than twice \
the first one (and 2), or 3 updates and more are skipped; `status` and `exit_code` stay |
| `failed_rank`, `failed_host` | Which rank broke the run; else null |
| `command`, `overrides` | What was typed, without passwords in URLs; null and empty where nothing \
was typed |
| `steps` | Optimizer steps done |
| `parameters` | Of the whole model; null: training did not begin |
| `tokens_per_s` | Of all ranks together, evaluations and earlier starts included; samples, where \
there is no text |
| `wall_s` | Seconds from command to end, preparing data and earlier starts included |
| `started_at`, `ended_at` | Dates of the last start and of the end, by the driver's clock |
| `end` | What the terminal showed, for `task=attach`, as text: `headline`, `figures`, `shares` of \
the time, `samples` and so on |
| `final_train_loss`, `final_eval_loss` | The last ones; null: none, or not a number |
| `final_eval_accuracy` | Share of right answers, for classes; else null |
| `checkpoint` | The newest one, below `checkpoints/`; null: none |
| `world_size`, `algorithm` | How many ranks shared the work, and how |
| `config_hash` | Equal for equal configurations |
| `versions` | Of smolrun, Python and torch |
| `host_versions` | Of each host reached over SSH, transformers too |
| `peak_memory_bytes` | Peak of each rank since the last start; null where unknown |
| `time` | Where the time went since the last start, as shares of 1, and what to try; null: no \
step was timed |
| `emulated` | The emulated hosts, a sentence each; empty: all times are real |
| `gradients_dropped` | Rank -> how many of its gradients came too late since the last start \
(`straggler_timeout_s`) |
| `pushes` | edp: rank -> what became of its gradients since the last start, see below; empty: no \
such server |
| `restarts` | One for each time that this command started the run again after a loss, see below |
| `departures` | One for each time that the run lost a rank since its last start and went on \
without it, see below |

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

STALENESS = {"synchronous": "staleness.bound=0", "staleness K": "staleness.bound=2"}
QUANTIZATION = {"unquantized": "quantization=none", "quantized": "quantization=int8"}
COLUMNS = {
    f"{when}, {how}": [staleness, quantization]
    for (when, staleness), (how, quantization) in product(STALENESS.items(), QUANTIZATION.items())
} | {"mesh=torch": ["mesh=torch"]}


def configuration() -> str:
    """docs/configuration.md: every key and choice."""
    shipped = [choices.shipped_folder()]
    groups = choices.groups(shipped)
    with compose.composing(Arguments()):
        base = compose.plain(compose.composed(Arguments()))
        lines = [CONFIGURATION, *_top_keys(base, groups)]
        for group, default in choices.defaults(shipped).items():
            names = sorted(groups[group], key=lambda name: (name != default, name))
            lines += ["", f"## {group}", "", *_choices(group, groups[group], default)]
            if group == "cluster":
                lines += _cluster()
            elif _is_section(group):
                lines += _keys(group, {name: _composed(group, name) for name in names})
    return "\n".join(lines) + "\n"


def _is_section(group: str) -> bool:
    field = RunConfig.model_fields.get(group)
    return field is not None and bool(sections_of(field))


def _composed(group: str, choice: str) -> Any:
    return compose.plain(compose.composed(Arguments([f"{group}={choice}"])))[group]


def _top_keys(base: Mapping[str, Any], groups: Collection[str]) -> Iterator[str]:
    """Keys without a folder of choices: of the run, and of single tasks."""
    yield from _table(("key", "default", "allowed", "meaning"))
    meanings = _comments(choices.shipped_folder() / "config.yaml")
    for path, field in keys_of(RunConfig):
        group, _, name = path.partition(".")
        if not name or group not in groups:
            value = base[group][name] if name else base[group]
            yield _row(f"`{path}`", _shown(value), allowed_values(field), meanings[path])


def _choices(group: str, names: Mapping[str, str], default: str) -> Iterator[str]:
    yield from _table(("choice", "what it is"))
    for name in sorted(names, key=lambda name: (name != default, name)):
        mark = " (default)" if name == default else ""
        yield _row(f"`{group}={name}`{mark}", names[name])
    later = NOT_BUILT.get(group)
    if later:
        yield from ("", f"Planned, not built yet: {', '.join(later)}.")


def _cluster() -> Iterator[str]:
    """A file of your own needs few keys here, so the classes have defaults; these are shown."""
    yield ""
    yield from _table(("key", "default", "allowed", "meaning"))
    for path, field in keys_of(RunConfig):
        if path.startswith("cluster."):
            default = "" if field.is_required() else _shown(_plain(field.default))
            yield _row(f"`{path}`", default, allowed_values(field), field.description or "")


def _keys(group: str, values: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """One table per class of the group, with one column per choice that is of this class.

    The meaning of a key is the comment in the first file of the class that has one, or else in any
    file of the group.
    """
    folder = choices.shipped_folder() / group
    comments = {name: _comments(folder / f"{name}.yaml") for name in values}
    for section in sections_of(RunConfig.model_fields[group]):
        names = [name for name, value in values.items() if _is_of(section, value)]
        keys = {
            path: field
            for path, field in keys_of(section)
            if path not in ("name", "target", "loss")
        }
        meanings = ChainMap(*(comments[name] for name in [*names, *values]))
        if not names or not keys:
            continue
        yield from ("", _first_line(section), "")
        yield from _table(("key", *names, "allowed", "meaning"))
        for path, field in keys.items():
            cells = [_shown(values[name][path]) if path in values[name] else "" for name in names]
            yield _row(f"`{group}.{path}`", *cells, allowed_values(field), meanings[path])


def _comments(file: Path) -> dict[str, str]:
    """Dotted key -> the comment beside it, and what follows below in the same column.

    An entry of the defaults list is a key of the whole run.
    """
    found: dict[str, str] = {}
    path: list[str] = []
    column = 0
    for line in file.read_text(encoding="utf-8").splitlines():
        before, _, comment = line.partition("# ")
        if key := re.match(r'( *)(- )?"?(\w+)"?:', before):
            path = [*path[: 0 if key[2] else len(key[1]) // 2], key[3]]
            column = len(before)
            if comment:
                found[".".join(path)] = comment
        elif comment and len(before) == column and path:
            found[".".join(path)] += f" {comment}"
    return found


def _is_of(section: type[BaseModel], value: Mapping[str, Any]) -> bool:
    if issubclass(section, CustomTargetConfig):
        return False
    tags = [tag for tag in ("target", "name", "kind") if tag in section.model_fields]
    tag = next((tag for tag in tags if choices_of(section.model_fields[tag])), None)
    return tag is None or value.get(tag) in choices_of(section.model_fields[tag])


def _first_line(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())


def _table(columns: tuple[str, ...]) -> Iterator[str]:
    yield _row(*columns)
    yield "|" + " --- |" * len(columns)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else value


def _shown(value: Any) -> str:
    is_word = isinstance(value, str) and value.strip() == value != ""
    return f"`{value if is_word else json.dumps(value)}`"


def combination_rows() -> list[list[str]]:
    """The choices of each row: every algorithm, with every stage or several replicas where it has
    some."""
    found = []
    with compose.composing(Arguments()):
        for name in sorted(choices.groups([choices.shipped_folder()])["algorithm"]):
            chosen = f"algorithm={name}"
            keys = compose.values(Arguments([chosen]))["algorithm"]
            stages = [f"algorithm.stage={stage}" for stage in range(4)] if "stage" in keys else []
            found += [[chosen, stage] for stage in stages] or [[chosen]]
            found += [[chosen, "algorithm.replicas=2"]] if "replicas" in keys else []
    return found


def _refusals() -> dict[tuple[str, str], str]:
    """Why each combination is refused, by row and column; empty where it works."""
    found = {}
    all_rows = combination_rows()
    with compose.composing(Arguments()):
        for row, (column, keys) in product(all_rows, COLUMNS.items()):
            single = ["cluster.ranks=1"] if row == ["algorithm=single"] else []
            single += ["model=moe_tiny"] if row == ["algorithm=ep"] else []
            data = compose.values(Arguments([*row, *keys, *single]))
            try:
                validate(data)
                found[" ".join(row), column] = ""
            except ConfigError as error:
                found[" ".join(row), column] = str(error)
    return found


def combinations() -> str:
    """docs/combinations.md: what goes with each algorithm, and why a combination is refused.

    Each cell is a configuration that was composed and checked.
    """
    return "\n".join([COMBINATIONS, *_refusal_table(_refusals())]) + "\n"


def _refusal_table(found: dict[tuple[str, str], str]) -> Iterator[str]:
    reasons = list(dict.fromkeys(why for why in found.values() if why))
    yield "| algorithm | " + " | ".join(COLUMNS) + " |"
    yield "|" + " --- |" * (len(COLUMNS) + 1)
    for row in dict.fromkeys(row for row, _ in found):
        cells = [found[row, column] for column in COLUMNS]
        shown = [f"refused ({reasons.index(why) + 1})" if why else "works" for why in cells]
        yield f"| `{row}` | " + " | ".join(shown) + " |"
    yield ""
    for number, why in enumerate(reasons, start=1):
        yield f"{number}. {why}"


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
    "expert_tokens.tokens": "Layer by layer, a list with the tokens of each expert",
    "dropped": "Choices of an expert that had no room; see model.moe.capacity_factor",
    "imbalance": "Tokens of the fullest expert of any layer, as a multiple of that layer's mean",
    "folder": "Its name below `checkpoints/`; the number in it counts updates",
    "bytes": "Size of all its files",
    "waited_s": "How long training paused for it, on the rank that waited longest",
    "write_s": "How long writing took, on the slowest rank, while training went on",
    "prompt": "How the text begins, or the question",
    "is_answer": "Whether the prompt is a question of a conversation",
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


def outputs() -> str:
    """docs/outputs.md: the files of a run folder, and the keys of every event."""
    lines = [OUTPUTS.rstrip("\n")]
    public = {name: event for name, event in EVENTS.items() if event not in PRIVATE}
    for name, event in public.items():
        lines += ["", f"### {name}", "", _described(event), "", "| key | type | meaning |"]
        lines += ["| --- | --- | --- |", *_event_keys(event)]
    return "\n".join(lines) + "\n"


def _described(event: type[Event]) -> str:
    return " ".join((event.__doc__ or "").split())


def _event_keys(event: type[Event]) -> Iterator[str]:
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


SERVING_API = """\
# The HTTP API

<!-- Made by `make docs` from smolrun/serving/protocol.py and docs/reference.py. Change those. -->

`smolrun task=serve` answers these paths on `http://127.0.0.1:7665`. A running server has this page
at `/docs`, as OpenAPI at `/openapi.json`, and a page to chat with at `/`.

- Programs for OpenAI's API work with `base_url="http://127.0.0.1:7665/v1"` and any `api_key`, or
  the server's own where it has one.
- Streams are server-sent events and end with `data: [DONE]`. Lines that begin with a colon are
  comments: how many requests are before it in the queue (`: queued 2`), that the model is being
  loaded, how far a long prompt is (`: prefill 512/2048`), that the connection is alive.
- Every error is `{"error": {"message", "type", "param", "code"}}` with a status of 400 or more;
  `param` names the field. In a stream that has begun it is an event, and `[DONE]` follows.
- 429 and 503 have `Retry-After`, in seconds, from the rate of the last answers.
- Fields that are not in these tables are ignored. A value that a table does not allow is refused.
- `x-request-id` of a request is that of its answer; without one, the server makes it.
- The header `x-smolrun-stream: ID` on `/v1/chat/completions` or `/v1/completions` with
  `stream=true` keeps the answer for 120 s after a lost connection. ID is 16 to 64 random letters,
  digits, `-` and `_`, chosen by the client and new for every request. Each event then has an
  `id:` line; `GET /v1/streams/ID` with `Last-Event-ID` gives those after it, and
  `DELETE /v1/streams/ID` stops the answer.
- `/metrics` needs no client: `smolrun_*`, and the same under the names of vLLM (`vllm:*`).
- What a model thinks before it answers is `reasoning_content`, beside `content`.
- In `/v1/completions` with `logprobs`, `top_logprobs` of a token also has the token itself; with
  `echo` it is there for the tokens of the prompt, but for the first one.
- The name of a control token, such as `<|im_end|>`, is text in a message; a tag such as `<think>`
  is the model's token, as in other servers.
- A model without a chat template continues the text of the messages; the header
  `x-smolrun-note` says so.
"""


def serving_api() -> str:
    """docs/serving_api.md: every path of the HTTP API with its fields."""
    no_prompts: Any = None  # the routes are described, not called
    service = Service("MODEL", no_prompts, Frontend(lambda _: None), [], history=DOCS)
    return SERVING_API + api_reference.markdown(build_routes(service).openapi())


def main(folder: Path) -> None:
    """Writes the pages into a folder."""
    for page in (configuration, combinations, outputs, serving_api):
        (folder / f"{page.__name__}.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
