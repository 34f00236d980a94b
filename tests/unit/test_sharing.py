"""Connections and memory that transfers share: fair, never more than there is, all given back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubfs.sharing import BLOCK, EACH, MARGIN, MEMORY, Block, Seat, Sharing, share

BLOCKS = MEMORY // BLOCK


def seats(stack: ExitStack, sharing: Sharing, *hosts: str) -> list[Seat]:
    return [stack.enter_context(sharing.seat(lambda host=host: host)) for host in hosts]


@pytest.mark.parametrize(
    ("whole", "others", "rest"),
    [
        (8, [], 8), (8, [1], 7), (8, [8], 4), (8, [2], 6), (8, [5], 4), (8, [1, 1], 6), (8, [8, 8], 3),
        (8, [1, 8], 4), (8, [8] * 7, 1), (8, [8] * 20, 1), (1, [1], 1), (1, [], 1), (3, [1, 1, 1, 1], 1),
    ],
)  # fmt: skip
def test_what_is_left_for_one_more(whole: int, others: Sequence[int], rest: int) -> None:
    assert share(whole, others) == rest


@given(st.integers(1, 20), st.lists(st.integers(1, 30), max_size=10))
def test_nobody_is_left_without_and_nobody_gets_more_than_is_fair(whole: int, others: list[int]) -> None:
    rest = share(whole, others)
    assert 1 <= rest <= whole
    assert rest >= whole // (len(others) + 1)
    # Who wants less than that leaves it to the others.
    assert rest >= whole - sum(others)


def test_connections_are_counted_by_host() -> None:
    with ExitStack() as stack:
        sharing = Sharing(3)
        a, b, elsewhere = seats(stack, sharing, "one", "one", "two")
        assert a.take(first=True)
        assert a.take(first=False)
        assert b.take(first=True)
        assert not a.take(first=False)
        assert not b.take(first=False)
        assert elsewhere.take(first=False)
        a.give_back()
        assert b.take(first=False)


def test_first_connection_is_granted_even_if_there_are_too_many() -> None:
    with ExitStack() as stack:
        sharing = Sharing(1)
        for seat in seats(stack, sharing, *["one"] * 3):
            assert seat.take(first=True)
            assert not seat.take(first=False)


def test_transfer_that_goes_leaves_its_connections_to_the_others() -> None:
    sharing = Sharing(4)
    with sharing.seat(lambda: "one") as stays:
        with sharing.seat(lambda: "one") as goes:
            goes.wanted = 4
            assert stays.fair() == 2
            for _ in range(3):
                assert goes.take(first=False)
            assert stays.take(first=True)
            assert not stays.take(first=False)
        assert stays.fair() == 4
        assert stays.take(first=False)


def test_redirect_moves_a_transfer_to_another_host() -> None:
    sharing, host = Sharing(2), "one"
    with sharing.seat(lambda: host) as moves, sharing.seat(lambda: "two") as other:
        moves.wanted = 2
        assert other.fair() == 2
        host = "two"
        assert other.fair() == 1


def test_bytes_come_out_of_a_block_as_they_went_in() -> None:
    data = os.urandom(BLOCK + 1000)
    with Sharing(8).seat(lambda: "one") as seat:
        block, other = seat.block(), seat.block()
        assert block is not None and other is not None
        other.append(memoryview(b"x" * BLOCK))
        assert block.append(memoryview(data)[:1000]) == 1000
        assert block.append(memoryview(data)[1000:]) == BLOCK - 1000
        assert block.append(memoryview(data)) == 0
        assert block.read() == data[:BLOCK]
        assert other.read() == b"x" * BLOCK


def test_memory_is_bounded_and_its_blocks_are_used_again() -> None:
    with ExitStack() as stack:
        sharing = Sharing(8)
        (seat,) = seats(stack, sharing, "one")
        seat.wanted = MEMORY // EACH
        taken = [seat.block() for _ in range(BLOCKS)]
        assert None not in taken
        assert not seat.has_room()
        assert seat.block() is None
        last = taken.pop()
        assert last is not None
        seat.free(last)
        assert seat.has_room()
        again = seat.block()
        assert again is not None and again.number == last.number
        assert again.read() == b""


def test_few_connections_need_little_memory() -> None:
    with Sharing(8).seat(lambda: "one") as seat:
        assert seat.room() == EACH
        seat.wanted = 3
        assert seat.room() == 3 * EACH
        seat.wanted = 1000
        assert seat.room() == MEMORY


def test_each_transfer_has_an_equal_part_of_the_memory() -> None:
    with ExitStack() as stack:
        sharing = Sharing(8)
        greedy, modest = seats(stack, sharing, "one", "two")
        greedy.wanted = modest.wanted = 8
        count = 0
        while greedy.has_room():
            assert greedy.block() is not None
            count += 1
        assert count == BLOCKS // 2
        assert modest.has_room(for_more=True)


def test_who_waited_for_memory_goes_on_when_there_is_some() -> None:
    with Sharing(8).seat(lambda: "one") as seat:
        seat.wanted = 8
        taken = [seat.block() for _ in range(BLOCKS)]
        for freed, block in enumerate(taken[: BLOCKS // MARGIN + 1]):
            assert seat.has_room() == (freed > 0)
            assert not seat.has_room(for_more=True)
            assert isinstance(block, Block)
            seat.free(block)
        assert seat.has_room(for_more=True)


def test_all_is_given_back_at_the_end() -> None:
    sharing = Sharing(8)
    with sharing.seat(lambda: "one") as stays:
        with sharing.seat(lambda: "two") as goes:
            assert [goes.block() for _ in range(5)].count(None) == 0
            assert stays.block() is not None
        assert len(sharing.unused) == BLOCKS - 1
    assert sharing.seats == []
    with sharing.seat(lambda: "one") as seat:
        assert len(sharing.unused) == BLOCKS
        assert seat.block() is not None


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_goes_back_to_the_system() -> None:
    sharing = Sharing(8)
    with sharing.seat(lambda: "one") as seat:
        before = resident()
        for _ in range(BLOCKS):
            block = seat.block()
            assert block is not None
            block.append(memoryview(b"x" * BLOCK))
        full = resident()
    assert full - before > MEMORY * 0.9
    assert full - resident() > MEMORY * 0.9
