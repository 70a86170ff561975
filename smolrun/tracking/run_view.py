"""One request about a run's folder: the state of the run, and what was written since the last one.

The folder may lie on another machine: `python -m smolrun.tracking.run_view` answers one request, a
line of JSON on stdin, by one line on stdout. So runs driven here and elsewhere are shown and
stopped alike. Starts no process and keeps no file open.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec

from smolrun.errors import SmolrunError
from smolrun.files import open_regular
from smolrun.tracking.api_key import LAN, link
from smolrun.tracking.history import Past, past
from smolrun.tracking.past_runs import State, has_begun, is_over, look, state_of
from smolrun.tracking.run_folder import SERVING, DriverRecord, RunFolder
from smolrun.tracking.server_load import ServerLoad, server_load

ANSWER = "smolrun-run-view: "  # a shell may print lines of its own before
_HISTORY_BYTES = 16 << 10
_MOST_BYTES = 256 << 10  # of a file in one response


_Whole = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=1e18)]


class FilePosition(msgspec.Struct, frozen=True):
    """How far a file was read. `file` (inode) distinguishes it from a later one of that name."""

    file: int
    offset: int


class Chunk(msgspec.Struct, frozen=True):
    """Complete lines, and the position of the next ones. Without a `place` there is no file."""

    lines: list[str] = []
    place: FilePosition | None = None
    is_fresh: bool = False  # not a continuation: the last lines of a file


class Request(msgspec.Struct, frozen=True):
    """A request about the run in `folder`; `stop` asks its driver to stop, `link` for the link of a
    server, which holds the API key; `server` for what a server says of its load.

    A file is read from the position given, or, without one, from its last few lines; with `history`
    the metrics from where that ends.
    """

    folder: str
    stop: bool = False
    figures: bool = False
    link: bool = False
    reads: bool = False
    history: bool = False
    server: bool = False
    metrics: FilePosition | None = None
    log: FilePosition | None = None


class Figures(TypedDict, total=False):
    """As of `PastRun`."""

    step: _Whole | None
    steps: _Whole | None
    loss: float | None
    tokens_per_s: _Amount | None
    left_s: _Amount | None
    age_s: _Amount
    checkpoint_bytes: _Whole


class Ended(msgspec.Struct, frozen=True):
    """What summary.json says of the end of a run, as far as it has these types; any program may
    have written the file."""

    exit_code: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None
    reason: str | None = None
    url: str | None = None
    checkpoint: str | None = None
    diverged: bool = False
    steps: _Whole | None = None
    wall_s: _Amount | None = None
    final_train_loss: float | None = None
    final_eval_loss: float | None = None

    @classmethod
    def read(cls, summary: dict[str, Any]) -> Ended:
        """Values of other types count as absent."""
        found: dict[str, Any] = {}
        for field in msgspec.structs.fields(cls):
            with contextlib.suppress(msgspec.ValidationError, KeyError):
                found[field.name] = msgspec.convert(summary[field.name], field.type)
        return cls(**found)


class View(msgspec.Struct, frozen=True):
    """The response. The files were read at other moments than `state`.

    `asked` counts the stop requests; `figures` are those of a `PastRun`.
    """

    state: State
    driver: DriverRecord = {}
    summary: dict[str, Any] = {}
    asked: int = 0
    has_begun: bool = False  # a step was made
    figures: Figures = {}
    link: str | None = None  # to be shown on a terminal alone
    past: Past | None = None
    server: ServerLoad | None = None
    metrics: Chunk = Chunk()
    log: Chunk = Chunk()

    @property
    def ended(self) -> Ended:
        """The summary, by type."""
        return Ended.read(self.summary)

    @property
    def has_ended(self) -> bool:
        """Whether the run has ended."""
        return is_over(self.state)


def answer(request: Request) -> View:
    """Answer one request; OSError if the stop request cannot be written."""
    folder = RunFolder(Path(request.folder))
    if request.stop:
        folder.ask_to_stop()
    state = state_of(folder)
    driver = folder.driver()
    metrics, earlier = request.metrics, None
    if request.reads and request.history:
        earlier = past(folder.metrics)
        metrics = FilePosition(earlier.file, earlier.begin)
    return View(
        state=state,
        driver=driver,
        summary=folder.summary(),
        asked=folder.stop_requests(),
        has_begun=has_begun(folder),
        figures=_figures(folder) if request.figures else {},
        link=_link(folder) if request.link and state == SERVING else None,
        past=earlier,
        server=server_load(folder.summary()) if request.server and state == SERVING else None,
        metrics=read_on(folder.metrics, metrics) if request.reads else Chunk(),
        log=read_on(folder.driver_log, request.log)
        if request.reads and driver.get("has_log")
        else Chunk(),
    )


def read_on(path: Path, place: FilePosition | None) -> Chunk:
    """The lines of a file from a position, at most _MOST_BYTES of them."""
    try:
        with open_regular(path) as file:
            found = os.fstat(file.fileno())
            is_same = place is not None and place.file == found.st_ino
            is_fresh = place is None or not is_same or place.offset > found.st_size
            begin = max(0, found.st_size - _HISTORY_BYTES) if is_fresh else place.offset  # type: ignore[union-attr]
            file.seek(begin)
            data = file.read(_MOST_BYTES)
    except (OSError, ValueError):
        return Chunk()
    # A line that is still being written waits, unless it is too long to be one of ours.
    end = data.rfind(b"\n") + 1 or (len(data) if len(data) == _MOST_BYTES else 0)
    skipped = data.find(b"\n", 0, end) + 1 if is_fresh and begin > 0 else 0
    text = data[skipped:end].decode("utf-8", "replace").removesuffix("\n")
    lines = text.split("\n") if text else []
    return Chunk(lines, FilePosition(found.st_ino, begin + end), is_fresh)


def _figures(folder: RunFolder) -> Figures:
    run = look(folder)
    found: Figures = {name: getattr(run, name) for name in Figures.__annotations__}  # type: ignore[assignment]
    return found


def _link(folder: RunFolder) -> str | None:
    """The link of a server that serves the LAN; None of another."""
    summary = folder.summary()
    if summary.get("bind") != LAN:
        return None
    with contextlib.suppress(SmolrunError):  # the server has its key, which is not shown
        return link(str(summary.get("url")))
    return None


def decode(output: str) -> View | None:
    """The response in the output of the command; None if there is none."""
    lines = [line for line in output.split("\n") if line.startswith(ANSWER)]
    try:
        return msgspec.json.decode(lines[-1].removeprefix(ANSWER), type=View) if lines else None
    except (ValueError, RecursionError):
        return None


def main() -> int:
    """Answer the request on stdin."""
    view = answer(msgspec.json.decode(sys.stdin.buffer.read(), type=Request))
    sys.stdout.buffer.write(ANSWER.encode() + msgspec.json.encode(view) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
