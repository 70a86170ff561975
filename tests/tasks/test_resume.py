"""Runs that are killed, stopped, or hurt on the disk, and go on: real processes, real files."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest
import torch

from smolrun.checkpoints.find import newest_valid
from smolrun.checkpoints.manifest import MANIFEST_FILE
from smolrun.checkpoints.reader import CheckpointReader
from smolrun.driver.resume import ResumePoint, check_data
from smolrun.errors import ConfigError
from smolrun.tracking.run_folder import RunFolder
from tests.tasks.test_whole_runs import SMALL, finish, is_alive, rows, start, summary
from tests.waiting import until

# Late gradients, accumulation, and 24 steps of a few milliseconds each.
RUN = [
    *SMALL,
    "training.steps=24",
    "training.global_batch_size=8",
    "training.micro_batch_size=2",
    "training.eval_every=10",
    "training.eval_batches=1",
    "training.sample_tokens=0",
    "staleness.bound=2",
    "checkpoint.every=3",
]


def train(folder: Path, *overrides: str) -> tuple[int, str, str]:
    return finish(start(folder, *overrides))


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint of outputs/latest, times excepted."""
    newest = newest_valid(folder / "outputs" / "latest" / "checkpoints", pytest.fail)
    assert newest is not None
    with CheckpointReader(newest) as checkpoint:
        assert checkpoint.manifest.step == 24
        return {key: checkpoint.read(key) for key in checkpoint.keys("") if "facts" not in key}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("whole")
    code, _, err = train(folder, *RUN)
    assert code == 0, err
    return folder, state_of(folder)


def begin(folder: Path, *keys: str) -> subprocess.Popen[str]:
    return start(folder, *RUN, *keys)


def kill_all(run: subprocess.Popen[str]) -> None:
    """The power goes: driver and workers at once."""
    workers = psutil.Process(run.pid).children(recursive=True)
    for process in (psutil.Process(run.pid), *workers):
        process.kill()
    run.communicate()
    until(lambda: not any(is_alive(worker) for worker in workers))


def steps_told(folder: Path) -> int:
    try:
        return len(rows(folder, "step"))
    except (OSError, ValueError):  # not there yet, or half a line
        return 0


def kill_and_go_on(folder: Path, dice: random.Random, *keys: str, kills: int | None = None) -> None:
    """Killed after some step plus a fraction of one, as often as the dice say, then to the end."""
    run = begin(folder, *keys)
    count = dice.choice((1, 1, 2)) if kills is None else kills
    for wanted in sorted(dice.sample(range(4, 22), count)):
        until(functools.partial(_has_come_so_far, run, folder, wanted), 60)
        pause = time.perf_counter() + dice.random() * 0.05
        while time.perf_counter() < pause:
            pass
        if run.poll() is None:
            kill_all(run)
        run = start(folder, "checkpoint.resume=latest")
    code, out, err = finish(run)
    # A kill in the last moment may find the run complete.
    assert code == 0 or "has made 24 steps already" in err, f"{out}{err}"


def _has_come_so_far(run: subprocess.Popen[str], folder: Path, steps: int) -> bool:
    checkpoints = folder / "outputs" / "latest" / "checkpoints"
    # Not in a folder of an unfinished save, which has a longer name.
    whole = checkpoints.glob(f"step-{'[0-9]' * 8}/{MANIFEST_FILE}")
    is_there = steps_told(folder) >= steps and any(whole)
    return is_there or run.poll() is not None


