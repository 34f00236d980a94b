"""Which range is fetched next: tables of cases, a simulation on a clock of its own, and a model test."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hubfs.transfer.chunks import CHUNK, MISSING, PRESENT
from hubfs.transfer.lane import BUDGET, FADING, FIRST, LARGEST, PER_PROCESSOR, QUICK, Lane, Policy
from hubfs.transfer.prefetch import (
    ACTIVE,
    CURSORS,
    JUMP,
    LONGEST_PAUSE,
    File,
    Kind,
    Prefetch,
    Request,
    Want,
)

KiB, MiB = 1 << 10, 1 << 20
BIG = 1000 * MiB


def asked(machine: Prefetch, now: float = 0.0) -> list[Request]:
    """All that the machine wants to send now."""
    return list(iter(lambda: machine.next(now), None))


def spans(requests: Iterable[Request], unit: int = MiB) -> list[tuple[float, float]]:
    return [(request.start / unit, request.stop / unit) for request in requests]


def wait_for(machine: Prefetch, file: File, start: int, stop: int) -> Want:
    """Somebody waits for a range, until `unwant`."""
    want = Want(file, start, min(stop, file.size))
    machine.want(want)
    return want


def read(machine: Prefetch, file: File, start: int, size: int, now: float = 0.0) -> list[Request]:
    """A reader waits for a range; all that is asked for then comes at once."""
    machine.read(file, start, start + size, now)
    want = wait_for(machine, file, start, start + size)
    sent = []
    while found := asked(machine, now):
        sent += found
        for request in found:
            machine.done(request, now + 0.01)
    assert file.has(start, start + size)
    machine.unwant(want)
    return sent


# ---- what is asked for when somebody waits


@pytest.mark.parametrize(
    ("size", "start", "length", "expected"),
    [
        (BIG, 100 * MiB, 4 * KiB, (100, 101)),
        (BIG, 100 * MiB + 5, 128 * KiB, (100, 101)),
        (BIG, 100 * MiB + 300 * KiB, 4 * KiB, (100.25, 101.25)),
        (BIG, BIG - 10 * KiB, 10 * KiB, (999.75, 1000)),
        (300 * KiB, 0, 10, (0, 300 / 1024)),
        (1, 0, 1, (0, 1 / MiB)),
    ],
)
def test_first_request_is_of_a_mebibyte(
    size: int, start: int, length: int, expected: tuple[float, float]
) -> None:
    machine, file = Prefetch(), File(size)
    machine.read(file, start, start + length, 0)
    wait_for(machine, file, start, start + length)
    assert spans(asked(machine)) == [expected]


def test_empty_file_and_empty_range_need_nothing() -> None:
    machine, file = Prefetch(), File(0)
    assert file.has(0, 0) and file.has(0, 100) and not file.missing
    wait_for(machine, file, 0, 100)
    other = File(BIG)
    assert other.has(7, 7)
    wait_for(machine, other, 7, 7)
    machine.fill(file)
    assert asked(machine) == []


def test_large_wants_are_cut_into_requests() -> None:
    machine, file = Prefetch(Policy(connections=3)), File(BIG)
    wait_for(machine, file, 0, BIG)
    assert spans(asked(machine)) == [(0, 1), (1, 2), (2, 3)]  # nothing is known of the line


@pytest.mark.parametrize(
    ("seconds", "mebibytes"), [(0.01, 8), (0.1, 5), (0.3, 1.5), (0.5, 1), (10, 1)], ids=lambda v: str(v)
)
def test_requests_fit_the_line(seconds: float, mebibytes: float) -> None:
    machine, file = Prefetch(Policy(connections=1)), File(BIG)
    wait_for(machine, file, 0, BIG)
    (first,) = asked(machine)
    machine.done(first, seconds)
    (second,) = asked(machine, seconds)
    assert second.stop - second.start == mebibytes * MiB


@pytest.mark.parametrize(
    ("rate", "mebibytes"), [(86e6, 8), (125e6, 8), (300e6, 17), (600e6, 32), (5e9, 32)], ids=lambda v: str(v)
)
@pytest.mark.parametrize("why", list(Kind))
def test_quick_line_has_large_requests_where_they_bind_no_memory(
    why: Kind, rate: float, mebibytes: int
) -> None:
    for quick, expected in ((QUICK, mebibytes), (0, 8)):
        machine, file = Prefetch(Policy(connections=2, processors=1, quick=quick)), File(BIG)
        machine.lanes[""].learn(rate)
        if why is Kind.DEMAND:
            wait_for(machine, file, 0, BIG)
        elif why is Kind.AHEAD:
            machine.read(file, 0, 256 * MiB, 0)
        else:
            machine.fill(file)
        first = asked(machine)[0]
        assert first.kind is why
        assert (first.stop - first.start) // MiB == expected


def test_little_that_is_read_ahead_is_asked_for_in_parts_on_a_quick_line_too() -> None:
    machine, file = Prefetch(Policy(quick=QUICK)), File(BIG)
    machine.lanes[""].learn(5e9)
    machine.read(file, 0, 4 * MiB, 0)  # a window of 16 MiB
    assert spans(asked(machine)) == [(4, 8), (8, 12)]


@pytest.mark.parametrize(
    ("processors", "rate", "expected"),
    [
        (2, 86e6, 8),  # 1 Gbit/s and 30 ms: the line is the limit, whatever the machine
        (8, 86e6, 8),
        (2, 250e6, 4),
        (2, 500e6, 2),
        (2, 5e9, 2),  # one for each of two readers
        (4, 500e6, 4),
        (64, 1e9, 8),
    ],
)
def test_as_many_connections_as_keep_the_processors_busy(processors: int, rate: float, expected: int) -> None:
    policy = Policy(processors=processors)
    lane = Lane()
    assert lane.enough(policy) == policy.connections  # nothing is known of the line
    lane.learn(rate)
    assert lane.enough(policy) == expected
    lane.learn(rate * FADING**2)  # one that is slower says little
    assert lane.enough(policy) <= max(expected, PER_PROCESSOR * processors // (rate * FADING) + 1)
    for _ in range(200):
        lane.learn(50e6)
    assert lane.enough(policy) == policy.connections
    assert Lane(best=rate).enough(Policy(connections=1, processors=processors)) == 1


@pytest.mark.parametrize(("readers", "expected"), [(1, 2), (2, 2), (5, 5), (12, 8)])
def test_many_readers_have_a_connection_each(readers: int, expected: int) -> None:
    machine = Prefetch(Policy(processors=2))
    machine.lanes[""].learn(PER_PROCESSOR)
    for _ in range(readers):
        machine.read(File(BIG), 0, 4 * MiB, 0)
    assert len(asked(machine)) == expected


@pytest.mark.parametrize(("reads", "expected"), [(False, 2), (True, 1)])
def test_filling_leaves_a_processor_to_who_reads(reads: bool, expected: int) -> None:
    machine, read_one, rest = Prefetch(Policy(processors=2)), File(64 * MiB), File(BIG)
    machine.lanes[""].learn(PER_PROCESSOR)
    if reads:
        machine.read(read_one, 0, 4 * MiB, 0)
        read_one.mark(0, 63 * MiB, PRESENT)
    machine.fill(rest)
    sent = asked(machine)
    assert [request.kind for request in sent].count(Kind.FILL) == expected
    # Who waits is not held up by that.
    wait_for(machine, File(BIG), 0, 1)
    assert [request.kind for request in asked(machine)] == [Kind.DEMAND]


def test_what_is_there_or_on_its_way_is_not_asked_for_again() -> None:
    machine, file = Prefetch(), File(BIG, present=range(4, 8))
    wait_for(machine, file, 0, 3 * MiB)
    wait_for(machine, file, 0, 3 * MiB)
    assert spans(asked(machine)) == [(0, 1), (2, 3)]
    assert asked(machine) == []


def test_no_more_requests_than_connections_to_each_host() -> None:
    machine = Prefetch(Policy(connections=2))
    for lane in ("a", "b"):
        for _ in range(4):
            wait_for(machine, File(BIG, lane), 0, 1)
    assert sorted(request.file.lane for request in asked(machine)) == ["a", "a", "b", "b"]


def test_who_wants_much_does_not_keep_others_waiting() -> None:
    machine, large, small = Prefetch(Policy(connections=2)), File(BIG), File(BIG)
    wait_for(machine, large, 0, BIG)
    first = asked(machine)
    wait_for(machine, small, 5 * MiB, 5 * MiB + 1)
    machine.done(first[0], 0.1)
    machine.done(first[1], 0.1)
    assert {request.file for request in asked(machine, 0.1)} == {large, small}


# ---- runs


def test_window_doubles_with_the_run_up_to_the_budget() -> None:
    machine, file = Prefetch(), File(BIG)
    ahead = []
    for start in range(0, 200 * MiB, 128 * KiB):
        read(machine, file, start, 128 * KiB)
        end = file.gap(start, BIG)
        ahead.append((end or BIG) - start - 128 * KiB)
    reached = [next(i for i, size in enumerate(ahead) if size >= want * MiB) for want in (1, 4, 16, 64, 112)]
    # Reads of 128 KiB until so much is there beyond them.
    assert reached == sorted(reached) and reached[0] <= 8 and reached[3] <= 8 * 40
    assert BUDGET - LARGEST <= max(ahead) <= BUDGET
    assert min(ahead[len(ahead) // 2 :]) >= BUDGET - 2 * LARGEST


def test_random_reads_are_never_followed_by_read_ahead() -> None:
    machine, file, numbers = Prefetch(), File(BIG), random.Random(1)
    for _ in range(100):
        sent = read(machine, file, numbers.randrange(8, 999) * MiB + 5000, 4096)
        assert sum(request.stop - request.start for request in sent) <= FIRST
    assert len(file.cursors) <= CURSORS


def test_random_reads_near_to_each_other_are_no_run() -> None:
    machine, file, numbers = Prefetch(), File(BIG), random.Random(2)
    for _ in range(200):
        read(machine, file, 500 * MiB + numbers.randrange(4 * MiB), 4096)
    assert max(cursor.window for cursor in file.cursors) < FIRST


@pytest.mark.parametrize(("readers", "mebibytes"), [(1, 8), (8, 8), (64, 1)])
def test_who_waits_in_a_run_is_not_given_it_in_small_steps(readers: int, mebibytes: int) -> None:
    """Many readers keep all connections busy with what they wait for: nothing is ever read ahead."""
    machine, files = Prefetch(), [File(BIG) for _ in range(readers)]
    machine.lanes[""].learn(86e6)
    for file in files:
        machine.read(file, 0, 40 * MiB, 0)
        file.mark(0, 40 * MiB, PRESENT)
        # As the kernel does: several requests at a time.
        for at in range(40, 48):
            machine.read(file, at * MiB, (at + 1) * MiB, 0)
    for at in range(40, 48):
        for file in files:
            wait_for(machine, file, at * MiB, (at + 1) * MiB)
    sent = asked(machine)
    assert [request.kind for request in sent[:readers]] == [Kind.DEMAND] * min(readers, 8)
    assert spans(sent[:1]) == [(40, 40 + mebibytes)]
    assert sent[0].urgent == 41 * MiB


def test_who_waits_elsewhere_is_given_a_mebibyte() -> None:
    machine, file = Prefetch(), File(BIG)
    machine.lanes[""].learn(86e6)
    machine.read(file, 0, 40 * MiB, 0)
    file.mark(0, 40 * MiB, PRESENT)
    for at in (20, 500):
        file.mark(at * MiB, (at + 1) * MiB, MISSING)
        machine.read(file, at * MiB, at * MiB + 4096, 0)
        wait_for(machine, file, at * MiB, at * MiB + 4096)
        request = machine.next(0)
        assert request is not None and request.kind is Kind.DEMAND
        assert spans([request]) == [(at, at + 1)]


def test_what_one_waits_for_is_not_asked_for_beyond_the_window() -> None:
    machine, file = Prefetch(Policy(budget=3 * MiB)), File(BIG)
    machine.lanes[""].learn(86e6)
    machine.read(file, 0, 40 * MiB, 0)
    file.mark(0, 39 * MiB, PRESENT)
    wait_for(machine, file, 39 * MiB, 40 * MiB)
    (request,) = asked(machine)[:1]
    assert request.stop <= 43 * MiB


def test_host_that_was_never_asked_does_not_wait_for_one_that_is_busy() -> None:
    machine = Prefetch(Policy(connections=1))
    for host in ("a", "b"):
        wait_for(machine, File(BIG, host), 0, 1)
        assert [request.file.lane for request in asked(machine)] == [host]
    machine.fill(File(BIG, "c"))
    assert [request.file.lane for request in asked(machine)] == ["c"]
    other = File(BIG, "d")
    machine.read(other, 0, 4 * MiB, 0)
    assert [request.file.lane for request in asked(machine)] == ["d"]


def running(machine: Prefetch, file: File, stop: int, start: int = 0, now: float = 0.0) -> None:
    for at in range(start, stop, 256 * KiB):
        read(machine, file, at, 256 * KiB, now)


@pytest.mark.parametrize("jump", [-3 * MiB, -100, 100, MiB, JUMP])
def test_small_jump_does_not_end_a_run(jump: int) -> None:
    machine, file = Prefetch(), File(BIG)
    running(machine, file, 20 * MiB)
    before = file.cursors[-1].window
    read(machine, file, 20 * MiB + jump, 128 * KiB)
    assert len(file.cursors) == 1
    assert file.cursors[-1].window >= before


def test_tail_read_does_not_end_a_run() -> None:
    machine, file = Prefetch(), File(BIG)
    running(machine, file, 20 * MiB)
    before = file.gap(0, BIG)
    assert before is not None
    sent = read(machine, file, BIG - 300 * KiB, 300 * KiB)
    assert sum(request.stop - request.start for request in sent) <= FIRST
    running(machine, file, 22 * MiB, 20 * MiB)
    after = file.gap(0, BIG)
    assert after is not None and after - 22 * MiB >= before - 20 * MiB - LARGEST


def test_requests_of_the_kernel_in_any_order_are_a_run() -> None:
    machine, file, numbers = Prefetch(), File(BIG), random.Random(3)
    for start in range(0, 32, 4):
        for at in numbers.sample(range(start, start + 4), 4):
            read(machine, file, at * MiB, MiB)
    assert file.cursors[-1].window >= 16 * MiB


def test_two_readers_of_one_file_share_the_budget() -> None:
    machine, file = Prefetch(), File(BIG)
    for at in range(0, 100 * MiB, MiB):
        read(machine, file, at, MiB)
        read(machine, file, 500 * MiB + at, MiB)
    for end in (100 * MiB, 600 * MiB):
        gap = file.gap(end, BIG)
        assert gap is not None and BUDGET // 2 - LARGEST <= gap - end <= BUDGET // 2


def test_one_who_needs_little_leaves_the_rest_of_the_budget() -> None:
    machine, large, small = Prefetch(), File(BIG), File(BIG)
    read(machine, small, 0, MiB)
    running(machine, large, 100 * MiB)
    gap = large.gap(100 * MiB, BIG)
    assert gap is not None and gap - 100 * MiB >= BUDGET - 3 * LARGEST


@pytest.mark.parametrize("how", ["idle", "left", "at the end"])
def test_who_reads_no_more_has_no_part_of_the_budget(how: str) -> None:
    machine, file, other = Prefetch(), File(BIG), File(200 * MiB)
    running(machine, other, 200 * MiB if how == "at the end" else 80 * MiB)
    if how == "left":
        machine.leave(other)
    now = 1.0 if how != "idle" else ACTIVE + 1
    running(machine, file, 100 * MiB, now=now)
    gap = file.gap(100 * MiB, BIG)
    assert gap is not None and gap - 100 * MiB > BUDGET * 3 // 4


def test_budget_of_nothing_turns_read_ahead_off() -> None:
    machine, file = Prefetch(Policy(budget=0)), File(BIG)
    for start in range(0, 20 * MiB, 128 * KiB):
        assert len(read(machine, file, start, 128 * KiB)) == (start % MiB == 0)


@pytest.mark.parametrize("connections", [1, 3, 5, 8])
def test_what_is_expected_is_read_ahead_up_to_its_end(connections: int) -> None:
    machine, file = Prefetch(Policy(connections=connections)), File(BIG)
    machine.expect(file, 0, 32 * MiB, 0.0)
    machine.expect(file, 0, 64 * MiB, 0.0)  # known already
    sent = []
    while found := asked(machine):
        sent += found
        for request in found:
            machine.done(request, 0.01)
    gap = file.gap(0, BIG)
    assert gap == 32 * MiB
    assert all(request.kind is Kind.AHEAD for request in sent)
    read(machine, file, 0, MiB)
    gap = file.gap(0, BIG)
    assert gap is not None and gap > 60 * MiB, "the reader's run goes on from there"


def test_end_of_a_file_can_be_expected() -> None:
    machine, file = Prefetch(), File(BIG + 5)
    machine.expect(file, BIG - CHUNK + 5, FIRST, 0.0)
    assert spans(asked(machine)) == [(BIG / MiB - 0.25, (BIG + 5) / MiB)]


def test_what_is_expected_for_nothing_is_given_up() -> None:
    machine, file = Prefetch(), File(BIG)
    machine.expect(file, 0, 32 * MiB, 0.0)
    assert machine.next(ACTIVE + 1.0) is None


def test_soonest_need_comes_first() -> None:
    machine, near, far = Prefetch(Policy(connections=1)), File(BIG), File(BIG)
    running(machine, far, 4 * MiB)
    running(machine, near, 4 * MiB)
    machine.forget(near, 5 * MiB, 6 * MiB)
    machine.forget(far, 6 * MiB, 7 * MiB)
    first = machine.next(0)
    assert first is not None and first.file is near


def test_demand_goes_before_read_ahead_and_that_before_filling() -> None:
    machine, file, other = Prefetch(Policy(connections=2)), File(BIG), File(BIG)
    machine.fill(File(BIG))
    running(machine, file, 8 * MiB)
    machine.forget(file, 9 * MiB, BIG)
    wait_for(machine, other, 5 * MiB, 5 * MiB + 1)
    assert [request.kind for request in asked(machine)] == [Kind.DEMAND, Kind.AHEAD]
    machine = Prefetch(Policy(connections=2))
    machine.fill(file)
    assert [request.kind for request in asked(machine)] == [Kind.FILL]  # and one connection is kept free


def test_filling_brings_all_files_in_their_order() -> None:
    machine = Prefetch()
    files = [File(3 * MiB, present=range(2, 6)), File(0), File(100), File(20 * MiB)]
    for file in files:
        machine.fill(file)
    sent: list[Request] = []
    while found := asked(machine):
        sent += found
        for request in found:
            machine.done(request, 0.0)
    assert [file.missing for file in files] == [0, 0, 0, 0]
    order = [files.index(request.file) for request in sent]
    assert order == sorted(order)
    assert sum(request.stop - request.start for request in sent) == 22 * MiB + 100


def test_leaving_ends_read_ahead_and_not_filling() -> None:
    machine, file = Prefetch(), File(BIG)
    machine.read(file, 0, MiB, 0)
    machine.fill(file)
    machine.leave(file)
    assert {request.kind for request in asked(machine)} == {Kind.FILL}


def test_removed_file_is_asked_for_no_more() -> None:
    machine, file = Prefetch(), File(BIG)
    wait_for(machine, file, 0, 1)
    machine.read(file, 0, MiB, 0)
    first = machine.next(0)
    assert first is not None
    machine.failed(first, 0, temporary=True)
    wait_for(machine, file, 50 * MiB, 51 * MiB)
    machine.fill(file)
    machine.remove(file)
    assert asked(machine, 100) == [] and machine.wake(0) is None


# ---- failures


def test_what_is_waited_for_is_tried_again_alone_with_growing_pauses() -> None:
    machine, file = Prefetch(Policy(retries=3, retry_delay=1.0)), File(BIG)
    wait_for(machine, file, 0, 1)
    now, pauses = 0.0, []
    (request,) = asked(machine, now)
    while not machine.failed(request, now, temporary=True):
        wake = machine.wake(now)
        assert wake is not None and asked(machine, wake - 0.01) == []
        pauses.append(wake - now)
        now = wake
        (request,) = asked(machine, now)
    assert pauses == [1, 2, 4]
    assert asked(machine, now) == []
    # Later reads are not spoilt by that: they begin anew.
    wait_for(machine, file, 0, 1)
    (request,) = asked(machine, now)
    assert request.attempt == 1
    machine.done(request, now)
    assert file.has(0, MiB)


@pytest.mark.parametrize(
    ("pause", "factor", "expected"), [(0, 1, 1), (0, 1.25, 1.25), (7, 1, 7), (10**6, 1, LONGEST_PAUSE)]
)
def test_pause_is_what_the_hub_asks_for_within_bounds(pause: float, factor: float, expected: float) -> None:
    machine, file = Prefetch(Policy(retry_delay=1.0)), File(BIG)
    wait_for(machine, file, 0, 1)
    (request,) = asked(machine)
    machine.failed(request, 10, temporary=True, pause=pause, factor=factor)
    assert machine.wake(10) == 10 + expected


def test_others_go_on_while_one_range_rests() -> None:
    machine, file = Prefetch(), File(BIG)
    wait_for(machine, file, 0, 1)
    (request,) = asked(machine)
    machine.failed(request, 0, temporary=True)
    wait_for(machine, file, 0, 1)  # a second one who waits for the same adds no request
    assert asked(machine) == []
    wait_for(machine, file, 5 * MiB, 5 * MiB + 1)
    assert spans(asked(machine)) == [(5, 6)]


def test_range_that_nobody_waits_for_any_more_is_not_tried_again() -> None:
    machine, file = Prefetch(), File(BIG)
    want = wait_for(machine, file, 0, 1)
    (request,) = asked(machine)
    assert not machine.failed(request, 0, temporary=True)
    machine.unwant(want)
    assert asked(machine, 100) == []
    wait_for(machine, file, 0, 1)
    (again,) = asked(machine, 100)
    assert again.attempt == 1


def test_lasting_failure_is_told_at_once_and_ends_what_nobody_waits_for() -> None:
    machine, file = Prefetch(), File(BIG)
    running(machine, file, 8 * MiB)
    machine.fill(file)
    wait_for(machine, file, 500 * MiB, 500 * MiB + 1)
    (request, *others) = asked(machine)
    assert machine.failed(request, 0, temporary=False)
    for other in others:
        machine.failed(other, 0, temporary=False)
    assert asked(machine, 1000) == []  # who waited was told: it is theirs to come again


def test_host_that_fails_is_tried_by_one_request_now_and_then() -> None:
    machine, file = Prefetch(Policy(retry_delay=1.0)), File(BIG)
    machine.fill(file)
    for request in asked(machine):
        machine.failed(request, 0, temporary=True)
    now, sent = 0.0, 0
    while now < 3600:
        found = asked(machine, now)
        assert len(found) <= 1
        for request in found:
            sent += 1
            machine.failed(request, now, temporary=True)
        wake = machine.wake(now)
        assert wake is not None
        now = wake
    assert 50 <= sent <= 75
    (request,) = asked(machine, now)
    machine.done(request, now + 1)
    assert len(asked(machine, now + 1)) == 7
    assert file.gap(0, 0) is None


def test_failed_read_ahead_is_not_repeated_at_once_but_demand_is() -> None:
    machine, file = Prefetch(Policy(retry_delay=1.0)), File(BIG)
    machine.read(file, 0, MiB, 0)
    ahead = asked(machine)
    assert {request.kind for request in ahead} == {Kind.AHEAD}
    for request in ahead:
        assert machine.failed(request, 0, temporary=True)
    assert asked(machine) == []
    wait_for(machine, file, 0, MiB)
    assert [request.kind for request in asked(machine)] == [Kind.DEMAND]


# ---- pieces of a request


def test_pieces_are_there_as_they_come_and_are_not_asked_for_again() -> None:
    machine, file = Prefetch(Policy(connections=1)), File(BIG)
    wait_for(machine, file, 0, 4 * MiB)
    machine.lanes[""].rate = 100e6
    (request,) = asked(machine)
    assert spans([request]) == [(0, 4)]
    for piece in range(1, 4):
        machine.arrived(request, piece * MiB)
        assert file.has(0, piece * MiB) and not file.has(0, piece * MiB + 1)
        assert file.gap(0, 4 * MiB) is None, "the rest is still on its way"
        assert (request.at, file.missing) == (piece * MiB, (BIG - piece * MiB) // CHUNK)
        assert asked(machine) == [], "it has its connection until it is done"
    machine.done(request, 1.0)
    assert file.has(0, 4 * MiB)


@pytest.mark.parametrize(
    ("arrived", "waits", "temporary", "expected"),
    [
        # What comes next, and with which attempt.
        (0, True, True, ((0, 4), 2)),
        (1, True, True, ((1, 4), 2)),
        (3, True, True, ((3, 4), 2)),
        (3, True, False, None),
        (3, False, True, None),
        (0, False, False, None),
    ],
)
def test_failure_keeps_what_arrived(
    arrived: int, waits: bool, temporary: bool, expected: tuple[tuple[float, float], int] | None
) -> None:
    machine, file = Prefetch(Policy(retry_delay=1.0)), File(BIG)
    machine.lanes[""].rate = 100e6
    want = wait_for(machine, file, 0, 4 * MiB)
    (request,) = asked(machine)
    if arrived:
        machine.arrived(request, arrived * MiB)
    if not waits:
        machine.unwant(want)
    assert machine.failed(request, 0, temporary=temporary) is (expected is None)
    assert file.has(0, arrived * MiB)
    again = asked(machine, 100)
    assert [(span, each.attempt) for span, each in zip(spans(again), again, strict=True)] == (
        [expected] if expected else []
    )
    if expected is None:
        assert file.gap(0, 4 * MiB) == arrived * MiB, "the rest is missing again"
        wait_for(machine, file, 0, 4 * MiB)
        assert spans(asked(machine, 100)) == [(arrived, 4)]


def test_attempts_are_counted_anew_after_progress() -> None:
    """A line that breaks after each piece brings a file of any size."""
    machine, file = Prefetch(Policy(retries=1, retry_delay=1.0)), File(8 * MiB)
    machine.lanes[""].rate = 100e6
    wait_for(machine, file, 0, 8 * MiB)
    now = 0.0
    for number in range(1, 8):
        (request,) = asked(machine, now)
        assert request.start == (number - 1) * MiB
        machine.arrived(request, number * MiB)
        assert not machine.failed(request, now, temporary=True)
        wake = machine.wake(now)
        assert wake == now + 1, "the pause begins anew as well"
        now = wake
    (request,) = asked(machine, now)
    assert (request.start, request.attempt) == (7 * MiB, 2)
    assert machine.failed(request, now, temporary=True), "no progress this time"
    assert file.has(0, 7 * MiB) and file.missing == MiB // CHUNK


@pytest.mark.parametrize(("where", "told"), [(0, False), (1.9, False), (2, True), (3.9, True)])
def test_only_those_who_wait_for_what_is_left_are_told_of_a_failure(where: float, told: bool) -> None:
    machine, file = Prefetch(), File(BIG)
    machine.lanes[""].rate = 100e6
    wait_for(machine, file, 0, 4 * MiB)
    (request,) = asked(machine)
    other = wait_for(machine, file, int(where * MiB), int(where * MiB) + 1)
    machine.arrived(request, 2 * MiB)
    assert other.touches(request) is told
    machine.failed(request, 0, temporary=False)
    assert (other in machine.wants) is not told


# ---- memory


@pytest.mark.parametrize(("stop", "sent"), [(2 * MiB, True), (MiB + CHUNK, True), (MiB, False)])
def test_request_is_shortened_to_the_room_there_is(stop: int, sent: bool) -> None:
    machine, file = Prefetch(Policy(connections=1)), File(BIG)
    wait_for(machine, file, MiB, 2 * MiB)
    (request,) = asked(machine)
    machine.shorten(request, stop)
    if sent:
        machine.done(request, 1.0)
        assert file.has(MiB, stop) and file.gap(MiB, 10 * MiB) == stop
    else:
        assert spans(asked(machine)) == [(1, 2)]  # neither the connection nor the range is lost


def test_forgotten_bytes_are_asked_for_again() -> None:
    machine, file = Prefetch(), File(BIG)
    read(machine, file, 10 * MiB, 4096)
    machine.forget(file, 10 * MiB, 10 * MiB + CHUNK)
    wait_for(machine, file, 10 * MiB, 10 * MiB + 1)
    assert spans(asked(machine)) == [(10, 10.25)]


# ---- simulation


@dataclass
class Reader:
    """Reads what `plan` says, one after the other; `rate` in bytes a second is what it does with them."""

    file: File
    plan: Iterator[tuple[int, int]]
    rate: float = 2e9
    waited: float = 0.0
    ended: float | None = None
    since: float = 0.0
    at: tuple[int, int] = (0, 0)


@dataclass
class World:
    """Hub, line and readers, on a clock of their own.

    A connection takes `latency` seconds until the first byte and then brings `line` bytes a second.
    """

    machine: Prefetch
    latency: float = 0.03
    line: float = 125e6
    now: float = 0.0
    requests: list[Request] = field(default_factory=list)
    busy: float = 0.0
    _events: list[tuple[float, int, object]] = field(default_factory=list)
    _count: Iterator[int] = field(default_factory=itertools.count)

    def run(self, *readers: Reader) -> None:
        for reader in readers:
            self._at(self.now, reader)
        waiting: list[tuple[Reader, object]] = []
        while self._events:
            self.now, _, what = heapq.heappop(self._events)
            if isinstance(what, Request):
                self.machine.done(what, self.now)
                ask = True
            else:
                assert isinstance(what, Reader)
                ask = self._step(what, waiting)
            for reader, want in list(waiting):
                if reader.file.has(*reader.at):
                    waiting.remove((reader, want))
                    self.machine.unwant(want)  # type: ignore[arg-type]
                    reader.waited += self.now - reader.since
                    self._at(self.now + (reader.at[1] - reader.at[0]) / reader.rate, reader)
            for request in asked(self.machine, self.now) if ask else []:
                self.requests.append(request)
                seconds = self.latency + (request.stop - request.start) / self.line
                self.busy += seconds
                self._at(self.now + seconds, request)
        assert not waiting

    def _step(self, reader: Reader, waiting: list[tuple[Reader, object]]) -> bool:
        """The next read of a reader. Returns whether the machine is to be asked."""
        at = next(reader.plan, None)
        if at is None:
            reader.ended = self.now
            return False
        reader.at, reader.since = at, self.now
        worth = self.machine.read(reader.file, *at, self.now)
        there = reader.file.has(*at)
        waiting.append((reader, wait_for(self.machine, reader.file, *at)))
        return worth or not there

    def _at(self, when: float, what: object) -> None:
        heapq.heappush(self._events, (when, next(self._count), what))

    @property
    def fetched(self) -> int:
        return sum(request.stop - request.start for request in self.requests)


def in_order(start: int, stop: int, size: int = 128 * KiB) -> Iterator[tuple[int, int]]:
    return ((at, min(at + size, stop)) for at in range(start, stop, size))


def tensorflow(size: int) -> Iterator[tuple[int, int]]:
    """PROTOCOLS §5, the part that is about `variables.data`."""
    yield from in_order(size - 300 * KiB, size)
    yield from in_order(0, size)


@pytest.mark.parametrize("fill", [False, True], ids=["UNCOMPRESSED", "AUTO"])
def test_simulated_tensorflow_keeps_all_connections_busy(fill: bool) -> None:
    world, file = World(Prefetch()), File(BIG)
    if fill:
        world.machine.fill(file)
    reader = Reader(file, tensorflow(BIG))
    world.run(reader)
    assert reader.ended is not None
    alone = BIG / 125e6
    assert reader.ended < alone / 4
    assert world.busy / reader.ended > 6.5  # connections, on average over the whole
    assert world.fetched == BIG
    assert len(world.requests) < 300


def test_simulated_slow_line_is_used_all_the_time_as_well() -> None:
    world, file = World(Prefetch(), line=1.25e6), File(100 * MiB)
    reader = Reader(file, tensorflow(file.size))
    world.run(reader)
    assert reader.ended is not None
    assert reader.ended < file.size / 1.25e6 / 5
    # On a slow line short requests: nobody who wants something else waits for long.
    assert max(request.stop - request.start for request in world.requests) <= FIRST


def test_simulated_random_reader_pays_one_request_a_read() -> None:
    world, file, numbers = World(Prefetch()), File(BIG), random.Random(4)
    starts = [numbers.randrange(BIG // (16 * MiB)) * 16 * MiB + 9 * MiB for _ in range(50)]
    reader = Reader(file, ((start, start + 4096) for start in starts))
    world.run(reader)
    assert len(world.requests) == len(set(starts))
    assert world.fetched == len(set(starts)) * FIRST
    assert reader.waited <= len(set(starts)) * (0.03 + FIRST / 125e6) + 1e-6


def test_simulated_interleaved_readers_both_run() -> None:
    world, file = World(Prefetch()), File(BIG)
    half = BIG // 2
    readers = Reader(file, in_order(0, half)), Reader(file, in_order(half, BIG))
    world.run(*readers)
    assert world.fetched == BIG
    ends = [reader.ended or 0 for reader in readers]
    assert max(ends) < BIG / 125e6 / 4
    assert min(ends) > max(ends) * 0.7  # neither at the other's cost


def test_simulated_eight_readers_of_the_same_fetch_it_once() -> None:
    world, file = World(Prefetch()), File(200 * MiB)
    readers = [Reader(file, tensorflow(file.size), rate=1e9 * (1 + i)) for i in range(8)]
    world.run(*readers)
    assert world.fetched == file.size


def test_simulated_tail_read_costs_one_request() -> None:
    world, file = World(Prefetch()), File(BIG)
    reader = Reader(file, iter([(BIG - 200 * KiB, BIG)]))
    world.run(reader)
    assert spans(world.requests) == [(999.75, 1000)]


def test_simulated_demand_is_quick_while_much_is_read_ahead() -> None:
    world, file, other = World(Prefetch()), File(BIG), File(BIG)
    world.machine.fill(file)
    numbers = random.Random(5)
    plan = ((at, at + 4096) for at in numbers.sample(range(9 * MiB, BIG - MiB, 16 * MiB), 30))
    random_reader = Reader(other, plan)
    world.run(Reader(file, in_order(0, BIG)), random_reader)
    # Its own request, and at most one that has begun before on the connection that comes free first.
    assert random_reader.waited / 30 < 2 * 0.03 + (FIRST + LARGEST) / 125e6


# ---- model


class Machine(RuleBasedStateMachine):
    """Whatever happens in whatever order, the rules hold that readers and hubs rely on."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = Policy(connections=3, budget=16 * MiB, largest=2 * MiB, retries=2)
        self.machine = Prefetch(self.policy)
        self.files = [File(40 * MiB + 77, "a"), File(MiB, "a"), File(30 * MiB, "b"), File(0, "b")]
        self.sent: list[Request] = []
        self.wants: list[object] = []
        self.now = 0.0

    files_st = st.integers(0, 3)

    @rule(which=files_st, start=st.integers(0, 40 * MiB), size=st.integers(0, 3 * MiB), wait=st.booleans())
    def read(self, which: int, start: int, size: int, wait: bool) -> None:
        file = self.files[which]
        start = min(start, file.size)
        stop = min(start + size, file.size)
        self.machine.read(file, start, stop, self.now)
        if wait:
            self.wants.append(wait_for(self.machine, file, start, stop))

    @rule(which=files_st, count=st.integers(1, 30))
    def read_in_order(self, which: int, count: int) -> None:
        file = self.files[which]
        for at in range(0, min(count * CHUNK, file.size), CHUNK):
            self.machine.read(file, at, at + CHUNK, self.now)

    @rule(which=files_st)
    def fill(self, which: int) -> None:
        self.machine.fill(self.files[which])

    @rule(which=files_st)
    def leave(self, which: int) -> None:
        self.machine.leave(self.files[which])

    @precondition(lambda self: self.wants)
    @rule(data=st.data())
    def unwant(self, data: st.DataObject) -> None:
        want = data.draw(st.sampled_from(self.wants))
        self.wants.remove(want)
        self.machine.unwant(want)  # type: ignore[arg-type]

    @rule()
    def send(self) -> None:
        request = self.machine.next(self.now)
        if request is None:
            return
        assert 0 <= request.start < request.stop <= request.file.size
        assert request.start % CHUNK == 0
        assert request.stop % CHUNK == 0 or request.stop == request.file.size
        assert request.stop - request.start <= self.policy.largest
        for other in self.sent:
            apart = other.stop <= request.start or request.stop <= other.at
            assert other.file is not request.file or apart
        lane = [other for other in self.sent if other.file.lane == request.file.lane]
        assert len(lane) < self.policy.connections
        if request.kind is not Kind.DEMAND:
            assert not any(
                want.file.lane == request.file.lane and want.file.gap(want.start, want.stop) is not None
                for want in self.machine.wants
            )
        self.sent.append(request)

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), how=st.sampled_from(["piece", "done", "temporary", "lasting", "shorten"]))
    def answer(self, data: st.DataObject, how: str) -> None:
        request = data.draw(st.sampled_from(self.sent))
        at, came = request.at, request.file.has(request.start, request.at)  # unless it was forgotten since
        if how == "piece":
            left = (request.stop - request.at - 1) // CHUNK
            self.machine.arrived(request, request.at + data.draw(st.integers(0, left)) * CHUNK)
            return
        if how == "shorten" and request.at > request.start:
            return  # room is made before the request is sent
        if how == "shorten":
            stop = request.start + data.draw(st.integers(0, (request.stop - request.start) // CHUNK)) * CHUNK
            self.machine.shorten(request, stop)
            if request.stop > request.start:
                return
        elif how == "done":
            self.machine.done(request, self.now)
            assert request.file.has(at, request.stop)
        else:
            waited_for = self.machine.wanted(request)
            given_up = self.machine.failed(request, self.now, temporary=how == "temporary")
            assert request.file.has(request.start, at) == came
            again = how == "temporary" and waited_for and request.attempt <= self.policy.retries
            assert given_up is not again
        self.sent.remove(request)

    @rule(which=files_st, start=st.integers(0, 40 * MiB), size=st.integers(0, 3 * MiB))
    def forget(self, which: int, start: int, size: int) -> None:
        file = self.files[which]
        for number in range(start // CHUNK, min(start + size, file.size) // CHUNK):
            if file.has(number * CHUNK, number * CHUNK + 1):
                self.machine.forget(file, number * CHUNK, number * CHUNK + CHUNK)

    @rule(seconds=st.floats(0, 50))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def what_is_on_its_way_is_neither_missing_nor_there(self) -> None:
        for request in self.sent:
            assert request.file.gap(request.at, request.stop) is None
            assert not request.file.has(request.at, request.at + 1)

    @invariant()
    def counts_are_right(self) -> None:
        for file in self.files:
            numbers = range(-(-file.size // CHUNK))
            assert file.missing == sum(not file.has(n * CHUNK, n * CHUNK + 1) for n in numbers)
            assert len(file.cursors) <= CURSORS
        for name, lane in self.machine.lanes.items():
            assert lane.busy == sum(request.file.lane == name for request in self.sent)

    def teardown(self) -> None:
        """Once the hub answers, everybody gets what they wait for, and the machine comes to rest."""
        for _ in range(10_000):
            for request in self.sent:
                self.machine.done(request, self.now)
            self.sent = asked(self.machine, self.now)
            if not self.sent:
                wake = self.machine.wake(self.now)
                if wake is None:
                    break
                self.now = wake
        assert not self.sent
        for want in self.machine.wants:
            assert want.file.has(want.start, want.stop)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_states_are_those_that_has_and_gap_tell() -> None:
    file = File(3 * CHUNK)
    file.mark(CHUNK, 2 * CHUNK, PRESENT)
    assert file.has(CHUNK, 2 * CHUNK) and not file.has(0, 2 * CHUNK) and file.missing == 2
    assert file.gap(0, 3 * CHUNK) == 0 and file.gap_end(0, 3 * CHUNK) == CHUNK
    file.mark(CHUNK, 2 * CHUNK, MISSING)
    assert file.gap_end(0, 10 * CHUNK) == 3 * CHUNK and file.missing == 3
