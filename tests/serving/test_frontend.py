"""The frontend without HTTP: its queue, its buffers, its rate, its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from smolrun.serving.frontend import Frontend
from smolrun.serving.messages import (
    Cancel,
    Finished,
    FromEngine,
    HostMemory,
    Prefill,
    Ready,
    Recovering,
    StepOutput,
    Submit,
    ToEngine,
    Token,
)
from smolrun.serving.output_stream import Output, Queued, StreamFailed, Unavailable


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


def test_an_idle_model_is_unloaded_only_while_nothing_is_asked_and_requests_then_wait():
    async def test(bench: Bench) -> None:
        front, begun = bench.frontend, []

        async def unload(after_s: float) -> bool:
            front.unload(after_s, lambda: begun.append(bench.now))
            await asyncio.sleep(0)
            return front.state == "unloaded"

        first = front.submit(submit("a"))
        assert not first.waits_for_model
        bench.now = 100.0
        assert not await unload(60.0)  # it still runs
        await bench.receive(StepOutput(finished=[Finished("a", 0, "stop")]))
        assert not await unload(60.0)  # its reader has not taken all
        front.close(first)
        bench.now = 159.0
        assert not await unload(60.0)
        bench.now = 160.0
        assert await unload(60.0)
        assert begun == [160.0]
        assert "no request came for 1 min" in front.reason
        assert front.cluster()["stages"] == []
        front.check_room()
        metrics = front.metrics_text().decode()
        assert "smolrun_ready 1.0" in metrics and "smolrun_loaded 0.0" in metrics
        bench.sent.clear()
        await bench.receive(Ready(100, 1000, 2))  # of a rank that is being stopped
        assert front.state == "unloaded" and not front.is_wanted
        second, gone = front.submit(submit("b")), front.submit(submit("c"))
        assert second.waits_for_model and front.is_wanted
        front.close(gone)
        front.lose(0, "rank 0 has ended")
        front.begin_loading()
        await asyncio.sleep(0)
        assert (front.state, second.has_ended) == ("loading", False)
        assert bench.sent == [] and not front.is_wanted
        third = front.submit(submit("d"))
        await bench.receive(Ready(100, 1000, 2))
        assert (front.state, front.reason) == ("ready", "")
        assert bench.sent == [second.submit, third.submit]  # in order, without "c"
        assert not front.is_wanted and not front.submit(submit("e")).waits_for_model
        for request in ("d", "e"):
            await bench.receive(StepOutput(finished=[Finished(request, 0, "stop")]))
        for stream in list(front._streams.values()):
            front.close(stream)
        bench.now = 219.0
        assert not await unload(60.0)  # a new minute

    run(test)


def test_a_model_that_cannot_be_loaded_again_fails_those_who_wait_and_takes_the_next():
    async def test(bench: Bench) -> None:
        front = bench.frontend
        front.unload(0.0, lambda: None)
        await asyncio.sleep(0)
        waits = front.submit(submit("a"))
        front.begin_loading()
        front.stay_unloaded("mini2 does not answer")
        await asyncio.sleep(0)
        with pytest.raises(StreamFailed, match="mini2 does not answer"):
            await anext(waits)
        assert front.state == "unloaded" and front.reason.startswith("mini2 does not answer; ")
        front.check_room()
        front.drain()
        front.stay_unloaded("again")
        await asyncio.sleep(0)
        assert front.state == "draining"  # the end of a server is the end

    run(test)


def test_a_host_without_memory_refuses_what_is_new_and_keeps_what_runs():
    async def test(bench: Bench) -> None:
        front = bench.frontend
        runs = front.submit(submit("a"))
        front.note_memory(HostMemory(0, "mini1", 2**28, 2**34, 2**30))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match=r"mini1 has 0\.2 GB of memory available") as refused:
            front.check_room()
        assert (refused.value.retry_after_s, refused.value.is_full) == (10, False)
        front.check_room(0)
        await bench.tokens("a", 7)
        assert isinstance(await anext(runs), Token)
        metrics = front.metrics_text().decode()
        assert 'requests_refused_total{code="memory"} 1.0' in metrics
        assert "smolrun_memory_low 1.0" in metrics
        front.note_memory(HostMemory(0, "mini1", 2**33, 2**34, 2**30))
        await asyncio.sleep(0)
        front.check_room()

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


def test_those_that_wait_learn_how_many_are_before_them():
    async def test(bench: Bench) -> None:
        running = [bench.frontend.submit(submit(name)) for name in "ab"]
        one, two, three = (bench.frontend.submit(submit(name)) for name in "cde")
        assert not any(stream.has_outputs for stream in running)
        assert [await anext(stream) for stream in (one, two, three)] == [
            Queued(n) for n in (0, 1, 2)
        ]
        bench.frontend.close(two)
        assert await anext(three) == Queued(1) and not one.has_outputs
        await bench.tokens("a", 5)
        await bench.receive(StepOutput(finished=[Finished("a", 0, "stop")]))
        assert await anext(three) == Queued(0)
        assert not one.has_outputs  # it has a slot, and its first token says so

    run(test)


def test_the_queue_of_a_lost_replica_is_counted_again_where_it_goes():
    async def test(bench: Bench) -> None:
        bench.frontend.on_message(Ready(100, 1000, 2), 1)
        await asyncio.sleep(0)
        streams = [bench.frontend.submit(submit(name)) for name in "abcd"]
        assert not any(stream.has_outputs for stream in streams)
        moved = [stream for stream in streams if stream.rank == 1]
        bench.frontend.lose(1, "gone")
        await asyncio.sleep(0)
        found = [[await anext(stream), await anext(stream)] for stream in moved]
        assert [{type(one) for one in outputs} for outputs in found] == [{Queued, Recovering}] * 2
        assert [stream.queued for stream in moved] == [0, 1]

    run(test, num_replicas=2)
