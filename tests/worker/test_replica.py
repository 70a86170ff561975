"""A replica with real engines that changes its weights while it answers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from smolrun.models.trained import trained_model
from smolrun.serving.messages import LOADING, TOPIC, Load, NotLoaded, Retire, Submit
from smolrun.serving.source import ModelSource, source_of_checkpoint
from tests.serving.followed_run import add_checkpoint, make_run
from tests.worker.serving_driver import GREEDY, ServingDriver, load_of, serve_with


def source_at(run: Path, step: int, **keys: Any) -> ModelSource:
    return source_of_checkpoint(trained_model(run, add_checkpoint(run, step, **keys)), "mine")


def load_at(source: ModelSource, **more: Any) -> Load:
    return load_of(source, [0], 1, capacity=2048, version=source.step, **more)


def asks(name: str, version: int, tokens: int = 40) -> Submit:
    return Submit(name, [1, 2, 3], tokens, sampling=GREEDY, version=version)


def reloads(driver: ServingDriver, load: Load) -> None:
    """Until it is ready with that."""
    driver.channels[0].tell(LOADING, load)
    while driver.ready is None or driver.ready.version != load.version:
        driver.take()


def refusal(driver: ServingDriver, load: Load) -> NotLoaded:
    driver.channels[0].tell(LOADING, load)
    while not driver.not_loaded:
        driver.take()
    return driver.not_loaded.pop()


def test_an_answer_ends_with_the_weights_it_began_with_beside_those_of_newer_ones(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run")
    old, new = source_at(run, 1), source_at(run, 2)

    def script(driver: ServingDriver) -> None:
        driver.load(load_at(old))
        driver.run(asks("old", 1, 700))
        driver.channels[0].tell(TOPIC, asks("old again", 1, 700))
        while not driver.tokens["old again", 0]:
            driver.take()
        reloads(driver, load_at(new, beside=True))
        assert len(driver.tokens["old again", 0]) < 700
        driver.channels[0].tell(TOPIC, Retire(1))
        driver.run(asks("new", 2))
        while ("old again", 0) not in driver.finished:
            driver.take()
        driver.run(asks("late", 1))  # an engine that has ended, or takes nothing more

    driver = serve_with(script, 1, links="none")
    assert driver.tokens["old again", 0] == driver.tokens["old", 0]
    assert driver.tokens["new", 0] != driver.tokens["old", 0][:40]
    alone = serve_with(lambda d: (d.load(load_at(new)), d.run(asks("new", 2)))[1], 1, links="none")
    assert driver.tokens["new", 0] == alone.tokens["new", 0]


def test_weights_that_cannot_be_used_leave_the_old_ones_in_use(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    old, broken, gone = source_at(run, 1), source_at(run, 2, has_nan=True), source_at(run, 3)
    shutil.rmtree(gone.folder)

    def script(driver: ServingDriver) -> None:
        driver.load(load_at(old))
        driver.run(asks("before", 1))
        told = refusal(driver, load_at(broken, beside=True))
        assert (told.version, told.lacks_memory) == (2, False)
        assert told.reason.startswith("the model computes no tokens")
        told = refusal(driver, load_at(gone, beside=True))
        assert told.version == 3 and "step-00000003" in told.reason
        driver.run(asks("after", 1))

    driver = serve_with(script, 1, links="none")
    assert driver.ready is not None and driver.ready.version == 1
    assert driver.tokens["after", 0] == driver.tokens["before", 0]


def test_without_memory_for_both_it_says_so_and_loads_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    old, new = source_at(run, 1), source_at(run, 2)
    monkeypatch.setattr("smolrun.worker.replica.free_memory", lambda *_: 100.0 * 2**20)

    def script(driver: ServingDriver) -> None:
        driver.load(load_at(old))
        told = refusal(driver, load_at(new, beside=True))
        assert told.lacks_memory and told.reason.endswith(
            "beside the old ones, 100 MB are available"
        )
        reloads(driver, load_at(new))
        driver.run(asks("new", 2), asks("old", 1))

    driver = serve_with(script, 1, links="none")
    assert driver.finished["new", 0].reason == "length"
    assert driver.finished["old", 0].message == "the weights of step 1 are not loaded here"
    assert not driver.tokens["old", 0]
