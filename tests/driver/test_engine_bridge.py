"""What the bridge between server and ranks decides of a pipeline; without processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from smolrun.cli.compose import compose
from smolrun.driver.engine_bridge import EngineBridge
from smolrun.launch.control import task_message
from smolrun.serving.messages import TOPIC, Ready, Recovering, Submit


class Loop:
    """An event loop that runs everything at once."""

    def call_soon_threadsafe(self, function: Callable[..., None], *arguments: Any) -> None:
        function(*arguments)


@pytest.fixture
def bridge() -> EngineBridge:
    config = compose(["task=serve", "serving=pipeline", "cluster.ranks=2"])
    bridge = EngineBridge(config, lambda _: None)
    bridge.frontend.attach(Loop())  # type: ignore[arg-type]
    return bridge


def test_a_rank_that_is_back_may_join_where_no_answer_would_pause_for_it(
    bridge: EngineBridge,
) -> None:
    assert bridge.may_join(), "nothing is loaded yet"
    bridge.on_message(0, task_message(TOPIC, Ready(128, 1024, 8, [])))
    assert bridge.may_join()
    stream = bridge.frontend.submit(Submit("one", [1, 2], 10))
    assert not bridge.may_join()
    bridge.on_message(0, task_message(TOPIC, Recovering("rank 1 is lost")))
    assert bridge.may_join(), "it pauses already"
    bridge.on_message(0, task_message(TOPIC, Ready(128, 1024, 8, [])))
    assert not bridge.may_join()
    bridge.frontend.close(stream)
    assert bridge.may_join()


def test_answers_of_a_pipeline_wait_for_no_replica(bridge: EngineBridge) -> None:
    """Rank 0 is lost: the end of the run, which comes next, says why they end."""
    bridge.on_message(0, task_message(TOPIC, Ready(128, 1024, 8, [])))
    stream = bridge.frontend.submit(Submit("one", [1, 2], 10))
    bridge.on_exit(0)
    assert not stream.has_outputs and not stream.has_ended
    bridge.frontend.fail("rank 0 on mini1 died")
    assert stream.has_ended
