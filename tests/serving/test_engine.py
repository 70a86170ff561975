"""The engine over stages whose text can be computed by hand: alone and in company, over 1 to 4
ranks, with cancellation, errors, forks and reuse."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from smolrun.mesh.mesh import Mesh
from smolrun.serving.batch import Batch, BatchResult, Sampled
from smolrun.serving.engine import Engine, split_output
from smolrun.serving.messages import (
    Cancel,
    Finished,
    Prefill,
    Ready,
    StageStats,
    Stats,
    StepOutput,
    Submit,
    Token,
)
from smolrun.serving.pipeline import PipelineHead, run_stage
from smolrun.serving.scheduler import Scheduler
from smolrun.serving.stage_runner import StageTimes
from smolrun.testing import run_ranks
from tests.serving.fake_stage import POISON, VOCAB, FakeStage, expected_text
from tests.waiting import SOON_S

SLOTS, CAPACITY = 4, 60


@dataclass
class Client:
    """The driver's side: what it has been sent, by request and choice."""

    engine: Engine
    stages: int
    # The engine is at most one message ahead.
    messages: queue.Queue[Ready | StepOutput | None] = field(default_factory=lambda: queue.Queue(1))
    tokens: dict[tuple[str, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    finished: dict[tuple[str, int], Finished] = field(default_factory=dict)
    prefill: dict[str, list[Prefill]] = field(default_factory=lambda: defaultdict(list))
    stats: Stats | None = None

    def take(self) -> Ready | StepOutput | None:
        """The next message, added up here; None after the last one."""
        message = self.messages.get(timeout=SOON_S)
        if isinstance(message, StepOutput):
            for token in message.tokens:
                assert (token.request, token.choice) not in self.finished, "a token after the end"
                self.tokens[token.request, token.choice].append(token.id)
            for finished in message.finished:
                assert (finished.request, finished.choice) not in self.finished, "two ends"
                self.finished[finished.request, finished.choice] = finished
            for prefill in message.prefill:
                self.prefill[prefill.request].append(prefill)
            self.stats = message.stats or self.stats
        return message

    def run(self, *requests: Submit) -> None:
        """Submit requests, and wait until all have finished and the engine rests."""
        for request in requests:
            self.engine.submit(request)
        self.wait(*requests)

    def wait(self, *requests: Submit) -> None:
        wanted = {(one.request, choice) for one in requests for choice in range(one.choices)}
        while not (wanted <= self.finished.keys() and self.stats and not self.stats.running):
            self.take()

    def check(self, *requests: Submit) -> None:
        """Every choice has the text that it would have alone."""
        for one in requests:
            for choice in range(one.choices):
                text = expected_text(
                    one.prompt_ids, one.max_tokens, stages=self.stages, choice=choice
                )
                assert self.tokens[one.request, choice] == text
                assert self.finished[one.request, choice].reason == "length"


def serve(
    script: Callable[[Client], None],
    *,
    stages: int = 1,
    kind: str = "memory",
    chunk_tokens: int = 8,
    computed: list[int] | None = None,
) -> Client:
    """Run `script` against an engine over so many ranks; returns the client. `computed` gets the
    tokens of every batch."""
    scheduler = Scheduler(
        slots=SLOTS, capacity=CAPACITY, vocab_size=VOCAB, stages=stages, chunk_tokens=chunk_tokens
    )
    client = Client(None, stages)  # type: ignore[arg-type]
    client.engine = Engine(scheduler, client.messages.put, max_message_bytes=10_000)

    def work(mesh: Mesh) -> None:
        runner = FakeStage(mesh.rank, stages, slots=SLOTS, capacity=CAPACITY)
        times = StageTimes(stats_of(mesh.rank))
        ranks = list(range(stages))
        if mesh.rank:
            run_stage(mesh, ranks, runner, times)
        else:
            head = PipelineHead(mesh, ranks, runner, times, client.engine.on_result)
            run_engine(client, head, script)
            if computed is not None:
                computed.extend(len(batch.token_ids) for batch in runner.batches)

    run_ranks(stages, work, kind=kind)
    assert scheduler.slots.num_free == SLOTS
    return client


def run_engine(client: Client, head: PipelineHead, script: Callable[[Client], None]) -> None:
    """The engine on this thread and the script on another one."""
    errors: list[BaseException] = []

    def run_script() -> None:
        try:
            assert isinstance(client.take(), Ready)
            script(client)
        except BaseException as error:
            errors.append(error)
        client.engine.stop()
        while client.take() is not None:
            pass

    thread = threading.Thread(target=run_script, daemon=True)
    thread.start()
    client.engine.run(head)
    client.messages.put(None, timeout=SOON_S)
    thread.join(SOON_S)
    for error in errors:
        raise error


def stats_of(rank: int) -> StageStats:
    return StageStats(rank, "here", rank, rank)


def request(name: str, length: int, max_tokens: int = 5, **more: object) -> Submit:
    """A prompt that differs from the others from its first token on."""
    start = sum(map(ord, name)) % 500
    prompt = [(start + 17 * index) % (VOCAB - 20) + 20 for index in range(length)]
    return msgspec.convert(
        {"request": name, "prompt_ids": prompt, "max_tokens": max_tokens, **more}, Submit
    )


@pytest.mark.parametrize(
    ("stages", "kind"),
    [(1, "memory"), (2, "memory"), (3, "memory"), (4, "memory"), (2, "tcp"), (3, "tls")],
)
def test_text_in_company_is_that_of_a_sequence_alone(stages: int, kind: str) -> None:
    requests = [request(f"r{index}", 1 + 7 * index, 3 + index) for index in range(7)]
    requests.append(request("long", CAPACITY - 6, 6))

    def script(client: Client) -> None:
        client.run(request("alone", 20))
        client.check(request("alone", 20))
        client.run(*requests)
        client.check(*requests)

    client = serve(script, stages=stages, kind=kind)
    assert client.stats is not None
    assert [stage.rank for stage in client.stats.stages] == list(range(stages))


@pytest.mark.parametrize("stages", [1, 3])
def test_figures_of_the_stages_are_fresh(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smolrun.serving.engine._STATS_EVERY_S", 0.02)
    run = FakeStage.run

    def slow_run(*given: Any) -> Any:
        time.sleep(0.005)
        return run(*given)

    monkeypatch.setattr(FakeStage, "run", slow_run)
    seen: list[int] = []

    def script(client: Client) -> None:
        client.engine.submit(request("long", 10, 40))
        while not client.finished:
            client.take()
            if client.stats:
                seen.append(client.stats.stages[-1].tokens)

    client = serve(script, stages=stages)
    assert client.stats is not None
    # All but those of the last batches, which are not asked for them.
    assert all(30 <= stage.tokens <= 2 + 10 + 39 for stage in client.stats.stages)
    assert all(stage.compute_s >= 0.1 for stage in client.stats.stages)
    assert len(set(seen)) > 3


@pytest.mark.parametrize("stages", [1, 2])
def test_choices_share_the_prompt(stages: int) -> None:
    wanted = request("n", 30, 4, choices=6)  # more than there are slots

    def script(client: Client) -> None:
        client.run(wanted)
        client.check(wanted)

    rows: list[int] = []
    client = serve(script, stages=stages, computed=rows)
    # The warm-up, the prompt, the last token of the prompt and the generated ones of each choice.
    assert sum(rows) == 2 + 30 + 5 + 6 * 3
    assert len({tuple(client.tokens["n", choice]) for choice in range(6)}) == 6
    assert client.stats is not None and client.stats.prompt_tokens == 30
    assert client.finished["n", 5].cached_tokens == 0
    assert [one.done for one in client.prefill["n"]] == [8, 16, 24, 30]


@pytest.mark.parametrize("stages", [1, 3])
def test_the_next_turn_of_a_chat_computes_only_what_is_new(stages: int) -> None:
    first = request("first", 20, 6)
    answer = expected_text(first.prompt_ids, 6, stages=stages)
    second = Submit("second", [*first.prompt_ids, *answer, 5, 6, 7], 4)
    other = Submit("other", [*first.prompt_ids[:10], 1, 2, 3], 4)

    def script(client: Client) -> None:
        client.run(first)
        client.run(second, other)
        client.check(first, second, other)

    client = serve(script, stages=stages)
    # The last generated token was never given to the model.
    assert client.finished["second", 0].cached_tokens == 25
    assert client.finished["other", 0].cached_tokens == 10
    assert {one.cached_tokens for one in client.prefill["second"]} == {25}
    assert client.stats is not None and client.stats.cached_tokens == 35


def test_an_error_ends_its_own_request() -> None:
    bad = Submit("bad", [1, 2, POISON], 5)
    good = request("good", 12)

    def script(client: Client) -> None:
        client.run(bad, good)
        client.check(good)
        client.run(request("later", 30))
        client.check(request("later", 30))

    client = serve(script, stages=2)
    assert client.finished["bad", 0].reason == "error"
    assert client.finished["bad", 0].message == "the logits are not finite"


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "sentence"),
    [
        ([], 5, "the prompt has 0 tokens"),
        ([1] * (CAPACITY + 1), 5, f"the prompt has {CAPACITY + 1} tokens"),
        ([1, VOCAB], 5, f"token {VOCAB} is not in the vocabulary"),
        ([1], -1, "max_tokens=-1"),
    ],
)
def test_requests_that_cannot_run_are_refused(
    prompt: list[int], max_tokens: int, sentence: str
) -> None:
    wanted = Submit("bad", prompt, max_tokens)
    client = serve(lambda client: client.run(wanted))
    assert client.finished["bad", 0].reason == "error"
    assert sentence in client.finished["bad", 0].message


def test_a_stop_token_is_reported_and_ends_the_choice() -> None:
    wanted = request("stops", 9, 10)
    text = expected_text(wanted.prompt_ids, 10, stages=1)
    stopping = msgspec.structs.replace(wanted, stop_ids=[text[3]])
    client = serve(lambda client: client.run(stopping))
    assert client.tokens["stops", 0] == text[:4]
    assert client.finished["stops", 0].reason == "stop"


def test_a_full_slot_ends_a_sequence() -> None:
    client = serve(lambda client: client.run(request("long", CAPACITY - 3, 1000)))
    assert len(client.tokens["long", 0]) == 3
    assert client.finished["long", 0].reason == "length"


@pytest.mark.parametrize("stages", [1, 3])
def test_a_request_that_ran_elsewhere_continues_with_the_same_tokens(stages: int) -> None:
    whole = request("whole", 21, 9, choices=3)
    texts = [expected_text(whole.prompt_ids, 9, stages=stages, choice=c) for c in range(3)]
    again = [
        msgspec.structs.replace(
            whole,
            request=f"again{done}",
            continued={1: texts[1][:done], 2: texts[2][: 8 - done]},  # choice 0 has ended
        )
        for done in range(9)
    ]

    def script(client: Client) -> None:
        client.engine.submit(again[4])  # in an empty cache, and below beside others like it
        while len(client.finished) < 2:
            client.take()
        for one in again:
            client.engine.submit(msgspec.structs.replace(one, request=f"{one.request}-b"))
        while len(client.finished) < 2 + 2 * 9:
            client.take()

    client = serve(script, stages=stages)
    for done in range(9):
        name = f"again{done}-b"
        assert client.tokens[name, 1] == texts[1][done:]
        assert client.tokens[name, 2] == texts[2][8 - done :]
        assert client.finished[name, 1].reason == client.finished[name, 2].reason == "length"
        assert (name, 0) not in client.finished
    assert client.tokens["again4", 1] == texts[1][4:]


def test_a_continued_choice_without_room_for_a_token_is_refused() -> None:
    wanted = request("full", 9, 2, continued={0: [5, 6]})
    client = serve(lambda client: client.run(wanted))
    assert client.finished["full", 0].reason == "error"
    assert "2 tokens already" in client.finished["full", 0].message


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_log_probabilities_of_a_prompt_are_of_all_its_tokens(max_tokens: int) -> None:
    wanted = request("echo", 20, max_tokens, echo_logprobs=True, top_logprobs=0)

    def script(client: Client) -> None:
        client.run(request("echo", 20, 1))  # nothing of it is reused
        client.prefill.clear()
        client.finished.clear()
        client.tokens.clear()
        client.run(wanted)

    client = serve(script, stages=2)
    values = [value for one in client.prefill["echo"] for value in one.logprobs or []]
    assert values == [None, *((-token / VOCAB, []) for token in wanted.prompt_ids[1:])]
    assert len(client.tokens["echo", 0]) == max_tokens
    assert client.finished["echo", 0].cached_tokens == 0


@pytest.mark.parametrize("stages", [1, 3])
def test_cancelling_ends_a_request_at_once_and_nothing_else(stages: int) -> None:
    endless = [request(f"endless{index}", 10, 40) for index in range(6)]
    others = [request("other", 8, 20)]

    def script(client: Client) -> None:
        for one in [*endless, *others]:
            client.engine.submit(one)
        while len(client.tokens["endless0", 0]) < 3:
            client.take()
        for one in endless:
            client.engine.submit(Cancel(one.request))
        client.wait(*endless, *others)
        client.check(*others)

    client = serve(script, stages=stages)
    assert {client.finished[one.request, 0].reason for one in endless} == {"cancelled"}


def test_a_thousand_cancellations_at_any_time_leak_nothing() -> None:
    dice = random.Random(0)

    def script(client: Client) -> None:
        names = [f"r{index}" for index in range(1000)]
        for name in names:
            one = request(
                name, dice.randint(1, 30), dice.randint(0, 25), choices=dice.randint(1, 2)
            )
            client.engine.submit(one)
            for _ in range(dice.randint(0, 2)):
                client.take()
            for earlier in dice.sample(names[: names.index(name) + 1][-8:], 1):
                client.engine.submit(Cancel(earlier))
        for name in names:
            client.engine.submit(Cancel(name))
        last = request("last", 30, 8, choices=SLOTS)
        client.run(last)
        client.check(last)
        assert client.stats is not None
        assert (client.stats.running, client.stats.waiting, client.stats.cache_usage) == (0, 0, 0)

    client = serve(script, stages=2)
    assert len({name for name, _ in client.finished}) == 1001
    reasons = Counter(one.reason for one in client.finished.values())
    assert reasons["cancelled"] > 300 and reasons["length"] > 100 and not reasons["error"]


def test_chunks_take_about_as_long_on_machines_of_any_speed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = Scheduler(slots=2, capacity=2000, vocab_size=VOCAB, chunk_tokens=256)
    engine = Engine(scheduler, lambda message: None, max_message_bytes=10_000)
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Machine:
        """Computes `speed` tokens per second."""

        speed, taken = 200.0, 0.0

        def start(self, batch: Batch, *, with_stats: bool) -> None:
            self.taken = len(batch.token_ids) / self.speed
            now[0] += self.taken
            sampled = [Sampled(row.slot, 1) for row in batch.rows if row.is_sampled]
            engine.on_result(BatchResult(batch.number, sampled))

    machine = Machine()

    def prefill(speed: float) -> tuple[float, int]:
        """The time of the last whole chunk of a long prompt, and its tokens."""
        machine.speed = speed
        engine.submit(request(f"at {speed}", 1990, 1))
        chunks = []
        while not chunks or scheduler.has_requests:
            engine._take_events(machine, wait=False)  # type: ignore[arg-type]
            engine._start_batch(machine)  # type: ignore[arg-type]
            chunks.append(machine.taken)
        return chunks[-3], round(chunks[-3] * speed)

    assert prefill(1000.0) == (pytest.approx(0.15, rel=0.1), pytest.approx(150, rel=0.1))
    assert prefill(100.0) == (pytest.approx(0.32), 32)  # fewer tokens would be less efficient
    assert prefill(1e6)[1] == 256


def test_chunks_fit_the_stages_where_rank_0_holds_no_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two stages elsewhere compute 1,000 tokens per second each; starting a batch takes no time."""
    scheduler = Scheduler(slots=2, capacity=3000, vocab_size=VOCAB, stages=2, chunk_tokens=256)
    engine = Engine(scheduler, lambda message: None, max_message_bytes=10_000)
    now, due = [0.0], [0.0, 0.0]  # of the stages, until they are done with what they have
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    flying: list[tuple[float, BatchResult]] = []
    counts: list[int] = []

    class Elsewhere:
        def start(self, batch: Batch, *, with_stats: bool) -> None:
            counts.append(len(batch.token_ids))
            done = now[0]
            for stage in (0, 1):
                done = due[stage] = max(done, due[stage]) + len(batch.token_ids) / 1000
            sampled = [Sampled(row.slot, 1) for row in batch.rows if row.is_sampled]
            flying.append((done, BatchResult(batch.number, sampled)))

    pipeline: Any = Elsewhere()
    engine.submit(request("long", 2990, 1))
    engine._take_events(pipeline, wait=False)
    while scheduler.has_requests:
        while engine._start_batch(pipeline):
            pass
        now[0], result = flying.pop(0)
        engine.on_result(result)
        engine._take_events(pipeline, wait=False)
    assert counts[0] == 64
    assert counts[-5] == pytest.approx(150, rel=0.1)


def test_stopping_ends_every_request() -> None:
    def script(client: Client) -> None:
        client.engine.submit(request("endless", 10, 50, choices=2))
        client.engine.submit(request("waiting", 10, 50, choices=7))
        client.take()

    client = serve(script, stages=2)
    assert len(client.finished) == 9
    assert {one.reason for one in client.finished.values()} == {"cancelled"}


def test_long_reports_are_split() -> None:
    tokens = [Token("r", 0, index, -1.5, [(index, -1.5)] * 20) for index in range(100)]
    finished = [Finished("r", 0, "stop")]
    prefill = [Prefill("p", 10, 20), Prefill("q", 900, 900, [(-1.0, [])] * 900)]
    stats = Stats(1, 0, 0.5, 1, 2, 3)
    parts = list(split_output(StepOutput(tokens, finished, prefill, stats), 5000))
    assert max(len(msgspec.json.encode(part)) for part in parts) <= 5000
    assert [token for part in parts for token in part.tokens] == tokens
    first, *scores = [one for part in parts for one in part.prefill]
    assert first == prefill[0] and {(one.done, one.total) for one in scores} == {(900, 900)}
    assert [score for one in scores for score in one.logprobs or []] == prefill[1].logprobs
    assert [part.finished for part in parts if part.finished] == [finished]
    assert parts[-1].stats == stats
    assert list(split_output(StepOutput(), 5000)) == []
