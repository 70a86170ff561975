"""The runs below `outputs/`: which there are, and the state of each.

Reads only the ends of long files, and trusts none: the figures of a damaged file are unknown.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict

import msgspec

from smolrun.checkpoints.run_names import latest_name, run_folder, runs_below, what_exists
from smolrun.errors import CheckpointError, SmolrunError
from smolrun.files import open_regular, read_yaml
from smolrun.sanitize import one_line
from smolrun.tracking.run_folder import SERVING, RunFolder

State = Literal[
    "running", "serving", "elsewhere", "remote", "unreachable",
    "done", "stopped", "failed", "died", "bench",
]  # fmt: skip

_TAIL_BYTES = (64 << 10, 1 << 20)  # the second only if the first holds no step
_MOST_STEPS = 1 << 53  # more is a damaged file
_QUIET_S = 3600.0  # a run of another host that wrote nothing for so long is no longer running


@dataclass(frozen=True)
class PastRun:
    """One run; None is unknown.

    `elsewhere`: started by another host, which may still drive it. `remote`: detached to another
    host, whose files are the current ones; `unreachable` if that host does not answer. `died`: no
    living driver and no summary. `step` counts completed steps, `left_s` is for running ones.
    """

    folder: RunFolder
    state: State
    step: int | None
    steps: int | None
    loss: float | None
    tokens_per_s: float | None
    left_s: float | None
    age_s: float
    checkpoint_bytes: int
    url: str | None = None  # of a server, once it answers

    @property
    def doing(self) -> str:
        """The state, and of a server its address."""
        return f"{self.state} at {one_line(self.url)}" if self.url else self.state

    @property
    def may_be_running(self) -> bool:
        """Whether its files must not be deleted."""
        return self.state in ("running", "serving", "elsewhere", "remote", "unreachable")


def run_folders(outputs: Path) -> list[RunFolder]:
    """All runs, newest first. A run is a folder, no link, with a configuration in it."""
    folders = [RunFolder(path) for path in runs_below(outputs)]
    return [folder for folder in folders if folder.config.is_file()]


def find_run(outputs: Path, wanted: str) -> RunFolder:
    """The run that `wanted` means, as checkpoints/run_names.py reads it: latest, a name or a part
    of one, SWEEP/JOB, a path, or one of its checkpoints. Its path is relative if `outputs` was and
    it lies there. CheckpointError lists those that exist."""
    path = run_folder(wanted, outputs)
    if not (path / "config.yaml").is_file():
        what = f"{path} is not the folder of a run: it has no config.yaml"
        raise CheckpointError(f"{what}{what_exists(outputs)}")
    is_here = path.is_relative_to(outputs.resolve())
    return RunFolder(outputs / path.relative_to(outputs.resolve()) if is_here else path)


def starting(outputs: Path) -> RunFolder | None:
    """The newest training run whose driver lives, or is another machine that has not been asked
    since training began, if it is newer than outputs/latest. None if there is none."""
    latest = latest_name(outputs)
    for folder in run_folders(outputs):
        if folder.run_id == latest:
            return None
        if may_live(folder) and (folder.driver().get("steps") or _trains_away(folder)):
            return folder
    return None


def _trains_away(folder: RunFolder) -> bool:
    """Whether this account started it on another machine, to train."""
    with contextlib.suppress(SmolrunError):
        return folder.remote() is not None and not is_server(folder)
    return False


def living_servers(outputs: Path) -> list[RunFolder]:
    """Servers whose driver lives or, if another machine drives them, may live; newest first."""
    return [folder for folder in run_folders(outputs) if may_live(folder) and is_server(folder)]


def may_live(folder: RunFolder) -> bool:
    """Whether the driver of a run lives here, or is said to live on another machine."""
    is_remote = folder.is_driven_elsewhere and not folder.driver() and not folder.summary()
    return is_remote or folder.driver_lives()


def is_server(folder: RunFolder) -> bool:
    """Whether a run is one of task=serve; not where that cannot be read."""
    try:
        return bool(msgspec.yaml.decode(read_yaml(folder.config))["task"] == "serve")
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def has_begun(folder: RunFolder) -> bool:
    """Whether a step was made."""
    return bool(_last_steps(folder.metrics))


def look(folder: RunFolder) -> PastRun:
    """The state and figures of one run."""
    state = state_of(folder)
    events = _last_steps(folder.metrics)
    last = events[-1] if events else None
    steps = _steps(folder)
    step = last["step"] + 1 if last is not None else None
    step_s = _mean_step_s(events)
    has_left = state == "running" and None not in (step, steps, step_s)
    return PastRun(
        folder=folder,
        state=state,
        step=step,
        steps=steps,
        loss=last.get("loss") if last is not None else None,
        tokens_per_s=_rate(events),
        left_s=max(0, steps - step) * step_s if has_left else None,  # type: ignore[operator]
        age_s=max(0.0, time.time() - _began(folder)),
        checkpoint_bytes=bytes_below(folder.checkpoints),
        url=_url(folder) if state == "serving" else None,
    )


def _url(folder: RunFolder) -> str | None:
    url = folder.summary().get("url")
    return url if isinstance(url, str) else None


def bytes_below(path: Path) -> int:
    """Of a file, or of all files of a folder; links are not followed. What is gone counts 0."""
    try:
        if path.is_symlink() or not path.is_dir():
            return path.lstat().st_size
        return sum(bytes_below(Path(entry)) for entry in os.scandir(path))
    except OSError:
        return 0


def state_of(folder: RunFolder) -> State:
    """Whether a run is running, and how it ended if it is not."""
    is_alive = folder.driver_lives()
    status = folder.summary().get("status")  # read last: a driver writes it last
    if status in ("done", "stopped", "failed"):
        return status  # type: ignore[no-any-return]
    if is_alive:
        return "serving" if status == SERVING else "running"
    driver = folder.driver()
    if driver and driver.get("host") != platform.node() and _quiet_s(folder) < _QUIET_S:
        return "elsewhere"
    if folder.is_driven_elsewhere:
        return "remote"
    return "bench" if (folder.path / "bench.jsonl").exists() else "died"


def is_over(state: State) -> bool:
    """Whether nothing more will come of the run."""
    return state not in ("running", "serving", "elsewhere", "remote")


def _quiet_s(folder: RunFolder) -> float:
    """Seconds since the run wrote something."""
    written = [_modified(folder.metrics), _modified(folder.path / "driver.json")]
    return time.time() - max(written)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _began(folder: RunFolder) -> float:
    """By the name, which keeps it when files are copied."""
    try:
        return datetime.strptime(folder.run_id[:15], "%Y%m%d-%H%M%S").astimezone().timestamp()
    except (ValueError, OverflowError, OSError):
        return _modified(folder.path)


def _steps(folder: RunFolder) -> int | None:
    """How many steps the run is to have."""
    steps = folder.driver().get("steps")
    if not isinstance(steps, int):
        try:
            config = msgspec.yaml.decode(read_yaml(folder.config))
            steps = config["training"]["steps"] if config.get("task") != "serve" else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None
    return steps if isinstance(steps, int) and 0 < steps <= _MOST_STEPS else None


class _StepLine(TypedDict):
    """A line of metrics.jsonl about a step, as far as it is read here."""

    event: Literal["step"]
    step: Annotated[int, msgspec.Meta(ge=0, le=_MOST_STEPS)]
    loss: NotRequired[float | None]
    tokens: NotRequired[Annotated[float, msgspec.Meta(ge=0, le=1e18)] | None]
    time_s: NotRequired[Annotated[float, msgspec.Meta(ge=0, le=1e12)] | None]


def _last_steps(metrics: Path) -> list[_StepLine]:
    """The last events of kind "step", oldest first."""
    for size in _TAIL_BYTES:
        if steps := list(_steps_in(_tail(metrics, size))):
            return steps
    return []


def _tail(path: Path, size: int) -> bytes:
    """The last `size` bytes of a file, from the beginning of a line on."""
    try:
        with open_regular(path) as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - size))
            data = file.read(size)
    except (OSError, ValueError):
        return b""
    return data if length <= size else data.partition(b"\n")[2]


def _steps_in(data: bytes) -> Iterator[_StepLine]:
    for line in data.splitlines():
        # Cut short, of another kind, or no line of ours.
        with contextlib.suppress(ValueError, RecursionError):
            yield msgspec.json.decode(line, type=_StepLine)


def _mean_step_s(events: list[_StepLine]) -> float | None:
    """Seconds for one of the last steps."""
    ends: list[tuple[int, float]] = [
        (event["step"], time_s) for event in events if (time_s := event.get("time_s"))
    ]
    if not ends:
        return None
    (first, began), (last, ended) = ends[0], ends[-1]
    if first == last:
        return ended / (last + 1)
    return (ended - began) / float(last - first) if last > first else None


def _rate(events: list[_StepLine]) -> float | None:
    """Tokens per second over the last steps: with late gradients single steps come in bursts."""
    step_s = _mean_step_s(events)
    tokens = [number for event in events if (number := event.get("tokens")) is not None]
    return sum(tokens) / len(tokens) / step_s if tokens and step_s else None
