"""serving.follow=run: the replicas of a server load the newest checkpoint of a run, one by one.

run's folder    step-00000300            looked at about once a second
server's folder weights/step-00000300    hard links: the run deletes its old checkpoints
rank 0          300 beside 200, or in its place once its requests have ended or moved
rank 1          the same, after rank 0 answers
"""

from __future__ import annotations

import math
import os
import queue
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

from smolrun.checkpoints.find import CHECKPOINTS, checkpoints_in, verify
from smolrun.config import RunConfig, world_size
from smolrun.config.models import TrainedConfig
from smolrun.config.suggest import problem
from smolrun.driver.engine_bridge import EngineBridge
from smolrun.driver.serving_model import other_checkpoint
from smolrun.driver.serving_replicas import ReplicaLoader
from smolrun.driver.serving_start import ModelLoader
from smolrun.errors import CheckpointError, ConfigError
from smolrun.launch.driver import Subscriber
from smolrun.serving.messages import NotLoaded, Ready
from smolrun.serving.source import ModelSource

_LOOK_EVERY_S = 1.0
_AGAIN_S = 5.0  # after a replica could not be taken out of use
_MOST_FAILURES = 2  # of a rank with a step


class FollowedRun:
    """The checkpoints of a run that still trains. `read(folder)` gives the model in one; it raises
    CheckpointError or ConfigError where that cannot be served."""

    def __init__(
        self,
        run_folder: Path,
        kept_in: Path,
        read: Callable[[Path], ModelSource],
        say: Callable[[str], None],
    ) -> None:
        self._folder = run_folder / CHECKPOINTS
        self._kept_in = kept_in
        self._read = read
        self._say = say
        self._skipped: dict[str, object] = {}  # by name: the files that it had

    def newest(self, than: int) -> ModelSource | None:
        """The newest whole checkpoint after step `than`, whose files stay until `release`; reads
        all of it. Each that is skipped is reported once, and tried again when its files change."""
        for step, folder in checkpoints_in(self._folder):
            if step <= than:
                break
            files = _files_of(folder)
            if self._skipped.get(folder.name) == files:
                continue
            try:
                return self._kept(folder)
            except (CheckpointError, ConfigError, OSError) as error:
                shutil.rmtree(self._kept_in / folder.name, ignore_errors=True)
                if not folder.is_dir():  # the run has deleted it
                    continue
                if folder.name not in self._skipped:
                    self._say(f"warning: {folder.name} is skipped: {error}; step {than} stays")
                self._skipped[folder.name] = files
        return None

    def release(self, steps: Collection[int]) -> None:
        """Delete the files of all other steps."""
        for step, folder in checkpoints_in(self._kept_in):
            if step not in steps:
                shutil.rmtree(folder, ignore_errors=True)

    def _kept(self, folder: Path) -> ModelSource:
        kept = self._kept_in / folder.name
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        for file in sorted(folder.iterdir()):
            try:
                os.link(file, kept / file.name, follow_symlinks=False)
            except (OSError, NotImplementedError):  # another disk, or one without hard links
                shutil.copyfile(file, kept / file.name, follow_symlinks=False)
        verify(kept)
        return self._read(kept)


def _files_of(folder: Path) -> object:
    """What changes when a checkpoint that is being copied grows."""
    try:
        found = [(file.name, file.lstat()) for file in sorted(folder.iterdir())]
    except OSError:
        return None
    return [(name, status.st_size, status.st_mtime_ns) for name, status in found]


