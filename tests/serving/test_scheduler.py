"""The scheduler keeps its promises for any order of submissions, results and cancellations."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smolrun.errors import ProtocolError
from smolrun.models.sampling import Sampling
from smolrun.serving.batch import Batch, BatchResult, PromptLogprobs, Sampled
from smolrun.serving.cache_slots import CacheSlots, common_prefix
from smolrun.serving.messages import Cancel, Finished, StepOutput, Submit
from smolrun.serving.scheduler import Scheduler
from tests.serving.fake_stage import VOCAB, FakeStage, expected_text


@dataclass
class Run:
    """A scheduler over fake stages that stand one behind the other, each result in its turn."""

    slots: int
    capacity: int
    stages: int
    chunk_tokens: int
    output: StepOutput = field(default_factory=StepOutput)
    batches: list[Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begin()

    def lose(self) -> None:
        """The stages are lost with their caches and all that was on its way; others take over."""
        self.collect()
        lost = self.scheduler
        self._begin()
        self.scheduler.take_over(lost)

    def _begin(self) -> None:
        self.scheduler = Scheduler(
            slots=self.slots,
            capacity=self.capacity,
            vocab_size=VOCAB,
            stages=self.stages,
            chunk_tokens=self.chunk_tokens,
        )
        size = {"slots": self.slots, "capacity": self.capacity}
        self._stages = [FakeStage(index, self.stages, **size) for index in range(self.stages)]
        self._results: list[BatchResult] = []

    def schedule(self) -> bool:
        """Start a batch if there is one, and check what holds for every batch."""
        batch = self.scheduler.schedule()
        if batch is None:
            return False
        self.batches.append(batch)
        running = len({row.slot for row in batch.rows})
        prompts = sum(row.count for row in batch.rows if row.count > 1)
        assert running == len(batch.rows) <= self.slots
        assert prompts <= max(self.chunk_tokens, self.slots)
        hidden: torch.Tensor | BatchResult | None = None
        for stage in self._stages:
            assert not isinstance(hidden, BatchResult)
            hidden = stage.run(batch, hidden)
        assert isinstance(hidden, BatchResult)
        self._results.append(hidden)
        return True

    def return_result(self) -> bool:
        """The oldest batch comes back."""
        if not self._results:
            return False
        self.scheduler.update(self._results.pop(0))
        self.collect()
        return True

    def collect(self) -> None:
        new = self.scheduler.take_output()
        for name in ("tokens", "finished", "prefill"):
            getattr(self.output, name).extend(getattr(new, name))

    def finish(self) -> None:
        """Until nothing is left; a bound shows that there is progress in every round."""
        for _ in range(3000):
            if not (self.schedule() or self.return_result()):
                break
        self.collect()
        assert not self.scheduler.has_requests

    def text(self, request: str, choice: int = 0) -> list[int]:
        return [
            token.id
            for token in self.output.tokens
            if (token.request, token.choice) == (request, choice)
        ]


def run_of(
    slots: int = 4, capacity: int = 40, stages: int = 1, chunk_tokens: int = 8, *requests: Submit
) -> Run:
    run = Run(slots, capacity, stages, chunk_tokens)
    for request in requests:
        run.scheduler.submit(request)
    return run


# Few different tokens, so that prompts often begin alike.
PROMPTS = st.lists(st.integers(20, 22), min_size=1, max_size=36)


@st.composite
def _scripts(draw: st.DrawFn) -> list[tuple[str, int]]:
    return draw(
        st.lists(
            st.tuples(
                st.sampled_from(["submit", "schedule", "result", "cancel", "lose"]),
                st.integers(0, 9),
            ),
            max_size=60,
        )
    )


@settings(max_examples=60, deadline=None)
@example(1, 1, 1, [([20], 0, 1, False)], [("submit", 0), ("lose", 0)])
@example(1, 2, 4, [([20] * 40, 3, 2, True)], [("submit", 0), ("schedule", 0), ("lose", 0)])
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 12),
    st.lists(
        st.tuples(PROMPTS, st.integers(0, 12), st.integers(1, 3), st.booleans()),
        min_size=1,
        max_size=8,
    ),
    _scripts(),
)
def test_every_choice_ends_once_and_with_its_own_text(
    slots: int,
    stages: int,
    chunk_tokens: int,
    wanted: list[tuple[list[int], int, int, bool]],
    script: list[tuple[str, int]],
) -> None:
    run = Run(slots, 40, stages, chunk_tokens)
    requests = [
        Submit(f"r{index}", prompt, max_tokens, choices, echo_logprobs=is_echoed)
        for index, (prompt, max_tokens, choices, is_echoed) in enumerate(wanted)
    ]
    unsent, cancelled = list(requests), set()
    for action, number in [*script, *(("submit", 0) for _ in requests)]:
        if action == "submit" and unsent:
            run.scheduler.submit(unsent.pop(0))
        elif action == "schedule":
            run.schedule()
        elif action == "result":
            run.return_result()
        elif action == "cancel" and number < len(requests) - len(unsent):
            choice = None if number % 2 else 0
            run.scheduler.cancel(Cancel(f"r{number}", choice))
            cancelled.add(f"r{number}")
        elif action == "lose":
            run.lose()
        assert run.scheduler.num_in_flight <= stages
    run.finish()
    ends = Counter((one.request, one.choice) for one in run.output.finished)
    assert ends == {(one.request, choice): 1 for one in requests for choice in range(one.choices)}
    assert run.scheduler.slots.num_free == slots
    assert run.scheduler.stats().cache_usage == 0
    reasons = {(one.request, one.choice): one.reason for one in run.output.finished}
    for one in requests:
        count = min(one.max_tokens, 40 - len(one.prompt_ids))
        for choice in range(one.choices):
            text = run.text(one.request, choice)
            expected = expected_text(one.prompt_ids, count, stages=stages, choice=choice)
            if reasons[one.request, choice] == "length":
                assert text == expected
            else:
                assert one.request in cancelled
                assert text == expected[: len(text)]
        if one.request not in cancelled:
            check_prefill(run, one)


def check_prefill(run: Run, request: Submit) -> None:
    """Its progress only grows, and each log-probability comes once."""
    reports = [one for one in run.output.prefill if one.request == request.request]
    done = [report.done for report in reports]
    assert done == sorted(set(done)) and done[-1] == len(request.prompt_ids)
    values = [value for report in reports for value in report.logprobs or []]
    if request.echo_logprobs:
        assert values == [None, *((-token / VOCAB, []) for token in request.prompt_ids[1:])]


def test_what_does_not_fit_into_the_slots_that_are_left_ends_with_an_error() -> None:
    requests = [Submit("long", [20] * 30, 8), Submit("short", [21] * 5, 30), Submit("new", [22], 2)]
    run = run_of(2, 40, 1, 64, *requests)
    run.schedule()
    run.return_result()
    lost, smaller = run.scheduler, Run(1, 20, 1, 64)
    smaller.scheduler.take_over(lost)
    smaller.finish()
    ends = {one.request: one for one in smaller.output.finished}
    assert ends["long"].reason == "error" and "a host was lost" in ends["long"].message
    assert (ends["short"].reason, ends["new"].reason) == ("length", "length")
    assert [*run.text("short"), *smaller.text("short")] == expected_text([21] * 5, 15, stages=1)
    assert smaller.scheduler.stats().prompt_tokens == 36


def test_slots_are_given_in_order_of_arrival() -> None:
    requests = [Submit(f"r{index}", [20 + index] * 10, 3) for index in range(9)]
    run = run_of(2, 40, 2, 8, *requests)
    run.finish()
    assert [one.request for one in run.output.finished] == [one.request for one in requests]


def test_as_many_batches_are_in_flight_as_there_are_stages() -> None:
    requests = [Submit(f"r{index}", [20 + index], 30) for index in range(8)]
    run = run_of(8, 40, 4, 64, *requests)
    while run.schedule():
        pass
    for _ in range(30):
        run.return_result()
        while run.schedule():
            pass
        assert run.scheduler.num_in_flight == 4
    # The prompts came in one batch; from then on each one takes a quarter of the sequences.
    assert [len(batch.rows) for batch in run.batches[:6]] == [8, 2, 2, 2, 2, 2]


def test_a_long_prompt_comes_in_chunks_beside_running_answers() -> None:
    run = run_of(4, 200, 1, 8, Submit("running", [20] * 4, 50))
    run.schedule()
    run.return_result()
    run.scheduler.submit(Submit("long", [21] * 100, 1))
    run.scheduler.submit(Submit("short", [22] * 5, 1))
    run.finish()
    with_prompts = [batch for batch in run.batches[1:] if len(batch.token_ids) > 1]
    assert all(len(batch.token_ids) <= 9 for batch in with_prompts)
    assert len([row for batch in with_prompts for row in batch.rows if row.slot == 0]) == len(
        with_prompts
    )
    # The short one shares the first chunks, and does not wait for the long one.
    assert [one.request for one in run.output.finished] == ["short", "long", "running"]


def test_an_abandoned_prompt_ends_with_its_chunk() -> None:
    run = run_of(1, 200, 1, 8, Submit("long", [21] * 100, 1), Submit("next", [22] * 3, 1))
    run.schedule()
    run.scheduler.cancel(Cancel("long"))
    run.collect()
    assert [one.reason for one in run.output.finished] == ["cancelled"]
    run.return_result()
    run.schedule()
    assert run.batches[-1].token_ids == [22] * 3


def test_a_slot_that_is_taken_for_a_short_prefix_keeps_a_long_conversation() -> None:
    slots = CacheSlots(3, 100)
    system, long, other = list(range(10)), list(range(60)), [*range(10), 99, 98]
    first = slots.take(long, reuse=True)
    slots.append(first.slot, long)
    slots.release(first.slot)
    second = slots.take(other, reuse=True)
    assert (second.slot != first.slot, second.cached) == (True, 10)
    assert second.fork is not None and second.fork.source == first.slot
    slots.append(second.slot, other[10:])
    again = slots.take([*long, 7], reuse=True)
    assert (again.slot, again.cached, again.fork) == (first.slot, 60, None)
    assert slots.tokens[again.slot] == long
    last = slots.take(system, reuse=True)  # as a copy of either
    assert last.cached == 9 and last.fork is not None
    assert slots.num_free == 0


def test_an_unused_slot_is_taken_before_one_with_tokens() -> None:
    slots = CacheSlots(2, 100)
    first = slots.take([1, 2, 3], reuse=True).slot
    slots.append(first, [1, 2, 3])
    slots.release(first)
    assert slots.take([7, 8], reuse=True).slot != first
    assert slots.take([7, 8, 9], reuse=False).slot == first


@given(st.lists(st.integers(0, 1), max_size=30), st.lists(st.integers(0, 1), max_size=30))
def test_common_prefix(one: list[int], other: list[int]) -> None:
    expected = next(
        (index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
        min(len(one), len(other)),
    )
    assert common_prefix(one, other) == expected


@pytest.mark.parametrize(
    "result",
    [
        BatchResult(1, [Sampled(0, 5)]),
        BatchResult(0, []),
        BatchResult(0, [Sampled(3, 5)]),
        BatchResult(0, [Sampled(0, VOCAB)]),
        BatchResult(0, [Sampled(0, 5)], [PromptLogprobs(0, [(-1.0, [])])]),
        BatchResult(0, [Sampled(0, 5)], [PromptLogprobs(0, [(-1.0, [])] * 3)]),
        BatchResult(0, [Sampled(0, 5)], [PromptLogprobs(1, [(-1.0, [])] * 2)]),
    ],
)
def test_a_result_must_be_that_of_its_batch(result: BatchResult) -> None:
    run = run_of(1, 40, 1, 8, Submit("r", [20, 21, 22], 3, echo_logprobs=True))
    run.schedule()
    with pytest.raises(ProtocolError):
        run.scheduler.update(result)


def test_a_request_id_is_not_used_twice_at_a_time() -> None:
    run = run_of(1, 40, 1, 8, Submit("r", [20], 3), Submit("r", [20], 3))
    (finished,) = run.scheduler.take_output().finished
    assert finished == Finished("r", 0, "error", 0, "a request r is running already")


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (Submit("r", [VOCAB], 3), f"token {VOCAB} is not in the vocabulary of {VOCAB} tokens"),
        (
            Submit("r", [20], 3, sampling=Sampling(logit_bias={VOCAB: 1.0})),
            f"token {VOCAB} is not in the vocabulary of {VOCAB} tokens",
        ),
        (Submit("r", [], 3), "the prompt has 0 tokens; 1 to 40 are possible"),
        (Submit("r", [20], 3, choices=0), "choices=0, max_tokens=3 are not possible"),
    ],
)
def test_a_request_that_cannot_run_ends_alone(request_: Submit, problem: str) -> None:
    run = run_of(1, 40, 1, 8, request_)
    assert run.scheduler.take_output().finished == [Finished("r", 0, "error", 0, problem)]
    assert run.scheduler.schedule() is None and not run.scheduler.has_requests


def test_time_to_wait_is_bounded_by_the_share_of_a_batch() -> None:
    """No sequence that decodes is passed over: each has a row in every round of batches."""
    requests = [Submit(f"r{index}", [20 + index], 30) for index in range(7)]
    run = run_of(7, 40, 3, 64, *requests)
    for _ in range(60):
        while run.schedule():
            pass
        run.return_result()
    for slot in range(7):
        numbers = [batch.number for batch in run.batches if slot in {r.slot for r in batch.rows}]
        assert max(later - one for one, later in pairwise(numbers)) <= 3
