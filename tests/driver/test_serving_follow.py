"""serving.follow without processes: which checkpoints are taken, and which replica loads next."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from smolrun.cli.compose import compose
from smolrun.driver.serving import serving_config
from smolrun.driver.serving_follow import FollowedRun, RollingReload
from smolrun.driver.serving_model import other_checkpoint
from smolrun.errors import ConfigError
from smolrun.models.trained import trained_model
from smolrun.serving.messages import NotLoaded, Ready, StageStats
from smolrun.serving.source import source_of_checkpoint
from tests.driver.test_serving_replicas import SOURCE
from tests.serving.followed_run import add_checkpoint, make_run
from tests.waiting import until

Following = tuple[FollowedRun, Path, list[str]]


@pytest.fixture
def following(tmp_path: Path) -> Following:
    run, said = make_run(tmp_path / "run"), list[str]()
    first = source_of_checkpoint(trained_model(run, add_checkpoint(run, 1)), "mine")
    kept = tmp_path / "server" / "weights"
    return (
        FollowedRun(run, kept, lambda found: other_checkpoint(first, run, found), said.append),
        run,
        said,
    )


def test_the_newest_checkpoint_is_kept_though_the_run_deletes_it(following: Following) -> None:
    followed, run, said = following
    add_checkpoint(run, 2)
    newest = add_checkpoint(run, 3)
    (run / "checkpoints" / "step-00000004.part-x").mkdir()  # being written
    source = followed.newest(1)
    assert source is not None and (source.step, source.name) == (3, "mine")
    shutil.rmtree(newest)
    assert (Path(source.folder) / "manifest.json").is_file()
    assert followed.newest(3) is None
    followed.release({3})
    assert Path(source.folder).is_dir()
    followed.release(())
    assert not Path(source.folder).exists()
    assert said == []


def test_a_damaged_one_is_skipped_with_one_line_and_taken_once_it_is_whole(
    following: Following,
) -> None:
    followed, run, said = following
    whole = add_checkpoint(run, 3)
    file = next(whole.glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for _ in range(2):
        assert followed.newest(1) is None
    (line,) = said
    assert "step-00000003 is skipped: " in line
    assert line.endswith("is damaged: its bytes are not what was written; step 1 stays")
    file.write_bytes(content[:40])  # half of it, as of a copy that goes on
    assert followed.newest(1) is None
    file.write_bytes(content)
    source = followed.newest(1)
    assert source is not None and source.step == 3 and len(said) == 1


def test_another_architecture_is_refused_with_a_sentence_and_an_older_one_taken(
    following: Following,
) -> None:
    followed, run, said = following
    add_checkpoint(run, 2)
    add_checkpoint(run, 3, width=64)
    source = followed.newest(1)
    assert source is not None and source.step == 2
    assert "step-00000003 is skipped: model mine: " in said[0] and "has shape" in said[0]
    config = msgspec.yaml.decode((run / "config.yaml").read_bytes())
    config["model"]["width"] = 64
    (run / "config.yaml").write_bytes(msgspec.yaml.encode(config))
    add_checkpoint(run, 4, width=64)
    assert followed.newest(2) is None
    assert "it is of another architecture: its shape has changed" in said[1]


class Fakes:
    """A loader and a bridge that keep what they are asked for."""

    def __init__(self, ranks: int) -> None:
        self.brought: list[tuple[int, int, str]] = []
        self.vacated: list[tuple[int, Callable[[], None]]] = []
        self.reopened: list[int] = []
        self.said: list[str] = []
        self.there: list[int] = []  # steps in the run's folder
        self.released: set[int] = set()
        fake: Any = self
        first = msgspec.structs.replace(SOURCE, step=1)
        self.roll = RollingReload(fake, first, fake, fake, num_ranks=ranks, say=self.said.append)
        for rank in range(ranks):
            self.ready(rank, 1)

    def newest(self, than: int) -> Any:
        found = max(self.there, default=0)
        return msgspec.structs.replace(SOURCE, step=found) if found > than else None

    def release(self, steps: set[int]) -> None:
        self.released = set(steps)

    def bring(self, rank: int, source: Any, reload: str) -> None:
        self.brought.append((rank, source.step, reload))

    def vacate(self, rank: int, then: Callable[[], None]) -> None:
        self.vacated.append((rank, then))

    def reopen(self, rank: int) -> None:
        self.reopened.append(rank)

    def ready(self, rank: int, step: int) -> None:
        stages = [StageStats(rank, "here", 0, 3)]
        self.roll.on_ready(Ready(100, 1000, 2, stages, version=step))

    def next(self) -> tuple[int, int, str]:
        """What is brought next; the folder is looked at in a thread."""
        until(lambda: not self.roll.on_poll() and bool(self.brought))
        assert len(self.brought) == 1
        return self.brought.pop()


def test_replicas_load_one_after_the_other_and_steps_in_between_are_skipped() -> None:
    fakes = Fakes(3)
    fakes.there = [2]
    assert fakes.next() == (0, 2, "beside")
    fakes.there = [2, 3, 4]
    fakes.roll.on_poll()
    assert not fakes.brought  # not before rank 0 answers
    fakes.ready(0, 2)
    assert fakes.next() == (1, 2, "beside")
    fakes.ready(1, 2)
    assert fakes.released >= {1, 2}
    assert fakes.next() == (2, 2, "beside")
    fakes.ready(2, 2)
    assert fakes.released == {2}
    assert fakes.next() == (0, 4, "beside")


def test_without_memory_for_both_one_is_taken_out_of_use_at_a_time() -> None:
    fakes = Fakes(2)
    fakes.there = [2]
    assert fakes.next() == (0, 2, "beside")
    fakes.roll.on_refused(NotLoaded(0, 2, "they need 9 GB beside the old ones", True))
    ((rank, then),) = fakes.vacated
    fakes.roll.on_poll()
    assert (rank, fakes.brought) == (0, [])  # its requests run
    assert "rank 0 takes no requests until it has loaded step 2: they need 9 GB" in fakes.said[0]
    then()
    assert fakes.next() == (0, 2, "alone")
    fakes.ready(0, 2)
    assert fakes.next() == (1, 2, "beside")
    fakes.roll.on_exit(0)  # meanwhile
    fakes.roll.on_refused(NotLoaded(1, 2, "they need 9 GB beside the old ones", True))
    fakes.roll.on_poll()
    assert len(fakes.vacated) == 1 and not fakes.brought  # it is the only one that answers


def test_a_server_of_one_replica_says_that_it_loads() -> None:
    fakes = Fakes(1)
    fakes.there = [2]
    assert fakes.next() == (0, 2, "beside")
    fakes.roll.on_refused(NotLoaded(0, 2, "no memory", True))
    assert [rank for rank, _ in fakes.vacated] == [0]


def test_what_a_replica_cannot_load_stays_away_from_it_until_the_next_step() -> None:
    fakes = Fakes(2)
    fakes.there = [2]
    assert fakes.next() == (0, 2, "beside")
    fakes.roll.on_refused(NotLoaded(0, 2, "the disk is full"))
    assert fakes.said == ["warning: rank 0 stays with older weights: the disk is full"]
    assert fakes.next() == (1, 2, "beside")
    fakes.ready(1, 2)
    assert fakes.roll.source_of(0).step == 1 and fakes.roll.source_of(1).step == 2
    fakes.there = [3]
    assert fakes.next() == (0, 3, "beside")


def test_a_process_that_ends_while_it_loads_gets_proven_weights_and_a_second_try() -> None:
    fakes = Fakes(2)
    fakes.there = [2]
    for _ in range(2):
        assert fakes.next() == (0, 2, "beside")
        fakes.roll.on_exit(0)
        assert fakes.roll.source_of(0).step == 1  # no rank answers with 2
        fakes.ready(0, 1)
    assert fakes.next() == (1, 2, "beside")
    fakes.ready(1, 2)
    assert fakes.roll.source_of(0).step == 1  # it has failed with 2 twice
    fakes.roll.on_exit(1)
    assert fakes.roll.source_of(1).step == 2


def test_only_a_run_can_be_followed_and_no_pipeline_can() -> None:
    follow = ["task=serve", "serving.follow=run"]
    with pytest.raises(ConfigError, match="it needs model"):
        serving_config(compose(follow))
    with pytest.raises(ConfigError, match="the stages of a pipeline cannot change their weights"):
        serving_config(compose([*follow, "model.run=latest", "serving=pipeline"]))
    alone = serving_config(compose([*follow, "model.run=latest", "cluster.ranks=3"]))
    assert (alone.serving.mode, alone.cluster.ranks) == ("replicas", 1)
    several = compose([*follow, "model.run=latest", "serving=replicas", "cluster.ranks=3"])
    assert serving_config(several).cluster.ranks == 3