class RollingReload(Subscriber):
    """Has the replicas load the newest checkpoint, one after the other: beside the weights that a
    replica answers with, or, where its memory does not allow that, once it runs no request. A
    replica is taken out of use only while another one answers, or where there is no other rank.

    All methods are called on the driver's thread; `then` of `vacate` may be on any."""

    def __init__(
        self,
        run: FollowedRun,
        first: ModelSource,
        loader: ReplicaLoader,
        bridge: EngineBridge,
        *,
        num_ranks: int,
        say: Callable[[str], None],
    ) -> None:
        """`first` is what the ranks begin with."""
        self._run, self._loader, self._bridge = run, loader, bridge
        self._num_ranks, self._say = num_ranks, say
        self._newest = first
        self._proven = {first.step: first}  # that a rank has answered with
        self._answers: dict[int, int] = {}  # by rank: the step of its weights
        self._given: dict[int, int] = {}  # by rank: the step that it loads
        self._failures: Counter[tuple[int, int]] = Counter()  # by rank and step
        self._busy: int | None = None  # the rank that loads the newest step
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._is_looking, self._due_s = False, -math.inf
        loader.source_of = self.source_of
        loader.on_refused = self.on_refused

    def source_of(self, rank: int) -> ModelSource:
        """What a new process of a rank loads: the newest that any rank answers with, unless this
        one has failed with it."""
        good = [step for step in self._proven if self._failures[rank, step] < _MOST_FAILURES]
        source = self._proven[max(good or self._proven)]
        self._given[rank] = source.step
        return source

    def on_ready(self, ready: Ready) -> None:
        """A replica answers, with the weights of `ready.version`."""
        rank, step = ready.stages[0].rank, ready.version
        self._answers[rank] = step
        self._given.pop(rank, None)
        if step == self._newest.step:
            self._proven[step] = self._newest
        if rank == self._busy:
            self._busy = None
        self._release()

    def on_exit(self, rank: int) -> None:
        """Its process may have ended by what it loaded."""
        self._answers.pop(rank, None)
        self._given.pop(rank, None)
        if rank == self._busy:
            self._failures[rank, self._newest.step] += 1
            self._busy = None

    def on_refused(self, news: NotLoaded) -> None:
        """A replica has not loaded the newest step, and answers with its old one."""
        rank = news.rank
        if rank != self._busy or news.version != self._newest.step:
            return
        if not news.lacks_memory:
            self._failures[rank, news.version] = _MOST_FAILURES
            self._busy = None
            self._bridge.reopen(rank)
            self._say(f"warning: rank {rank} stays with older weights: {news.reason}")
        elif self._num_ranks > 1 and not self._answers.keys() - {rank}:
            self._busy, self._due_s = None, time.monotonic() + _AGAIN_S
        else:
            self._say(
                f"rank {rank} takes no requests until it has loaded step {news.version}: "
                f"{news.reason}"
            )
            self._bridge.vacate(rank, lambda: self._calls.put(lambda: self._replace(news)))

    def on_poll(self) -> None:
        """Begin with the next replica; look for newer checkpoints once all have the newest."""
        while not self._calls.empty():
            self._calls.get()()
        if self._busy is not None or self._is_looking or time.monotonic() < self._due_s:
            return
        newest = self._newest.step
        behind = [
            rank
            for rank, step in sorted(self._answers.items())
            if step != newest and self._failures[rank, newest] < _MOST_FAILURES
        ]
        if behind:
            self._busy = behind[0]
            self._bring("beside")
        else:
            self._is_looking = True
            threading.Thread(target=self._look, name="smolrun-follow", daemon=True).start()

    def _bring(self, reload: Literal["beside", "alone"]) -> None:
        if self._busy is not None:
            self._given[self._busy] = self._newest.step
            self._loader.bring(self._busy, self._newest, reload)

    def _replace(self, news: NotLoaded) -> None:
        """A replica runs no request any more."""
        if news.rank == self._busy and news.version == self._newest.step:
            self._bring("alone")

    def _look(self) -> None:
        try:
            found = self._run.newest(self._newest.step)
        except OSError:  # the folder cannot be listed now
            found = None
        self._calls.put(lambda: self._take(found))

    def _take(self, found: ModelSource | None) -> None:
        self._is_looking, self._due_s = False, time.monotonic() + _LOOK_EVERY_S
        if found is not None:
            self._newest, self._due_s = found, -math.inf

    def _release(self) -> None:
        """The files that no rank has to read any more."""
        needed = {*self._answers.values(), *self._given.values(), self._newest.step}
        needed.add(max(self._proven))
        self._proven = {step: one for step, one in self._proven.items() if step in needed}
        self._run.release(needed)

    def on_end(self) -> None:
        """No rank reads anything any more."""
        self._run.release(())


def check_follow(config: RunConfig) -> None:
    """ConfigError where no run can be followed."""
    if not isinstance(config.model, TrainedConfig):
        raise ConfigError(problem("serving.follow", "run", "it needs model.run=RUN"))
    if config.serving.mode == "pipeline":
        what = "the stages of a pipeline cannot change their weights while answers run"
        raise ConfigError(problem("serving.follow", "run", what, allowed="serving=replicas"))


def rolling_reload(
    config: RunConfig,
    source: ModelSource,
    folder: Path,
    loader: ReplicaLoader | ModelLoader,
    bridge: EngineBridge,
    say: Callable[[str], None],
) -> list[RollingReload]:
    """With serving.follow one, for the run of a source; `folder` is the server's. ConfigError
    where it is of none."""
    if not config.serving.follow or not isinstance(loader, ReplicaLoader):
        return []
    checkpoints = Path(source.folder).parent
    if checkpoints.name != CHECKPOINTS:
        what = f"{source.folder} does not lie in the folder of a run"
        raise ConfigError(problem("serving.follow", "run", what))
    place = checkpoints.parent

    def read(checkpoint: Path) -> ModelSource:
        return other_checkpoint(source, place, checkpoint)

    run = FollowedRun(place, folder / "weights", read, say)
    if (first := run.newest(source.step - 1)) is None:
        raise ConfigError(problem("serving.follow", "run", f"{source.folder} is gone"))
    return [RollingReload(run, first, loader, bridge, num_ranks=world_size(config), say=say)]
