"""Which replica a request runs on, and what happens to it when that one is lost, without HTTP."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest

from smolrun.models.sampling import Sampling
from smolrun.serving.frontend import Frontend
from smolrun.serving.messages import (
    Cancel,
    Finished,
    Prefill,
    Ready,
    Recovering,
    Retire,
    StepOutput,
    Submit,
    ToEngine,
    Token,
)
from smolrun.serving.output_stream import Output, OutputStream, StreamFailed, Unavailable
from smolrun.serving.replicas import Replicas

LONG, SHORT = Ready(100, 1000, 2), Ready(20, 1000, 4)


def submit(name: str = "a", max_tokens: int = 10, choices: int = 1, **more: object) -> Submit:
    return Submit(name, [1, 2], max_tokens, choices, **more)  # type: ignore[arg-type]


def test_together_they_take_what_fits_on_each() -> None:
    replicas = Replicas()
    assert replicas.ready is None
    replicas.add(0, LONG)
    replicas.add(3, SHORT)
    together = replicas.ready
    assert together is not None
    assert (together.max_sequence_length, together.max_running) == (20, 6)
    replicas.set_open(3, is_open=False)
    assert replicas.ready == LONG


class Bench:
    """A frontend of `count` replicas; `sent` has what each rank was sent."""

    def __init__(self, count: int) -> None:
        self.sent: dict[int, list[ToEngine]] = {rank: [] for rank in range(count)}
        self.frontend = Frontend(lambda rank, m: self.sent[rank].append(m), num_replicas=count)

    async def ready(self, *ranks: int, version: int = 0) -> None:
        for rank in ranks:
            self.frontend.on_message(Ready(100, 1000, 2, version=version), rank)
        await asyncio.sleep(0)

    async def say(self, rank: int, output: StepOutput) -> None:
        self.frontend.on_message(output, rank)
        await asyncio.sleep(0)

    async def tokens(self, rank: int, name: str, *ids: int, choice: int = 0) -> None:
        await self.say(rank, StepOutput(tokens=[Token(name, choice, id) for id in ids]))

    async def lose(self, rank: int) -> None:
        self.frontend.lose(rank, f"rank {rank} has ended")
        await asyncio.sleep(0)

    def last(self, rank: int) -> Submit:
        message = self.sent[rank][-1]
        assert isinstance(message, Submit)
        return message


def run(test: Callable[[Bench], Awaitable[None]], count: int = 3) -> None:
    async def whole() -> None:
        bench = Bench(count)
        bench.frontend.attach(asyncio.get_running_loop())
        await bench.ready(*range(count))
        await asyncio.wait_for(test(bench), 10)

    asyncio.run(whole())


async def until_true(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def rest(stream: OutputStream) -> list[Output]:
    return [output async for output in stream]


def test_a_lost_replicas_request_continues_with_its_tokens_and_late_ones_are_dropped() -> None:
    async def test(bench: Bench) -> None:
        stream = bench.frontend.submit(submit(max_tokens=4), 1)
        await bench.say(1, StepOutput(prefill=[Prefill("a", 2, 2)]))
        await bench.tokens(1, "a", 5, 6)
        await bench.lose(1)
        again = bench.last(0)
        assert (again.prompt_ids, again.max_tokens, again.continued) == ([1, 2], 4, {0: [5, 6]})
        assert bench.sent[1][-1] == Cancel("a")  # for one that is frozen
        await bench.tokens(1, "a", 99)  # it was, and wakes up
        await bench.tokens(0, again.request, 7)
        await bench.ready(1)
        await bench.lose(0)
        await bench.tokens(0, again.request, 98)
        third = bench.last(2)
        assert third.continued == {0: [5, 6, 7]}
        await bench.say(1, StepOutput(finished=[Finished("a", 0, "cancelled")]))
        await bench.tokens(2, third.request, 8)
        await bench.say(2, StepOutput(finished=[Finished(third.request, 0, "length")]))
        got = await rest(stream)
        assert [one.id for one in got if isinstance(one, Token)] == [5, 6, 7, 8]
        moved = [one for one in got if isinstance(one, Recovering)]
        assert [one.reason for one in moved] == [
            "rank 1 is lost, rank 0 continues",
            "rank 0 is lost, rank 2 continues",
        ]
        assert stream.ranks == [1, 0, 2]
        bench.frontend.close(stream)
        assert bench.frontend.num_requests == 0 and not bench.frontend.load

    run(test)


def test_a_choice_whose_end_was_not_reported_ends_as_it_would_have() -> None:
    async def test(bench: Bench) -> None:
        stream = bench.frontend.submit(submit(max_tokens=3, choices=4, stop_ids=[9]), 1)
        await bench.tokens(1, "a", 5, 9)
        await bench.tokens(1, "a", 5, 6, 7, choice=1)
        await bench.tokens(1, "a", 5, choice=2)
        await bench.lose(1)
        again = bench.last(0)
        assert again.continued == {2: [5], 3: []}
        assert stream.open_choices == {2, 3}
        await bench.say(
            0, StepOutput(finished=[Finished(again.request, c, "length") for c in (2, 3)])
        )
        ends = {o.choice: o.reason for o in await rest(stream) if isinstance(o, Finished)}
        assert ends == {0: "stop", 1: "length", 2: "length", 3: "length"}

    run(test)


def test_a_complete_answer_is_not_submitted_again() -> None:
    async def test(bench: Bench) -> None:
        stream = bench.frontend.submit(submit(max_tokens=2), 1)
        await bench.tokens(1, "a", 5, 6)
        await bench.lose(1)
        assert bench.sent[0] == bench.sent[2] == []
        assert [o.reason for o in await rest(stream) if isinstance(o, Finished)] == ["length"]

    run(test)


def test_scores_of_a_prompt_come_once_however_far_they_were() -> None:
    scores = [None, (-1.0, []), (-2.0, []), (-3.0, []), (-4.0, [])]

    async def test(bench: Bench) -> None:
        wanted = Submit("a", [1] * 5, 4, top_logprobs=0, echo_logprobs=True)
        stream = bench.frontend.submit(wanted, 1)
        await bench.say(1, StepOutput(prefill=[Prefill("a", 3, 5, scores[:3])]))
        await bench.lose(1)
        again = bench.last(0)
        assert again.echo_logprobs
        parts = [Prefill(again.request, 4, 5, scores[:4]), Prefill(again.request, 5, 5, scores[4:])]
        await bench.say(0, StepOutput(prefill=parts))
        await bench.lose(0)
        assert not bench.last(2).echo_logprobs  # all have come
        bench.frontend.fail("enough")
        await asyncio.sleep(0)
        got: list[Output] = []
        with pytest.raises(StreamFailed):
            async for output in stream:
                got.append(output)  # noqa: PERF401  (the loop ends by an error)
        values = [v for o in got if isinstance(o, Prefill) for v in o.logprobs or []]
        assert values == scores

    run(test)


def test_requests_wait_while_all_replicas_are_lost_and_new_ones_are_refused() -> None:
    async def test(bench: Bench) -> None:
        stream = bench.frontend.submit(submit(), 1)
        await bench.tokens(1, "a", 5)
        await bench.lose(0)
        await bench.lose(1)
        assert bench.frontend.state == "starting"
        with pytest.raises(Unavailable, match="no replica is there: rank 1 has ended") as refused:
            bench.frontend.check_room()
        assert not refused.value.is_full
        await bench.ready(0)
        assert bench.frontend.state == "ready"
        assert bench.last(0).continued == {0: [5]}
        moved = [await anext(stream) for _ in range(2)][-1]
        assert moved == Recovering("rank 1 is lost, waiting for a replica")
        bench.frontend.fail("no rank is left")  # of no use any more: an error, not dropped
        await asyncio.sleep(0)
        with pytest.raises(StreamFailed, match="no rank is left"):
            await anext(stream)

    run(test, count=2)


def test_a_request_that_outlives_three_replicas_ends_as_it_may_be_what_ends_them() -> None:
    async def test(bench: Bench) -> None:
        poison = bench.frontend.submit(submit("poison"), 0)
        for rank in (0, 1):
            await bench.lose(rank)
        await bench.ready(0, 1)
        (rank,) = [rank for rank in range(3) if bench.frontend.load[rank]]
        await bench.lose(rank)
        with pytest.raises(StreamFailed, match=f"3 replicas were lost .*: rank {rank} has ended"):
            await rest(poison)
        assert not bench.frontend.load

    run(test)


def test_a_rank_may_be_asked_for_while_it_is_there() -> None:
    async def test(bench: Bench) -> None:
        for name in "abc":
            bench.frontend.check_room(1, 2)
            assert bench.frontend.submit(submit(name), 2).rank == 2
        bench.frontend.check_room(1, 1)
        await bench.lose(1)
        with pytest.raises(Unavailable, match="rank 1 takes no requests now"):
            bench.frontend.check_room(1, 1)
        bench.frontend.vacate(2, 99.0, lambda: None)
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="rank 2 takes no requests now"):
            bench.frontend.check_room(1, 2)

    run(test)


def test_an_answer_never_mixes_weights_of_two_versions() -> None:
    async def test(bench: Bench) -> None:
        old = bench.frontend.submit(submit("old"), 0)
        fresh = bench.frontend.submit(submit("fresh"), 0)
        await bench.tokens(0, "old", 5)
        await bench.ready(1, version=1)
        await bench.lose(2)
        await bench.lose(0)
        assert fresh.rank == 1 and fresh.version == 1  # it had no token yet
        with pytest.raises(StreamFailed, match="no other one has the same weights"):
            await rest(old)

    run(test)


def test_a_replica_that_is_to_load_gives_its_requests_away_and_keeps_those_of_its_own_weights() -> (
    None
):
    async def test(bench: Bench) -> None:
        gone = list[str]()
        begun = bench.frontend.submit(submit("begun"), 0)
        fresh = bench.frontend.submit(submit("fresh"), 0)
        await bench.tokens(0, "begun", 5)
        bench.frontend.vacate(0, 60.0, lambda: gone.append("first"))
        await asyncio.sleep(0)
        assert (begun.rank, fresh.rank, gone) == (0, 1, [])
        assert bench.sent[0][-1] == Cancel("fresh") and bench.last(1).version == 0
        await bench.say(0, StepOutput(finished=[Finished("begun", 0, "stop")]))
        await until_true(lambda: gone == ["first"])
        await bench.ready(0, version=1)
        assert not any(isinstance(one, Retire) and one.version == 1 for one in bench.sent[0])
        # The last one of its version: what it has begun can end nowhere else.
        await bench.ready(2, version=1)
        assert bench.sent[2][-1] == Retire(0)
        await bench.tokens(1, fresh.sent_as, 6)
        bench.frontend.vacate(1, 0.0, lambda: gone.append("second"))
        for _ in range(3):
            await asyncio.sleep(0.05)
        assert (fresh.rank, fresh.version, gone) == (1, 0, ["first"])
        bench.frontend.close(fresh)
        await until_true(lambda: gone == ["first", "second"])
        assert bench.frontend.submit(submit("new")).version == 1

    run(test)


def test_what_takes_too_long_moves_to_a_replica_with_the_same_weights() -> None:
    async def test(bench: Bench) -> None:
        stream = bench.frontend.submit(submit(), 0)
        await bench.tokens(0, "a", 5)
        bench.frontend.vacate(0, 0.0, lambda: None)
        await asyncio.sleep(0)
        assert stream.rank in (1, 2) and bench.last(stream.rank).continued == {0: [5]}
        got = [await anext(stream) for _ in range(2)]
        assert got[1] == Recovering(f"rank 0 loads newer weights, rank {stream.rank} continues")

    run(test)


def test_requests_are_refused_while_the_only_replica_loads() -> None:
    async def test(bench: Bench) -> None:
        bench.frontend.vacate(0, 0.0, lambda: None)
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="newer weights are being loaded") as refused:
            bench.frontend.check_room()
        assert refused.value.retry_after_s > 0
        await bench.ready(0, version=1)
        bench.frontend.check_room()

    run(test, count=1)


def test_scores_of_a_prompt_are_of_one_version_too() -> None:
    async def test(bench: Bench) -> None:
        wanted = Submit("a", [1] * 5, 4, top_logprobs=0, echo_logprobs=True)
        stream = bench.frontend.submit(wanted, 0)
        scores = [None, (-1.0, []), (-2.0, [])]
        await bench.say(0, StepOutput(prefill=[Prefill("a", 3, 5, scores)]))
        await bench.ready(1, version=1)
        await bench.ready(2, version=1)
        await bench.lose(0)
        with pytest.raises(StreamFailed, match="no other one has the same weights"):
            await rest(stream)

    run(test)


def test_a_client_that_leaves_while_its_replica_is_lost_is_cancelled_where_it_runs_now() -> None:
    async def test(bench: Bench) -> None:
        stream = bench.frontend.submit(submit(), 1)
        await bench.lose(1)
        name = bench.last(0).request
        bench.frontend.close(stream)
        assert bench.sent[0][-1] == Cancel(name)

    run(test)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=5)])
def test_losses_at_every_token_change_no_answer(sampling: Sampling) -> None:
    """Each rank answers by a function of all tokens, as engines do."""

    async def test(bench: Bench) -> None:
        for cuts in itertools.combinations(range(6), 2):
            name, left = f"cut{cuts}", {*cuts}
            stream = bench.frontend.submit(submit(name, max_tokens=6, sampling=sampling))
            text: list[int] = []
            while len(text) < 6:
                assert stream.rank is not None
                sent = bench.last(stream.rank)
                assert sent.continued.get(0, []) == text[: len(sent.continued.get(0, []))]
                if len(text) in left:
                    left.remove(len(text))
                    lost = stream.rank
                    await bench.lose(lost)
                    await bench.ready(lost)
                    continue
                text.append(sum(text) + len(text) + 3)
                await bench.tokens(stream.rank, stream.sent_as, text[-1])
            await bench.say(
                stream.rank or 0, StepOutput(finished=[Finished(stream.sent_as, 0, "length")])
            )
            assert [o.id for o in await rest(stream) if isinstance(o, Token)] == text
            bench.frontend.close(stream)

    run(test)
