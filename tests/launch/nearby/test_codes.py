from __future__ import annotations

import threading

import pytest

from smolrun.launch.nearby.codes import TRIES, CodeKeeper, new_code, normalized
from smolrun.launch.nearby.messages import TooManyWrongCodes, WrongCode
from tests.waiting import SOON_S


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keeper(clock: Clock) -> CodeKeeper:
    shown: list[str] = []
    keeper = CodeKeeper(shown.append, clock)
    keeper.shown = shown  # type: ignore[attr-defined]
    return keeper


def test_codes_are_of_40_bits_and_differ():
    codes = {new_code() for _ in range(1000)}
    assert len(codes) == 1000
    letters = set("".join(codes)) - {"-"}
    assert len(letters) == 32  # 8 of 32: 40 bits
    assert all(len(code) == 9 and code[4] == "-" for code in codes)
    assert letters.isdisjoint("ILOU")


@pytest.mark.parametrize(
    "typed", ["7kqm-3xw1", "7KQM 3XW1\n", "7kqm3xwl", "7KQM-3XWI", " 7kqm-3xw1"]
)
def test_a_code_may_be_typed_as_people_type(typed: str):
    assert normalized(typed) == "7KQM-3XW1"


def test_what_is_written_is_read_back():
    for _ in range(100):
        code = new_code()
        assert normalized(code) == code == normalized(code.lower().replace("-", ""))


@pytest.mark.parametrize(
    "typed", ["", "7kqm", "7kqm-3xw1-9", "7kqm-3xwu", "7kqm-3x\x1b1", "٣kqm3xwl"]
)
def test_what_cannot_be_a_code_is_no_try(typed: str):
    with pytest.raises(WrongCode, match="8 letters and digits"):
        normalized(typed)


def a_try(keeper: CodeKeeper, address: str, *, is_right: bool) -> None:
    keeper.end(address, keeper.begin(address, 0.0), is_right=is_right)


def test_three_wrong_tries_of_anybody_retire_the_code(keeper: CodeKeeper):
    first = keeper.code
    for number in range(TRIES - 1):
        a_try(keeper, f"10.0.0.{number}", is_right=False)
    for number in range(5):
        a_try(keeper, f"10.0.1.{number}", is_right=True)  # right ones do not count
    assert keeper.code == first
    a_try(keeper, "10.0.0.9", is_right=False)
    assert keeper.code != first
    assert keeper.shown == [first, keeper.code]
    a_try(keeper, "10.0.0.10", is_right=False)  # the new code has all its tries
    assert len(keeper.shown) == 2


def test_an_address_waits_longer_after_each_wrong_try(keeper: CodeKeeper, clock: Clock):
    waits = []
    for _ in range(8):
        a_try(keeper, "10.0.0.1", is_right=False)
        with pytest.raises(TooManyWrongCodes) as refused:
            keeper.begin("10.0.0.1")
        waits.append(refused.value.wait_s)
        a_try(keeper, "10.0.0.2", is_right=True)  # others do not wait
        clock.now += refused.value.wait_s
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]
    a_try(keeper, "10.0.0.1", is_right=True)  # and it is forgiven
    a_try(keeper, "10.0.0.1", is_right=False)
    with pytest.raises(TooManyWrongCodes, match="in 1 s"):
        keeper.begin("10.0.0.1")


def test_all_addresses_of_a_64_wait_together(keeper: CodeKeeper):
    a_try(keeper, "fd00::1", is_right=False)
    for address in ("fd00::1", "fd00::ffff:1%eth0"):
        with pytest.raises(TooManyWrongCodes):
            keeper.begin(address)
    a_try(keeper, "fd00:0:0:1::1", is_right=True)
    a_try(keeper, "not an address", is_right=True)


def test_many_tries_at_once_are_no_more_guesses(keeper: CodeKeeper):
    codes = [keeper.begin(f"10.0.0.{number}") for number in range(TRIES)]
    assert set(codes) == {keeper.code}
    with pytest.raises(TooManyWrongCodes):
        keeper.begin("10.0.0.9", timeout_s=0.01)
    later: list[str] = []
    waiting = threading.Thread(target=lambda: later.append(keeper.begin("10.0.0.9", SOON_S)))
    waiting.start()
    for number, code in enumerate(codes):
        keeper.end(f"10.0.0.{number}", code, is_right=False)
    waiting.join(SOON_S)
    assert later == [keeper.code]
    assert later[0] not in codes


def test_a_try_of_a_retired_code_does_not_count_against_the_new_one(keeper: CodeKeeper):
    old = keeper.begin("10.0.0.1")
    for number in range(TRIES):  # the two others that may be under way, and one more
        if number < TRIES - 1:
            a_try(keeper, f"10.0.1.{number}", is_right=False)
    keeper.end("10.0.0.1", old, is_right=False)  # the third: retired
    new = keeper.code
    assert new != old
    keeper.end("10.0.0.7", old, is_right=False)  # late
    for number in range(TRIES - 1):
        a_try(keeper, f"10.0.2.{number}", is_right=False)
    assert keeper.code == new


def test_strangers_of_many_addresses_do_not_fill_the_memory(keeper: CodeKeeper):
    for number in range(3000):
        a_try(keeper, f"fd00:0:0:{number:x}::1", is_right=False)
    assert len(keeper._origins) == 1024
