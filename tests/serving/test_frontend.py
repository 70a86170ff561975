"""The frontend without HTTP: its queue, its buffers, its rate, its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from smolrun.serving.frontend import Frontend, Output, StreamFailed, Unavailable
from smolrun.serving.messages import (
    Cancel,
    Finished,
    FromEngine,
    Prefill,
    Ready,
    Recovering,
    StepOutput,
    Submit,
    ToEngine,
    Token,
)


class Bench:
    """A frontend whose clock and engine are the test's."""

    def __init__(self, **fields: int) -> None:
        self.sent: list[ToEngine] = []
        self.now = 0.0
        self.frontend = Frontend(lambda _, m: self.sent.append(m), clock=lambda: self.now, **fields)

    async def begin(self) -> None:
        self.frontend.attach(asyncio.get_running_loop())
        await self.receive(Ready(100, 1000, 2))

    async def receive(self, message: FromEngine) -> None:
        self.frontend.on_message(message)
        await asyncio.sleep(0)

    async def tokens(self, request: str, *ids: int, choice: int = 0) -> None:
        await self.receive(StepOutput(tokens=[Token(request, choice, id) for id in ids]))


def run(test: Callable[[Bench], Awaitable[None]], **fields: int) -> None:
    async def whole() -> None:
        bench = Bench(**fields)
        await bench.begin()
        await asyncio.wait_for(test(bench), 10)

    asyncio.run(whole())


def submit(name: str, choices: int = 1) -> Submit:
    return Submit(name, [1, 2], 10, choices)


def test_outputs_go_to_their_requests_in_order():
    async def test(bench: Bench) -> None:
        one, other = (bench.frontend.submit(submit(name)) for name in ("a", "b"))
        await bench.receive(StepOutput(prefill=[Prefill("b", 2, 2)]))
        await bench.tokens("a", 5)
        await bench.tokens("b", 6, 7)
        await bench.tokens("nobody", 8)
        await bench.receive(
            StepOutput(
                tokens=[Token("a", 0, 9)],
                finished=[Finished("a", 0, "stop", 1), Finished("b", 0, "length")],
            )
        )
        a = [output async for output in one]
        b = [output async for output in other]
        assert a == [Token("a", 0, 5), Token("a", 0, 9), Finished("a", 0, "stop", 1)]
        assert b[0] == Prefill("b", 2, 2) and b[-1] == Finished("b", 0, "length")
        assert (one.generated_tokens, one.cached_tokens) == (2, 1)

    run(test)


def test_a_request_that_is_closed_early_is_cancelled_once_and_a_finished_one_never():
    async def test(bench: Bench) -> None:
        left, done = (bench.frontend.submit(submit(name)) for name in ("left", "done"))
        await bench.receive(StepOutput(finished=[Finished("done", 0, "stop")]))
        for stream in (left, left, done):
            bench.frontend.close(stream)
        assert [message for message in bench.sent if isinstance(message, Cancel)] == [
            Cancel("left")
        ]
        assert bench.frontend.in_flight == 0

    run(test)


def test_one_choice_is_stopped_and_its_late_tokens_are_dropped():
    async def test(bench: Bench) -> None:
        stream = bench.frontend.submit(submit("a", choices=2))
        bench.frontend.stop_choice(stream, 0)
        await bench.tokens("a", 5)
        await bench.tokens("a", 6, choice=1)
        await bench.receive(
            StepOutput(finished=[Finished("a", 0, "cancelled"), Finished("a", 1, "stop")])
        )
        assert [output async for output in stream] == [
            Token("a", 1, 6),
            Finished("a", 1, "stop"),
        ]
        assert bench.sent[1:] == [Cancel("a", 0)]

    run(test)


