"""One name, one stream; a group is made once; ranks that run different operations are found by the
fingerprint of either."""

from __future__ import annotations

import pytest

from smolrun.errors import CollectiveMismatch, SmolrunError
from smolrun.mesh.streams import _REMEMBERED, Fingerprints, Groups, Stream, stream_of
from smolrun.wire.frame import Tag


def test_streams_of_groups_follow_from_the_name_and_are_not_in_the_table() -> None:
    assert stream_of("world") == 49_987  # on every machine, in every version: it is in the wire
    found = {stream_of(f"group {number}") for number in range(5000)}
    assert min(found) > max(Stream)
    assert max(found) < 1 << 16


def test_only_the_default_group_is_opened_twice_and_then_counts_on() -> None:
    groups = Groups()
    assert groups.open("world").take(3) == Tag(stream_of("world"), 0, 0)
    assert groups.open("world").take().operation == 3
    groups.open("experts")
    with pytest.raises(SmolrunError, match="'experts'"):
        groups.open("experts")


def test_two_names_with_one_stream_are_refused() -> None:
    groups, seen = Groups(), dict[int, str]()
    name = ""
    for number in range(10_000):  # about 320 are enough for one pair
        name = f"group {number}"
        if stream_of(name) in seen:
            break
        seen[stream_of(name)] = name
    groups.open(seen[stream_of(name)])
    with pytest.raises(SmolrunError, match=f"'{name}'"):
        groups.open(name)


def test_ranks_are_compared_in_any_order() -> None:
    prints, tag = Fingerprints(), Tag(300, 5, 0)
    left = prints.register("left", [0, 1, 2], "take stage 2")
    right = prints.register("right", [0, 1, 2])
    prints.check(2, tag, left)
    prints.check(0, tag._replace(hop=3), left)
    prints.check(0, tag, 0)  # says nothing
    prints.check(0, tag._replace(operation=6), right)
    assert prints.of(tag) == left
    with pytest.raises(CollectiveMismatch) as caught:
        prints.check(1, tag, right)
    assert caught.value.ranks == (1, 2)
    assert caught.value.operations == ("right", "left")
    assert caught.value.hint == "take stage 2"


def test_other_ranks_under_one_name_are_another_operation() -> None:
    prints, tag = Fingerprints(), Tag(300, 5, 0)
    prints.check(0, tag, prints.register("barrier", [0, 1]))
    unknown = Fingerprints().register("barrier", [0, 1, 2])
    with pytest.raises(CollectiveMismatch, match="another name or group"):
        prints.check(1, tag, unknown)


def test_a_rank_that_knows_neither_operation_still_reports_two() -> None:
    """It is behind the others, so that it sees both of their operations before it runs one."""
    prints, elsewhere, tag = Fingerprints(), Fingerprints(), Tag(300, 5, 0)
    prints.check(0, tag, elsewhere.register("all_gather", [0, 1, 2]))
    with pytest.raises(CollectiveMismatch) as caught:
        prints.check(2, tag, elsewhere.register("broadcast", [0, 1, 2]))
    assert caught.value.ranks == (0, 2)
    assert len(set(caught.value.operations)) == 2


def test_old_operations_are_forgotten() -> None:
    prints = Fingerprints()
    one = prints.register("one", [0])
    for operation in range(_REMEMBERED + 10):
        prints.check(0, Tag(300, operation, 0), one)
    assert len(prints._running) == _REMEMBERED
    assert prints.of(Tag(300, 0, 0)) == 0
