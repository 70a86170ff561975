"""task=clean: what runs, unfinished checkpoints and the cache take on the disk.

Deletes what you say, nothing without an answer, and never a run that may be running.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from smolrun.checkpoints.folder import is_link, leftovers
from smolrun.checkpoints.run_names import SWEEPS
from smolrun.config import RunConfig
from smolrun.errors import CheckpointError
from smolrun.launch.supervisor_events import EXIT_DONE, EXIT_STOPPED
from smolrun.sanitize import echo, indented, one_line
from smolrun.sweep.attach import all_runs, is_sweep, look_at
from smolrun.tracking.drivers import LivingDriver, living_drivers
from smolrun.tracking.formatting import duration, size
from smolrun.tracking.past_runs import PastRun, bytes_below, look, run_folders
from smolrun.tracking.run_folder import LATEST, OUTPUTS, RunFolder
from smolrun.tracking.sweep_folder import sweep_folders

_DOOMED = ".deleting-"  # in front of a name: half a folder is never taken for a whole one
_CACHES = ("data", "models")
_HUB_MODELS = "models--"  # before a name in the hub's cache, with -- for its slash


@dataclass(frozen=True)
class Item:
    """Something that can be deleted. `keep` looks once more, and says why not after all."""

    path: Path
    what: str
    num_bytes: int
    keep: Callable[[], str | None] = lambda: None


def drive(config: RunConfig) -> int:
    """Lists everything, then asks about each; exit code 0, or 130 where the answers end."""
    runs = [look_at(folder) for folder in all_runs()]
    lists = {
        "unfinished": list(_unfinished(runs)),
        "cache": list(_unused(_cache(runs))),
        "runs": list(_unused(_run_item(run) for run in runs if not run.may_be_running)),
    }
    _show(runs, lists)
    if not any(lists.values()):
        return EXIT_DONE
    if not sys.stdin.isatty():
        echo("nothing is deleted without an answer: type `smolrun task=clean` in a terminal")
        return EXIT_DONE
    freed = 0
    try:
        for kind, items in lists.items():
            for item in chosen(items, kind, input):
                freed += _delete(item)
    except (EOFError, KeyboardInterrupt):
        echo(f"\nstopped; {size(freed)} freed")
        return EXIT_STOPPED
    finally:
        _mend_latest()
    echo(f"{size(freed)} freed")
    return EXIT_DONE


def chosen(items: list[Item], kind: str, ask: Callable[[str], str]) -> Iterator[Item]:
    """The items whose deletion is wanted; `all` takes the rest of this list without asking."""
    is_all = False
    for item in items:
        if not is_all:
            question = f"delete {item.what}, {size(item.num_bytes)}? [y/N/all {kind}] "
            answer = ask(question).strip().lower()
            is_all = answer in ("all", f"all {kind}")
            if not is_all and answer not in ("y", "yes"):
                continue
        yield item


def _show(runs: list[PastRun], lists: dict[str, list[Item]]) -> None:
    for run in runs:
        if run.may_be_running:
            num_bytes = bytes_below(run.folder.path)
            echo(f"{size(num_bytes):>8}  run {run.folder.run_id}: {run.state}, so it stays")
    for items in lists.values():
        for item in items:
            echo(f"{size(item.num_bytes):>8}  {item.what}")
    found = [item for items in lists.values() for item in items]
    paths = {item.path for item in found}
    # What lies within another item counts with that.
    total = sum(item.num_bytes for item in found if paths.isdisjoint(item.path.parents))
    echo(f"{size(total):>8}  in all" if found else "there is nothing to delete")


def _unused(items: Iterable[Item]) -> Iterator[Item]:
    """Without those that must stay, which are shown."""
    for item in items:
        if reason := item.keep():
            echo(f"{size(item.num_bytes):>8}  {item.what}: {reason}, so it stays")
        else:
            yield item


def _why_used(path: Path, caches_of: Sequence[RunFolder] | None = None) -> str | None:
    """Which living driver of this account uses a file or folder. `caches_of`: it is a cache, and
    these runs, which may be of drivers that have not said what they use, may need it."""
    drivers = living_drivers()
    known = {driver.folder for driver in drivers}
    others = [str(one.path.resolve()) for one in caches_of or () if one.driver_lives()]
    drivers += [LivingDriver(one) for one in others if one not in known]
    for driver in drivers:
        if driver.needs(path.resolve()) or (caches_of is not None and driver.uses is None):
            return f"{Path(driver.folder).name} uses it"
    return None


def _run_item(run: PastRun) -> Item:
    def keep() -> str | None:
        if look_at(run.folder).may_be_running:
            return "it is running now"
        return _why_used(run.folder.path)

    kind = "sweep" if is_sweep(run.folder) else "run"
    what = f"{kind} {run.folder.run_id} ({run.state}, {duration(run.age_s)} old)"
    num_bytes = bytes_below(run.folder.path)
    return Item(run.folder.path, what, num_bytes, keep)


def _unfinished(runs: list[PastRun]) -> Iterator[Item]:
    """What saves and deletions that died left in runs that are over."""
    for run in runs:
        keep = _run_item(run).keep
        try:
            found = [] if run.may_be_running else leftovers(run.folder.checkpoints)
        except CheckpointError as error:
            echo(indented(str(error)), error=True)
            continue
        for path in found:
            what = f"unfinished checkpoint {path.name} of {run.folder.run_id}"
            yield Item(path, what, bytes_below(path), keep)
    for path in sorted([*OUTPUTS.glob(f"{_DOOMED}*"), *OUTPUTS.glob(f"{SWEEPS}/{_DOOMED}*")]):
        yield Item(path, f"rest of a deleted run, {one_line(path.name)}", bytes_below(path))


def _cache(runs: list[PastRun]) -> Iterator[Item]:
    """Prepared data and fetched models; what a run needs again is made again."""
    cache = platformdirs.user_cache_path("smolrun")
    folders = [run.folder for run in runs]
    for folder in (cache / name for name in _CACHES):
        for path in _below(folder):
            yield from _cached(path, f"cached {folder.name}/{one_line(path.name)}", folders)
    if _below(cache / "parts"):
        yield from _cached(cache / "parts", "layers of served models", folders)
    from huggingface_hub.constants import HF_HUB_CACHE  # where other programs find them too

    for path in _below(Path(HF_HUB_CACHE)):
        if path.name.startswith(_HUB_MODELS) and path.is_dir():
            name = one_line(path.name.removeprefix(_HUB_MODELS).replace("--", "/"))
            yield from _cached(path, f"model {name} of the hub's cache", folders)


def _below(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(folder.iterdir())
    return []


def _cached(path: Path, what: str, runs: Sequence[RunFolder]) -> Iterator[Item]:
    with contextlib.suppress(OSError):  # another run may have taken it away
        idle_s = max(0.0, time.time() - path.stat().st_mtime)
        keep = functools.partial(_why_used, path, runs)
        yield Item(path, f"{what} ({duration(idle_s)} old)", bytes_below(path), keep)


def _delete(item: Item) -> int:
    """Deletes it; returns how many bytes are free now. Refusals are printed, not raised."""
    if reason := item.keep():
        echo(f"{item.what} stays: {reason}")
        return 0
    doomed = item.path
    num_bytes = bytes_below(doomed)
    try:
        if not item.path.name.startswith(_DOOMED):
            doomed = item.path.with_name(_DOOMED + item.path.name)
            os.rename(item.path, doomed)
        if doomed.is_dir() and not is_link(doomed):
            shutil.rmtree(doomed)
        else:
            doomed.unlink()
    except OSError as error:
        echo(indented(f"cannot delete all of {item.path}: {error}"), error=True)
        return max(0, num_bytes - bytes_below(doomed))
    return num_bytes


def _mend_latest() -> None:
    """outputs/latest points to a run that is there and has trained, or is gone too."""
    trained = (run for run in run_folders(OUTPUTS) if look(run).step is not None)
    _mend(OUTPUTS, trained)
    _mend(OUTPUTS / SWEEPS, (sweep.run for sweep in sweep_folders()))


def _mend(parent: Path, newest_first: Iterable[RunFolder]) -> None:
    latest = parent / LATEST
    with contextlib.suppress(OSError, ValueError):
        is_text = latest.is_file() and not latest.is_symlink()
        name = latest.read_text(encoding="utf-8").strip() if is_text else ""
        if latest.is_dir() or (name and (parent / name).is_dir()):
            return
        if not (latest.is_symlink() or is_text):
            return  # there never was one
        latest.unlink()
        if (newest := next(iter(newest_first), None)) is not None:
            newest.become_latest()
