"""Which replica a request is sent to, by speed, load and cached prompts; simulated."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from smolrun.serving.messages import HostMemory, Ready, Submit, Token
from smolrun.serving.replicas import Replicas
from tests.serving.test_replicas import LONG, SHORT, submit


def chosen(replicas: Replicas, request: Submit, load: Mapping[int, int]) -> int | None:
    """The rank that a request is sent to."""
    rank = replicas.choose(request, load)
    if rank is not None:
        replicas.assign(rank, request.prompt_ids, [])
    return rank


def test_the_least_loaded_for_its_slots_is_chosen_and_equals_take_turns() -> None:
    replicas = Replicas(prefix_reuse=False)
    for rank, ready in enumerate((LONG, SHORT, LONG)):
        replicas.add(rank, ready)
    assert [chosen(replicas, submit(), {}) for _ in range(4)] == [0, 1, 2, 0]
    assert replicas.choose(submit(), {0: 1, 1: 1, 2: 1}) == 1  # 1 of 4 slots
    assert replicas.choose(submit(max_tokens=50), {0: 2, 2: 1}) == 2  # rank 1 is too short
    replicas.set_open(2, is_open=False)
    assert replicas.choose(submit(), {0: 9, 1: 40}) == 0
    replicas.lose(0)
    assert replicas.choose(submit(max_tokens=50), {}) is None
    assert not replicas.is_hopeless(submit(max_tokens=50), None)  # rank 2 will be open again
    replicas.lose(2)
    assert replicas.is_hopeless(submit(max_tokens=50), None)
    replicas.lose(1)
    assert not replicas.is_hopeless(submit(max_tokens=50), None)  # any may come back


@dataclass
class Simulated:
    """A replica that has begun `running` answers: their tokens left, and when each was asked for.
    A step of all slots takes twice as long as that of one, and a token of a prompt a tenth."""

    token_s: float
    busy_until: float = 0.0
    running: list[list[float]] = field(default_factory=list)


def simulate(replicas: Replicas, token_s: Sequence[float], requests: int, every_s: float) -> float:
    """The mean seconds of answers of 50 tokens to prompts of 20, one `every_s`."""
    ranks = [Simulated(each) for each in token_s]
    for rank in range(len(ranks)):
        replicas.add(rank, Ready(1000, 8000, 8))
    now, asked, waits = 0.0, 0, list[float]()
    while len(waits) < requests:
        if asked < requests and now >= asked * every_s:
            load = {rank: len(one.running) for rank, one in enumerate(ranks)}
            rank = chosen(replicas, Submit(f"{asked}", [asked] * 20, 50), load)
            assert rank is not None
            ranks[rank].running.append([50.0, now, float(asked)])
            asked += 1
        for rank, one in enumerate(ranks):
            batch = one.running[:8]
            if not batch or now < one.busy_until:
                continue
            tokens = [Token(f"{number:g}", 0, 1) for _, _, number in batch]
            replicas.there[rank].note_tokens(tokens, now)
            for answer in batch:
                answer[0] -= 1
            waits += [now - asked_s for left, asked_s, _ in batch if not left]
            one.running = [answer for answer in one.running if answer[0]]
            one.busy_until = now + one.token_s * (1 + len(batch) / 8)
        now += 0.005
    return statistics.mean(waits)


class ByLoadAlone(Replicas):
    """As before replicas were measured."""

    def choose(
        self, submit: Submit, load: Mapping[int, int], *, version: int | None = None
    ) -> int | None:
        return min(self.there, key=lambda rank: (load.get(rank, 0), self.there[rank].last_turn))


@pytest.mark.parametrize(
    ("token_s", "most"),
    [((0.03, 0.03, 0.3), 0.75), ((0.03, 0.03, 0.033), 1.02)],
    ids=["a slow one", "all alike"],
)
def test_a_slow_replica_gets_what_the_others_have_no_time_for(
    token_s: tuple[float, ...], most: float
) -> None:
    light = [simulate(kind(), token_s, 200, 0.25) for kind in (Replicas, ByLoadAlone)]
    assert light[0] < most * light[1]
    heavy = [simulate(kind(), token_s, 200, 0.08) for kind in (Replicas, ByLoadAlone)]
    assert heavy[0] < most * heavy[1]


def test_a_slow_replica_is_used_once_the_others_are_full() -> None:
    replicas = Replicas(prefix_reuse=False)
    for rank, token_s in enumerate((0.05, 0.2)):
        replicas.add(rank, Ready(1000, 8000, 8))
        for step in range(9):
            replicas.there[rank].note_tokens([Token("a", 0, step)], step * token_s)
    measured = [replicas.there[rank].token_s for rank in (0, 1)]
    assert measured == pytest.approx([0.05 * 8 / 9, 0.2 * 8 / 9])
    assert [replicas.choose(submit(), {0: load}) for load in (16, 23, 25)] == [0, 0, 1]


def test_gaps_in_which_a_choice_paused_say_nothing_of_the_speed() -> None:
    replicas = Replicas()
    replicas.add(0, LONG)
    one = replicas.there[0]
    for second in range(12):  # the end of an answer, and the first token of the next one
        one.note_tokens([Token(f"{second}", 0, 1)], float(second))
    assert one.token_s is None
    for step in range(8):
        one.note_tokens([Token("b", 0, 1), Token("c", 0, 1)], 20 + 0.2 * step)
    assert one.token_s == pytest.approx(0.1)  # both slots were full


def test_the_turns_of_a_chat_stay_where_it_is_cached_unless_that_one_is_much_busier() -> None:
    replicas = Replicas()
    for rank in range(3):
        replicas.add(rank, Ready(10_000, 80_000, 8))
    prompt, answer = list(range(600)), list(range(1000, 1400))
    first = replicas.choose(Submit("a", prompt, 400), {0: 1, 2: 1})
    assert first == 1
    replicas.assign(1, prompt, answer)  # tokens come later
    next_turn = Submit("b", [*prompt, *answer, 7, 8], 100)
    assert replicas.there[1].cached(next_turn.prompt_ids) == 1000
    assert replicas.choose(next_turn, {1: 5}) == 1  # the others would compute 1002 tokens
    assert replicas.choose(next_turn, {1: 8}) == 0
    assert replicas.choose(Submit("c", [9, *prompt], 100), {1: 1}) == 0
    short = Submit("d", prompt[:20], 100)  # not worth waiting for
    assert replicas.choose(short, {1: 1}) == 0
    for number in range(8):  # as many other requests as there are slots
        replicas.assign(1, [2000 + number], [])
    assert replicas.choose(next_turn, {1: 1}) == 0
    replicas.assign(2, next_turn.prompt_ids, [])
    replicas.add(2, Ready(10_000, 80_000, 8, version=1))  # other weights: nothing is cached
    assert replicas.choose(next_turn, {0: 0, 1: 1, 2: 1}) == 0


def test_chats_compute_far_fewer_tokens_of_prompts_and_no_replica_idles() -> None:
    """12 chats of 6 turns over 3 replicas, of which up to 12 run at a time."""
    computed = {True: 0, False: 0}
    used = dict.fromkeys(range(3), 0)
    for reuses in computed:
        replicas = Replicas(prefix_reuse=reuses)
        for rank in range(3):
            replicas.add(rank, Ready(10_000, 80_000, 8))
        chats = [[1, 2, 3, 10 + number] * 50 for number in range(12)]
        for turn in range(6):
            load: Counter[int] = Counter()
            for number in [*range(turn, 12), *range(turn)]:
                prompt = list(chats[number])
                rank = replicas.choose(Submit(f"{number}", prompt, 100), load)
                assert rank is not None
                computed[reuses] += len(prompt) - replicas.there[rank].cached(prompt)
                answer = [100 + turn] * 100
                replicas.assign(rank, prompt, answer)
                chats[number] += [*answer, 5, 6]
                load[rank] += 1
                used[rank] += reuses
    assert computed[True] < computed[False] / 3
    assert min(used.values()) >= 18  # of 72


def test_a_replica_whose_host_lacks_memory_is_the_last_choice_and_refuses_only_if_all_lack_it() -> (
    None
):
    replicas = Replicas()
    for rank in (0, 1):
        replicas.add(rank, LONG)
    replicas.note_memory(0, HostMemory(0, "mini1", 2**28, 2**34, 2**30))
    assert replicas.choose(submit(), {1: 9}) == 1
    assert replicas.memory_low({}) is None and "mini1" in (replicas.memory_low({}, 0) or "")
    replicas.note_memory(1, HostMemory(1, "mini2", 2**28, 2**34, 2**30))
    replicas.note_memory(2, HostMemory(2, "mini3", 2**28, 2**34, 2**30))  # it has no engine
    assert "mini1" in (replicas.memory_low({}) or "")
    assert replicas.choose(submit(), {}) is not None  # of a lost replica: it runs already
    replicas.set_open(0, is_open=False)
    assert "mini2" in (replicas.memory_low({}) or "")
    replicas.add(1, LONG)  # loaded again
    assert replicas.memory_low({}) is None
