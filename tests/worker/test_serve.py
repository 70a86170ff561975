"""Ranks of a server with real stages: they measure, load their parts, and write what transformers
writes (S1), over 1 to 4 stages, alone and in company."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from torch import Tensor

from smolrun.errors import GenerationEnded, PeerLost, StopRequested
from smolrun.launch.control import StartMessage
from smolrun.mesh.memory import MemoryWorld
from smolrun.mesh.mesh import Mesh
from smolrun.models.sampling import Sampling
from smolrun.parts.step_clock import Pace
from smolrun.serving.batch import Batch
from smolrun.serving.json_grammar import json_grammar, vocabulary_messages
from smolrun.serving.messages import LOADING, TOPIC, VOCABULARY, Submit
from smolrun.serving.source import source_of_folder
from smolrun.serving.stage_runner import DecoderRunner
from tests.serving.references import LEAST_MARGIN, Text, save_model, texts_of
from tests.serving.test_json_grammar import PERSON, is_person
from tests.tasks.served import model_in
from tests.waiting import SOON_S, until
from tests.worker.serving_driver import GREEDY, ServingDriver, load_of, serve_with


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Text]]:
    folder = tmp_path_factory.mktemp("model")
    return folder, texts_of(save_model(folder, "qwen3"), 8, 64)


def check(driver: ServingDriver, texts: list[Text], name: str) -> int:
    """All texts at a time. Where the likeliest token is hardly ahead of the second, rounding may
    decide: that token is given, and the rest compared. Returns the number of such tokens."""
    given = dict.fromkeys(range(len(texts)), 0)  # tokens of each text that are not asked for
    forced = 0
    while given:
        requests = {
            index: Submit(
                f"{name}-{index}-{done}",
                texts[index].prompt + texts[index].tokens[:done],
                len(texts[index].tokens) - done,
                sampling=GREEDY,
            )
            for index, done in given.items()
        }
        driver.run(*requests.values())
        following = {}
        for index, request in requests.items():
            text, done = texts[index], given[index]
            found = driver.tokens[request.request, 0]
            assert driver.finished[request.request, 0].reason == "length"
            pairs = enumerate(zip(found, text.tokens[done:], strict=True))
            differs = next((place for place, pair in pairs if pair[0] != pair[1]), None)
            if differs is not None:
                assert text.margins[done + differs] < LEAST_MARGIN, f"text {index}: {differs}"
                forced += 1
                following[index] = done + differs + 1
        given = following
    return forced


@pytest.mark.parametrize(
    ("stages", "kind"), [(1, "memory"), (2, "tcp"), (3, "memory"), (4, "memory")]
)
def test_greedy_text_is_that_of_transformers(
    model: tuple[Path, list[Text]], stages: int, kind: str
) -> None:
    folder, texts = model
    source = source_of_folder(folder, "tiny")
    forced = []

    def script(driver: ServingDriver) -> None:
        driver.load(load_of(source, list(range(stages)), stages, chunk_tokens=16))
        forced.append(check(driver, texts[:1], "alone"))
        forced.append(check(driver, texts, "together"))

    driver = serve_with(script, stages, kind=kind)
    assert sum(forced) <= 0.01 * 9 * 64
    # The first one found its prompt and text in a slot the second time.
    assert driver.finished["together-0-0", 0].cached_tokens == len(texts[0].prompt) - 1
    assert driver.ready is not None
    layers = [(stage.first_layer, stage.last_layer) for stage in driver.ready.stages]
    assert layers[0][0] == 0 and layers[-1][1] == 3 and len(layers) == stages
    whole = sum(loaded.weight_bytes for loaded in driver.loaded.values())
    assert max(loaded.weight_bytes for loaded in driver.loaded.values()) < whole or stages == 1


def test_ranks_without_layers_wait_and_rank_0_may_be_one(model: tuple[Path, list[Text]]) -> None:
    folder, texts = model
    source = source_of_folder(folder, "tiny")

    def script(driver: ServingDriver) -> None:
        driver.load(load_of(source, [2, 1], 4))
        check(driver, texts[:3], "some")

    driver = serve_with(script, 4)
    assert driver.loaded[0].weight_bytes == driver.loaded[3].weight_bytes == 0
    assert driver.ready is not None
    assert [stage.rank for stage in driver.ready.stages] == [2, 1]


def test_every_rank_measures_before_it_loads(model: tuple[Path, list[Text]]) -> None:
    source = source_of_folder(model[0], "tiny")
    # Nothing of the folder is read.
    absent = msgspec.structs.replace(source, folder="/does/not/exist")

    def script(driver: ServingDriver) -> None:
        driver.probe(absent)
        driver.probe(absent, "bf16")
        driver.load(load_of(source, [0, 1], 2))

    driver = serve_with(script, 2)
    for rank in range(2):
        probed = driver.probed[rank]
        assert probed.rank == rank
        assert 0 < probed.layer_s < 1 and 0 < probed.head_s < 1
        assert probed.free_bytes > 0


class SlowPace(Pace):
    """Takes 20 ms longer for everything that it computes."""

    def __init__(self) -> None:
        self.computed = 0

    def end(self, waited_s: float) -> None:
        self.computed += 1
        time.sleep(0.02)


def test_a_slower_machine_is_emulated_when_it_measures_and_when_it_serves(
    model: tuple[Path, list[Text]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, paces = source_of_folder(model[0], "tiny"), [SlowPace(), SlowPace()]
    monkeypatch.setattr(
        "smolrun.worker.serve.pace_of", lambda config, rank: paces[rank] if config else None
    )
    measured = []

    def script(driver: ServingDriver) -> None:
        driver.probe(source)
        measured.extend(pace.computed for pace in paces)
        driver.load(load_of(source, [0, 1], 2))
        driver.run(Submit("one", [1, 2, 3], 5, sampling=GREEDY))

    driver = serve_with(script, 2)
    assert all(one.layer_s * source.shape.layers > 0.02 for one in driver.probed.values())
    # The warm-up has two tokens.
    assert [pace.computed - before for pace, before in zip(paces, measured, strict=True)] == [7, 7]
    assert driver.ready is not None
    assert all(stage.compute_s > 0.02 for stage in driver.ready.stages)


def world_of(generation: int, world_size: int) -> MemoryWorld:
    """The ranks of a later generation."""
    world = MemoryWorld(world_size)
    for mesh in world.meshes:
        mesh.generation = generation
    return world


def test_a_stage_that_is_alone_sees_the_end_of_its_generation(
    model: tuple[Path, list[Text]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It receives nothing by which it would see it; a rank that is back waits for it."""
    source = source_of_folder(model[0], "tiny")
    world = world_of(1, 1)
    monkeypatch.setattr("smolrun.worker.serve.regroup", lambda *_: world.meshes[0])
    asked = {name: Submit(name, [5, 6, 7], 100, sampling=GREEDY) for name in ("over", "after")}

    def script(driver: ServingDriver) -> None:
        driver.load(load_of(source, [0], 1))
        driver.channels[0].tell(TOPIC, asked["over"])
        while len(driver.tokens["over", 0]) < 3:
            driver.take()
        mesh, driver.ready = driver.meshes[0], None
        mesh.post(lambda: mesh.fail(GenerationEnded("rank 1 is back")))
        while not driver.pauses:
            driver.take()
        driver.channels[0].tell(LOADING, load_of(source, [0], 1))  # of the generation before
        driver.load(load_of(source, [0], 1, generation=1, slots=2))
        driver.run(asked["after"])

    driver = serve_with(script, 1, links="group")
    assert driver.pauses == ["rank 1 is back"]
    assert driver.ready is not None and driver.ready.max_running == 2
    over = driver.tokens["over", 0]
    assert len(over) == 100 and over == driver.tokens["after", 0]