def check_traces(folder: Path) -> None:
    """No step is missing or doubled, nothing unfinished lies about."""
    assert [row["step"] for row in rows(folder, "step")] == list(range(24))
    assert [row["step"] for row in rows(folder, "eval")] == [9, 19, 23]
    times = [row["time_s"] for row in rows(folder, "step")]
    assert times == sorted(times)
    checkpoints = folder / "outputs" / "latest" / "checkpoints"
    assert not list(checkpoints.glob("*.part-*"))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, whole: tuple[Path, dict[str, torch.Tensor]], seed: int
) -> None:
    kill_and_go_on(tmp_path, random.Random(seed))
    assert_same(whole[1], state_of(tmp_path))
    check_traces(tmp_path)
    ended = summary(tmp_path)
    assert ended["status"] == "done"
    dates = [datetime.fromisoformat(ended[key]) for key in ("started_at", "ended_at")]
    assert ended["wall_s"] > (dates[1] - dates[0]).total_seconds()  # the first start counts too


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_kills(tmp_path: Path, whole: tuple[Path, dict[str, torch.Tensor]]) -> None:
    for seed in range(int(os.environ.get("SMOLRUN_KILLS", "100"))):
        folder = tmp_path / str(seed)
        folder.mkdir()
        kill_and_go_on(folder, random.Random(1000 + seed))
        assert_same(whole[1], state_of(folder))
        check_traces(folder)
        print(f"{seed + 1} killed runs equal the one that was not")
        shutil.rmtree(folder)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "keys",
    [
        ("algorithm=fsdp", "algorithm.stage=1"),
        ("algorithm=fsdp", "algorithm.stage=2"),
        ("algorithm=fsdp", "algorithm.stage=3", "staleness.bound=0"),
        ("algorithm.shard_optimizer=true",),
        ("algorithm=mp", "model.layers=3"),
        ("algorithm=ep", "model=moe_tiny"),
        ("algorithm=mp_pipeline", "model.layers=3", "model.tie_embeddings=true"),
        ("algorithm=mp_pipeline", "model.layers=3", "staleness.bound=0", "quantization=int8"),
        ("optimizer=adafactor", "training.resync_every=5"),
        ("algorithm=syncps", "algorithm.ema_decay=0.9", "quantization=int8"),
        # One worker that is never late: the only edp that does not depend on who is first.
        ("algorithm=edp", "staleness.bound=0", "cluster.ranks=2"),
    ],
    ids=" ".join,
)
def test_five_kills_of_one_run(tmp_path: Path, keys: tuple[str, ...]) -> None:
    """Whoever holds what: the dice decide five times where it ends, and it goes on each time."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    cut = ["cluster.ranks=3", *keys]
    code, _, err = train(straight, *RUN, *cut)
    assert code == 0, err
    kill_and_go_on(killed, random.Random(5), *cut, kills=5)
    assert_same(state_of(straight), state_of(killed))
    check_traces(killed)


@pytest.mark.soak
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
@pytest.mark.timeout(120)
def test_a_run_that_is_told_to_end_saves_and_goes_on(
    tmp_path: Path, whole: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    run = start(tmp_path, *RUN, "checkpoint.every=1000")
    until(lambda: steps_told(tmp_path) >= 5, 60)
    run.send_signal(signal.SIGTERM)
    code, out, err = finish(run)
    assert code == 130, err
    stopped = rows(tmp_path, "checkpoint")[-1]
    assert stopped["step"] == rows(tmp_path, "step")[-1]["step"]
    code, out, err = train(tmp_path, "checkpoint.resume=latest", "checkpoint.every=3")
    assert code == 0, err
    assert f"resuming after step {stopped['step'] + 1}" in out
    assert_same(whole[1], state_of(tmp_path))
    check_traces(tmp_path)


@pytest.fixture
def copy(tmp_path: Path, whole: tuple[Path, dict[str, torch.Tensor]]) -> Path:
    """The finished run with its last checkpoints, to be hurt."""
    shutil.copytree(whole[0] / "outputs", tmp_path / "outputs", symlinks=True)
    return tmp_path


@pytest.mark.soak
@pytest.mark.timeout(120)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    copy: Path, whole: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    newest = copy / "outputs" / "latest" / "checkpoints" / "step-00000024"
    shard = min(newest.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    code, out, err = train(copy, "checkpoint.resume=latest")
    assert code == 0, err
    assert f"{shard.name} is damaged" in out and "is skipped" in out
    assert "resuming after step 21" in out
    assert_same(whole[1], state_of(copy))


def test_what_must_not_change_is_refused_by_name(copy: Path) -> None:
    changes = ["seed=5", "model=gpt_small", "data.max_mb=2", "optimizer=sgd", "staleness.bound=0"]
    code, _, err = train(copy, "checkpoint.resume=latest", *changes)
    assert code == 2
    for what in (
        "seed = 5: differs from the run being resumed; allowed: 0",
        "model = gpt_small: differs",
        "data.max_mb = 2: differs",
        "optimizer = sgd: differs",
        "staleness.bound = 0: differs",
    ):
        assert what in err
    assert len(rows(copy, "step")) == 24


@pytest.mark.timeout(120)
def test_a_new_run_trains_the_model_further(copy: Path) -> None:
    """With the weights of the other algorithm's shards, not with its steps and its optimizer."""
    earlier = (copy / "outputs" / "latest").resolve()
    keys = ["training.steps=2", "training.sample_tokens=0", "training.eval_batches=1"]
    code, out, err = train(copy, f"model.run={earlier.name[-4:]}", "algorithm=fsdp", *keys)
    assert code == 0, err
    assert f"beginning with the weights of {earlier.name}, step-00000024" in out
    assert (copy / "outputs" / "latest").resolve() != earlier
    first = rows(copy, "step")[0]
    assert first["step"] == 0
    losses = [
        row["loss"]
        for row in map(json.loads, (earlier / "metrics.jsonl").open())
        if row["event"] == "step"
    ]
    assert first["loss"] < losses[0] - 0.5  # an untrained one begins where that one began
    assert (earlier / "tokenizer" / "tokenizer.json").read_bytes() == (
        copy / "outputs" / "latest" / "tokenizer" / "tokenizer.json"
    ).read_bytes()