def test_the_queue_is_bounded_and_retry_after_follows_the_rate():
    async def test(bench: Bench) -> None:
        frontend = bench.frontend
        streams = [frontend.submit(submit(str(number))) for number in range(5)]
        assert frontend.waiting == 3
        with pytest.raises(Unavailable) as full:
            frontend.check_room()
        assert full.value.is_full and full.value.retry_after_s == 1  # no rate is known yet
        for number in range(3):  # one choice every 10 s
            bench.now += 10.0
            await bench.receive(StepOutput(finished=[Finished(str(number), 0, "stop")]))
            frontend.close(streams[number])
        assert frontend.in_flight == 2
        for number in range(5, 8):
            frontend.submit(submit(str(number)))
        with pytest.raises(Unavailable) as full:
            frontend.check_room()
        assert full.value.retry_after_s == 30  # 3 wait, one leaves every 10 s
        with pytest.raises(Unavailable):
            frontend.check_room(2)

    run(test, max_waiting=3)


def test_a_large_request_is_taken_when_nothing_else_is_there():
    async def test(bench: Bench) -> None:
        bench.frontend.check_room(16)
        bench.frontend.submit(submit("a", choices=16))
        with pytest.raises(Unavailable):
            bench.frontend.check_room()

    run(test, max_waiting=3)


def test_a_reader_that_falls_behind_is_cancelled_and_keeps_what_it_has():
    async def test(bench: Bench) -> None:
        stream = bench.frontend.submit(submit("a"))
        await bench.tokens("a", *range(50))
        assert bench.sent[1:] == [Cancel("a")]
        got: list[Output] = []
        with pytest.raises(StreamFailed, match="too slowly"):
            async for output in stream:
                got.append(output)  # noqa: PERF401  (the loop ends by an error)
        assert len(got) == 20

    run(test, max_buffered=20)


def test_a_reader_that_lags_lets_others_run():
    async def test(bench: Bench) -> None:
        stream, turns = bench.frontend.submit(submit("a")), 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        await bench.tokens("a", *range(50))
        task = asyncio.ensure_future(other())
        for _ in range(40):
            await anext(stream)
        task.cancel()
        assert turns >= 39

    run(test)


def test_a_lost_engine_fails_every_stream_after_its_last_output():
    async def test(bench: Bench) -> None:
        stream = bench.frontend.submit(submit("a"))
        await bench.tokens("a", 1)
        bench.frontend.fail("rank 2 is lost")
        await asyncio.sleep(0)
        assert await anext(stream) == Token("a", 0, 1)
        with pytest.raises(StreamFailed, match="rank 2"):
            await anext(stream)
        with pytest.raises(Unavailable, match="rank 2"):
            bench.frontend.check_room()
        await bench.receive(Ready(100, 1000, 2))
        bench.frontend.check_room()

    run(test)


def test_a_lost_stage_pauses_streams_and_takes_no_request_until_it_is_ready_again():
    async def test(bench: Bench) -> None:
        stream = bench.frontend.submit(submit("a"))
        await bench.tokens("a", 1)
        await bench.receive(Recovering("lost rank 2"))
        assert bench.frontend.state == "recovering"
        with pytest.raises(Unavailable, match="rank 2"):
            bench.frontend.check_room()
        await bench.receive(Ready(100, 1000, 2))
        await bench.tokens("a", 2)
        bench.frontend.check_room()
        got = [await anext(stream) for _ in range(3)]
        assert got == [Token("a", 0, 1), Recovering("lost rank 2"), Token("a", 0, 2)]

    run(test)


def test_draining_ends_with_the_last_request():
    async def test(bench: Bench) -> None:
        stream = bench.frontend.submit(submit("a"))
        bench.frontend.drain()
        with pytest.raises(Unavailable, match="shut down"):
            bench.frontend.check_room()
        assert not await bench.frontend.wait_idle(0.01)
        bench.frontend.abort("too late")
        with pytest.raises(StreamFailed, match="too late"):
            await anext(stream)
        bench.frontend.close(stream)
        assert await bench.frontend.wait_idle(5)
        await bench.receive(Ready(100, 1000, 2))  # a regrouping that comes too late
        assert bench.frontend.state == "draining"

    run(test)


def test_messages_before_the_loop_runs_wait_for_it():
    bench = Bench()
    loop = asyncio.new_event_loop()
    bench.frontend.attach(loop)
    bench.frontend.on_message(Ready(100, 1000, 2))
    loop.run_until_complete(asyncio.sleep(0))
    assert bench.frontend.state == "ready"
    loop.close()
    bench.frontend.on_message(StepOutput())  # nobody is left: it is dropped
