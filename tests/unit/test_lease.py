"""The rules of leases: tables of what is seen and when, and what follows."""

from __future__ import annotations

import pytest

from hubfs.cache.layout import Owner
from hubfs.cache.lease import Action, Policy, Seen, Term, Watch, content_of, new_token, token_of, uid_of
from scripts.fleet import BEGIN, END, PAGE, World, plot, simulate, table

UID = "0123456789abcdef" * 2
OTHER = "f" * 32
FOREIGN = f"host.example.org.77.{UID}"
POLICY = Policy()


def ours(renewals: int, uid: str = UID) -> Seen:
    return Seen(content_of("host.example.org", 77, new_token(uid), renewals))


def theirs(objects: int = 0, size: int = 0, content: str = FOREIGN) -> Seen:
    return Seen(content, (objects, size))


WAIT, CREATE, TAKE_OVER = Action.WAIT, Action.CREATE, Action.TAKE_OVER


@pytest.mark.parametrize(
    "looks",
    [
        [(0, None, CREATE)],
        [(0, ours(0), WAIT), (59.9, ours(0), WAIT), (60, ours(0), TAKE_OVER)],
        [(0, ours(0), WAIT), (59, ours(1), WAIT), (118.9, ours(1), WAIT), (119, ours(1), TAKE_OVER)],
        # Another owner begins anew.
        [(0, ours(5), WAIT), (50, ours(5, OTHER), WAIT), (109, ours(5, OTHER), WAIT)],
        [(0, ours(0), WAIT), (5, None, CREATE), (6, ours(0), WAIT), (65, ours(0), WAIT)],
        # Only what this machine saw counts: it looked once, long ago, and the lock is as it was.
        [(1000, ours(0), WAIT), (5000, ours(0), TAKE_OVER)],
        [(0, theirs(), WAIT), (60, theirs(), WAIT), (599, theirs(), WAIT), (600, theirs(), TAKE_OVER)],
        # Its upload grows.
        [(0, theirs(1, 10), WAIT), (599, theirs(1, 11), WAIT), (1198, theirs(1, 11), WAIT)],
        [(0, theirs(1, 10), WAIT), (599, theirs(2, 10), WAIT), (1199, theirs(2, 10), TAKE_OVER)],
        # What nobody understands is not renewed by hubfs.
        [
            (0, theirs(content=""), WAIT),
            (599, theirs(content=""), WAIT),
            (600, theirs(content=""), TAKE_OVER),
        ],
    ],
)
def test_what_follows_from_looks(looks: list[tuple[float, Seen | None, Action]]) -> None:
    watch = Watch(POLICY, lambda: 0.5)
    assert [watch.look(now, seen) for now, seen, _ in looks] == [action for *_, action in looks]


def test_number_moves_with_what_is_seen_and_only_then() -> None:
    watch = Watch(POLICY, lambda: 0.5)
    numbers = []
    for seen in (ours(0), ours(0), ours(1), ours(1), theirs(0, 0), theirs(1, 5), theirs(1, 5), None, None):
        watch.look(0, seen)
        numbers.append(watch.moved)
    assert numbers == [1, 1, 2, 2, 3, 4, 4, 5, 5]


@pytest.mark.parametrize(("jitter", "factor"), [(0.0, 0.5), (1.0, 1.0)])
def test_pauses_grow_to_a_limit(jitter: float, factor: float) -> None:
    watch = Watch(POLICY, lambda: jitter)
    pauses = [watch.pause() for _ in range(12)]
    assert pauses[0] == 0.5 * factor
    assert pauses == sorted(pauses)
    assert pauses[-1] == pauses[-2] == 15 * factor


def test_owner_renews_and_knows_when_to_stop() -> None:
    term = Term(POLICY, 100)
    assert term.due == 110
    term.renewed(110)
    assert (term.due, term.is_over(154.9), term.is_over(155)) == (120, False, True)
    term.failed(125)
    assert (term.due, term.is_over(154.9), term.is_over(155)) == (127, False, True)
    term.renewed(127)
    assert not term.is_over(155)


def test_owner_stops_before_anybody_takes_over() -> None:
    """A renewal is seen after it was sent: whoever takes over does it after the owner has stopped."""
    assert POLICY.safe + POLICY.retry + 5 < POLICY.stale
    for sent in (0.0, 7.5):
        for seen_after in (0.0, 3.0, 20.0):
            watch, term = Watch(POLICY, lambda: 0), Term(POLICY, sent)
            now = sent + seen_after
            while watch.look(now, ours(0)) is WAIT:
                now += 0.5
            assert term.is_over(now)


def test_owner_is_told_from_its_lock() -> None:
    content = ours(12).content
    assert content == f"host.example.org.77.hubfs{UID}n12"
    assert token_of(content) == token_of(content + "\n") == uid_of(content) == f"hubfs{UID}"
    assert (token_of(FOREIGN), uid_of(FOREIGN)) == (None, UID)
    # As hubfs and tensorflow_hub read it.
    assert Owner.of(content) == Owner("host.example.org", 77, f"hubfs{UID}n12")
    assert content.split(".")[-1] != ours(13).content.split(".")[-1]


@pytest.mark.parametrize("content", ["", "x", "a.b.c", "host.1.", "host.1.a/b", f"host.1.hubfs{UID}", "\0"])
def test_lock_of_nobody_known(content: str) -> None:
    assert token_of(content) is None
    assert uid_of(content) in (None, f"hubfs{UID}")


class TestFleet:
    """The simulation follows the policy; its figures are those of docs/fleet.md."""

    @pytest.mark.parametrize("machines", [50, 10_000])
    def test_hub_is_asked_once(self, machines: int) -> None:
        found = simulate(machines, World(), 1, tier=True)
        assert (found.hub.asked, found.hub.read) == (1, World().size)
        assert found.bucket.read == (machines - 1) * World().size
        assert len(found.ready) == machines

    def test_each_dead_owner_costs_one_more(self) -> None:
        found = simulate(50, World(deaths=3), 1, tier=True)
        assert found.hub.asked == 4
        assert found.bucket.read == (50 - 4) * World().size

    def test_without_the_bucket_everybody_asks(self) -> None:
        found = simulate(50, World(), 1, tier=False)
        assert (found.hub.asked, found.bucket.requests) == (50, 0)

    def test_same_seed_same_figures(self) -> None:
        first, again, other = (simulate(50, World(deaths=1), seed, tier=True) for seed in (1, 1, 2))
        assert first == again
        assert first != other

    def test_bandwidth_is_shared(self) -> None:
        """All at once: each gets its share, so the last one has it when all bytes have passed."""
        world = World(arrival=0, hub_delay=0, size=1000, hub=500, hub_each=100, nic=1000)
        for machines, seconds in ((1, 10), (5, 10), (10, 20)):
            found = simulate(machines, world, 1, tier=False)
            assert found.ready == pytest.approx([seconds] * machines)

    def test_page_has_a_row_for_each_fleet(self) -> None:
        page = PAGE.read_text(encoding="utf8")
        figures = page.partition(BEGIN)[2].partition(END)[0]
        small = [simulate(50, World(), 1, tier=False), simulate(50, World(), 1, tier=True)]
        assert all(row in figures for row in table(small).splitlines())
        assert "<svg" in plot(small)