def test_a_run_that_is_done_needs_more_steps(copy: Path) -> None:
    code, _, err = train(copy, "checkpoint.resume=latest")
    assert code == 2
    assert "has made 24 steps already, it is finished; allowed: more than 24" in err


def test_a_run_that_was_interrupted_is_not_called_finished(copy: Path) -> None:
    earlier = copy / "outputs" / "latest" / "checkpoints" / "step-00000021"
    code, _, err = train(copy, f"checkpoint.resume={earlier}", "training.steps=20")
    assert code == 2
    assert "training.steps = 20: the run" in err
    assert "has made 21 steps already; allowed: more than 21" in err


def test_nothing_to_go_on_from(tmp_path: Path) -> None:
    code, _, err = train(tmp_path, "checkpoint.resume=latest")
    assert code == 2
    assert "checkpoint.resume = latest: " in err and "there is no run" in err


@pytest.mark.timeout(120)
def test_other_ranks_another_algorithm_and_more_steps_go_on(copy: Path) -> None:
    code, _, err = train(
        copy, "checkpoint.resume=latest", "training.steps=26", "cluster.ranks=3",
        "algorithm=fsdp", "algorithm.stage=2", "training.check_replicas=true",
    )  # fmt: skip
    assert code == 0, err
    assert [row["step"] for row in rows(copy, "step")] == list(range(26))
    assert all(len(set(row["hashes"])) == 1 for row in rows(copy, "replica_hash"))
    assert (summary(copy)["world_size"], summary(copy)["algorithm"]) == (3, "fsdp")


@pytest.mark.timeout(120)
def test_a_run_that_cannot_begin_again_is_left_as_it_was(copy: Path) -> None:
    run = (copy / "outputs" / "latest").resolve()
    before = (run / "metrics.jsonl").read_bytes(), (run / "config.yaml").read_bytes()
    there = {path.name for path in (run / "checkpoints").iterdir()}
    code, _, err = train(
        copy,
        f"checkpoint.resume={run}/checkpoints/step-00000021",
        "training.steps=30",
        "checkpoint.keep=100000000",  # no disk has room for so many
    )
    assert code == 3 and "checkpoints need" in err, err
    assert ((run / "metrics.jsonl").read_bytes(), (run / "config.yaml").read_bytes()) == before
    assert {path.name for path in (run / "checkpoints").iterdir()} == there


def test_a_run_belongs_to_one_driver_at_a_time(copy: Path) -> None:
    folder = RunFolder((copy / "outputs" / "latest").resolve())
    assert folder.claim() and not folder.claim()
    code, _, err = train(copy, "checkpoint.resume=latest", "training.steps=30")
    assert code == 2
    assert "is still running" in err
    folder.release()
    assert folder.claim()


def test_changed_data_is_refused() -> None:
    run = RunFolder(Path("outputs/x"))
    earlier = ResumePoint(run, run.checkpoints / "step-00000003", 3, 0.0, None, None, "a" * 64, {})
    check_data(earlier, "a" * 64)
    with pytest.raises(ConfigError, match="the data has changed since x was trained on it"):
        check_data(earlier, "b" * 64)


@pytest.mark.soak
@pytest.mark.timeout(120)
def test_changed_data_is_seen(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("It was a bright cold day in April.\n" * 900)
    keys = [*RUN, "data=text", f"data.path={book}", "data.sequence_length=16"]
    keys = [key for key in keys if key != "data.max_mb=1"]
    code, _, err = train(tmp_path, *keys, "data.tokenizer=bytes", "training.steps=4")
    assert code == 0, err
    book.write_text("It was a bright cold day in April.\n" * 600)
    code, _, err = train(tmp_path, "checkpoint.resume=latest", "training.steps=8")
    assert code == 2
    assert "bring the old data back" in err