def lose(driver: ServingDriver, meshes: Iterable[Mesh], rank: int, lost: threading.Event) -> None:
    """All see that a rank is gone, until rank 0 has told the clients."""
    pauses = len(driver.pauses)
    for mesh in meshes:
        error = PeerLost(rank, mesh.generation, "it died")
        mesh.post(lambda mesh=mesh, error=error: mesh.fail(error))  # type: ignore[misc]
    lost.set()
    while len(driver.pauses) == pauses:
        driver.take()


def test_an_answer_survives_a_loss_in_its_prompt_and_one_before_others_have_taken_over(
    model: tuple[Path, list[Text]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 3 is lost in the middle of the prompt, and rank 2 before anything has loaded again."""
    source, lost = source_of_folder(model[0], "tiny"), threading.Event()
    left: set[tuple[int, int]] = set()  # ranks, and the generation that they have left
    worlds = [world_of(generation, 4) for generation in (1, 2)]
    run = DecoderRunner.run

    def run_until_lost(self: DecoderRunner, batch: Batch, hidden_TD: Tensor | None) -> Any:
        if batch.number == 4 and self._stage.has_head:  # two warm it up, two bring 64 tokens
            assert lost.wait(SOON_S)
        return run(self, batch, hidden_TD)

    def regroup(start: StartMessage, mesh: Mesh, channel: Any) -> Mesh:
        mesh.close()  # nothing of this generation reaches the next one
        left.add((start.rank, mesh.generation))
        if start.rank >= 3 - mesh.generation:
            assert channel.stop_requested.wait(SOON_S)
            raise StopRequested("it is lost")
        return worlds[mesh.generation].meshes[start.rank]

    monkeypatch.setattr(DecoderRunner, "run", run_until_lost)
    monkeypatch.setattr("smolrun.worker.serve.regroup", regroup)
    prompt = [1 + token % 50 for token in range(100)]
    asked = {name: Submit(name, prompt, 28, sampling=GREEDY) for name in ("over", "after")}
    drivers: list[ServingDriver] = []

    def script(driver: ServingDriver) -> None:
        drivers.append(driver)
        driver.load(load_of(source, [0, 1, 2, 3], 4, chunk_tokens=32))
        driver.channels[0].tell(TOPIC, asked["over"])
        while sum(len(output.prefill) for output in driver.output) < 2:
            driver.take()
        lose(driver, driver.meshes.values(), 3, lost)
        lose(driver, worlds[0].meshes[:3], 2, lost)
        until(lambda: left >= {(0, 1), (1, 1)})  # as the driver waits, until all listen
        driver.ready = None
        driver.load(load_of(source, [0, 1], 4, generation=2))
        driver.run(*asked.values())

    with pytest.raises(StopRequested, match="it is lost"):
        serve_with(script, 4, links="group")
    (driver,) = drivers
    assert len(driver.pauses) == 2
    assert driver.ready is not None and [one.rank for one in driver.ready.stages] == [0, 1]
    over = driver.tokens["over", 0]
    assert len(over) == 28 and over == driver.tokens["after", 0]
    done = [one.done for output in driver.output for one in output.prefill if one.request == "over"]
    assert done[:2] == [32, 64] and done[-1] == 100 and done == sorted(set(done))


def test_a_server_that_is_stopped_before_it_loads_ends() -> None:
    with pytest.raises(StopRequested, match="before it began"):
        serve_with(lambda driver: None, 2)


@pytest.mark.parametrize("stages", [1, 2])
def test_answers_obey_their_schema_whatever_the_stages(tmp_path: Path, stages: int) -> None:
    pytest.importorskip("llguidance")
    source = source_of_folder(model_in(tmp_path), "tiny")
    vocabulary = vocabulary_messages([bytes([id]) for id in range(256)])
    grammar = json_grammar(PERSON)
    asked = [
        Submit(
            f"{number}",
            [1, 2, 3, number],
            900,
            sampling=Sampling(temperature=float(number % 2), seed=number, grammar=grammar),
            stop_ids=source.end_ids,
        )
        for number in range(6)
    ]
    free = Submit("free", [1, 2, 3], 20, sampling=GREEDY)  # beside them, and not touched

    def script(driver: ServingDriver) -> None:
        for channel in driver.channels:
            for message in vocabulary:
                channel.tell(VOCABULARY, message)
        driver.load(load_of(source, list(range(stages)), stages, capacity=1000))
        driver.run(*asked, free)

    driver = serve_with(script, stages)
    for one in asked:
        assert driver.finished[one.request, 0].reason == "stop"
        *ids, end = driver.tokens[one.request, 0]
        assert end in source.end_ids and is_person(bytes(ids).decode())
    assert len(driver.tokens["free", 0]) == 20
