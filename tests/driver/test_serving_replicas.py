"""What the driver of replicas does without processes: who loads what, and who is silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from smolrun.cli.compose import compose
from smolrun.driver.engine_bridge import Silence
from smolrun.driver.serving import serving_config
from smolrun.driver.serving_replicas import ReplicaLoader
from smolrun.driver.serving_start import ServingSpec
from smolrun.launch.control import TaskMessage, task_message
from smolrun.models.shape import DecoderShape, model_bytes
from smolrun.serving.messages import LOADING, Load, Probe, Probed, ToRank
from smolrun.serving.source import ModelSource
from tests.waiting import until


class FakeDriver:
    """Keeps what every rank is sent, and why the run was ended."""

    ranks = range(3)

    def __init__(self) -> None:
        self.sent: list[tuple[int, ToRank]] = []
        self.failures: list[str] = []

    def send(self, rank: int, message: TaskMessage) -> None:
        assert message.topic == LOADING
        self.sent.append((rank, msgspec.json.decode(message.data, type=ToRank)))

    def fail(self, problem: str) -> None:
        self.failures.append(problem)

    def take(self) -> list[tuple[int, ToRank]]:
        taken, self.sent = self.sent, []
        return taken


Start = Callable[..., tuple[ReplicaLoader, FakeDriver]]


_KINDS = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu"}
_WITHOUT = dict.fromkeys(("tie_embeddings", "attention_bias", "mlp_bias", "qk_norm"), False)
_SIZES = {"layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "head_width": 8, "ffn_width": 64}
_NUMBERS = {"max_sequence_length": 8192, "rope_theta": 1e4, "norm_eps": 1e-5}
SHAPE = DecoderShape(
    **_KINDS,
    **_WITHOUT,
    **_SIZES,
    **_NUMBERS,
    sliding_window=None,
    rope_scaling=None,  # type: ignore[arg-type]
)
SOURCE = ModelSource("tiny", "huggingface", "here", "llama", SHAPE, 258, "float32", [256], None)


@pytest.fixture
def start() -> Start:
    def begin(deliver: Any = None, **keys: str) -> tuple[ReplicaLoader, FakeDriver]:
        chosen = [f"{key}={value}" for key, value in keys.items()]
        config = serving_config(
            compose(["task=serve", "serving=replicas", "cluster.ranks=3", *chosen])
        )
        spec = ServingSpec(SOURCE, {"float32": model_bytes(SHAPE, 258, 4)})
        deliver = deliver or (lambda host, source: (source, f"on {host}"))
        loader = ReplicaLoader(config, spec, deliver, progress=lambda *_: None, say=print)
        driver = FakeDriver()
        loader.on_start(driver)  # type: ignore[arg-type]
        assert [(rank, type(m)) for rank, m in driver.take()] == [(r, Probe) for r in range(3)]
        return loader, driver

    return begin


def probed(loader: ReplicaLoader, rank: int, free_bytes: int = 1 << 32) -> None:
    loader.on_message(rank, task_message(LOADING, Probed(rank, 0.001, 0.001, free_bytes)))


def loads(loader: ReplicaLoader, driver: FakeDriver, count: int) -> dict[int, Load]:
    """The Loads that come once the parts are there, which a thread brings."""

    def has_come() -> bool:
        loader.on_poll()
        return len(driver.sent) >= count or bool(driver.failures)

    until(has_come)
    found = {rank: message for rank, message in driver.take() if isinstance(message, Load)}
    assert len(found) == count
    return found


def test_ranks_of_a_host_load_once_all_have_measured_and_again_as_before(start: Start) -> None:
    loader, driver = start()
    probed(loader, 2)
    probed(loader, 0)
    loader.on_poll()
    assert not driver.sent  # rank 1 would measure what the others have left
    loader.on_restart(1)  # it died meanwhile
    assert [type(message) for _, message in driver.take()] == [Probe]
    probed(loader, 1)
    found = loads(loader, driver, 3)
    for rank, load in found.items():
        assert (load.stages, load.head, load.last_layers) == ([rank], rank, [3])
        assert load.folders[rank] == "on local"
    loader.on_restart(0)
    assert loads(loader, driver, 1) == {0: found[0]}  # not measured again


def test_a_model_that_does_not_fit_is_refused_with_the_host(start: Start) -> None:
    loader, driver = start(**{"serving.slots": "8"})
    for rank in range(3):
        probed(loader, rank, free_bytes=10_000_000)
    (problem,) = driver.failures
    assert problem.startswith("tiny does not fit on local: it needs ")


def test_parts_that_cannot_be_brought_end_the_start_with_the_reason(start: Start) -> None:
    def deliver(host: str, source: ModelSource) -> Any:
        raise OSError(28, "No space left on device")

    loader, driver = start(deliver)
    for rank in range(3):
        probed(loader, rank)
    until(lambda: not loader.on_poll() and bool(driver.failures))
    assert "No space left on device" in driver.failures[0]


def test_silence_counts_only_while_the_driver_was_awake() -> None:
    now = [0.0]
    silence = Silence(3.0, clock=lambda: now[0])
    assert not silence.heard(0) and not silence.heard(1)
    now[0] = 3600.0  # the laptop slept
    assert silence.lost(0.5) == []
    for _ in range(5):
        now[0] += 0.5
        silence.heard(1)
        last = silence.lost(0.5)
    assert last == [0]
    now[0] += 0.5
    assert silence.lost(0.5) == []  # reported once
    assert silence.heard(0)
    assert not silence.heard(0)
    silence.forget(0)
    now[0] += 0.5
    assert silence.lost(99.0) == []
