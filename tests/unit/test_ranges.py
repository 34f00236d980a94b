"""Large archives come over several connections, in order, each range retried alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hubfs.config import Settings
from hubfs.errors import DamagedError, StoppedError, UnavailableError
from hubfs.hubs.archive_url import probe
from hubfs.hubs.base import Archive
from hubfs.net import Net
from hubfs.transfer.download import Download
from hubfs.transfer.ranges import CONNECTIONS, PART, SEVERAL_FROM, ChangedOriginError
from tests.hub import Fault, FaultHub

PATH = "google/m/1"
BODY = random.Random(2).randbytes(SEVERAL_FROM + PART // 2)
PARTS = [f"bytes={start}-{min(start + PART, len(BODY)) - 1}" for start in range(0, len(BODY), PART)]


@pytest.fixture
def net(hub: FaultHub) -> Iterator[Net]:
    flags = {"retry_delay": 0.01, "retries": 2, "connect_timeout": 5.0, "stall_timeout": 5.0}
    opened = Net(Settings.load(flags, {}, Path("/dev/null")))
    yield opened
    opened.shut_down()
    opened.close()


def located(hub: FaultHub, net: Net) -> Archive:
    return probe(net, f"{hub.url}/{PATH}", f"{hub.url}/{PATH}?tf-hub-format=compressed")


def download(hub: FaultHub, net: Net, cancel: threading.Event | None = None) -> Download:
    origin = located(hub, net)
    hub.clear_log()
    return Download(net, origin, net._settings, cancel or threading.Event())


def asked(hub: FaultHub) -> list[str | None]:
    return [request.range for request in hub.requests(PATH)]


def test_parts_come_in_order_and_each_once(hub: FaultHub, net: Net) -> None:
    hub.add(PATH, BODY)
    assert b"".join(download(hub, net)) == BODY
    assert sorted(map(str, asked(hub))) == sorted(PARTS)
    assert {request.headers.get("if-range") for request in hub.requests(PATH)} == {located(hub, net).etag}


def test_several_connections_are_used_at_a_time(hub: FaultHub, net: Net) -> None:
    hub.add(PATH, BODY)
    go_on = threading.Event()
    hub.fault(PATH, *[Fault.stall(1, go_on)] * CONNECTIONS)
    chunks = iter(download(hub, net))
    thread = threading.Thread(
        target=lambda: hub.wait_for(lambda hub: len(asked(hub)) >= CONNECTIONS) or go_on.set()
    )
    thread.start()
    try:
        assert b"".join(chunks) == BODY
    finally:
        go_on.set()
        thread.join()


@pytest.mark.parametrize("size", [0, 1, SEVERAL_FROM - 1])
def test_smaller_ones_come_over_one_connection(hub: FaultHub, net: Net, size: int) -> None:
    hub.add(PATH, BODY[:size] or b"x")
    assert b"".join(download(hub, net)) == (BODY[:size] or b"x")
    assert asked(hub) == [None]


@pytest.mark.parametrize("how", ["no ranges", "weak", "no etag"])
def test_without_ranges_or_a_strong_etag_there_is_one_connection(hub: FaultHub, net: Net, how: str) -> None:
    options = {"no ranges": {"accept_ranges": False}, "weak": {"etag": 'W/"1"'}, "no etag": {"etag": None}}
    hub.add(PATH, BODY, **options[how])
    assert b"".join(download(hub, net)) == BODY
    assert asked(hub) == [None]


@pytest.mark.parametrize("fault", [Fault.cut(PART // 3), Fault.reset(PART // 3), Fault.status(503)])
def test_part_that_breaks_is_resumed_alone(hub: FaultHub, net: Net, fault: Fault) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, fault)
    assert b"".join(download(hub, net)) == BODY
    assert len(asked(hub)) == len(PARTS) + 1


def test_hub_that_stops_giving_ranges_is_read_on_over_one_connection(hub: FaultHub, net: Net) -> None:
    hub.add(PATH, BODY)
    source = download(hub, net)
    hub.fault(PATH, Fault.ignore_range(times=None))
    assert b"".join(source) == BODY


def test_object_that_changes_on_the_way_is_never_mixed(hub: FaultHub, net: Net) -> None:
    hub.add(PATH, BODY)
    source, got = download(hub, net), b""
    hub.fault(PATH, Fault.cut(PART // 2), Fault.change(BODY[::-1]))
    with pytest.raises(ChangedOriginError):
        for chunk in source:
            got += chunk
    assert BODY.startswith(got)


def test_wrong_checksum_is_found(hub: FaultHub, net: Net) -> None:
    hub.add(PATH, BODY)
    source = download(hub, net)
    hub.fault(PATH, Fault.flip(PART + 5, times=None))
    with pytest.raises(DamagedError):
        b"".join(source)


def test_hub_that_fails_for_good_is_given_up(hub: FaultHub, net: Net) -> None:
    hub.add(PATH, BODY)
    source = download(hub, net)
    hub.fault(PATH, Fault.status(500, times=None))
    with pytest.raises(UnavailableError):
        b"".join(source)
    assert len(asked(hub)) <= (CONNECTIONS + 1) * 3


def test_abort_ends_all_connections(hub: FaultHub, net: Net) -> None:
    hub.add(PATH, BODY)
    never, cancel = threading.Event(), threading.Event()
    source = download(hub, net, cancel)
    hub.fault(PATH, Fault.stall(1000, never, times=None))
    ended: list[BaseException] = []

    def read() -> None:
        try:
            b"".join(source)
        except StoppedError as error:
            ended.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        hub.wait_for(lambda hub: len(asked(hub)) >= CONNECTIONS)
        cancel.set()
        source.abort()
        thread.join(10)
        assert not thread.is_alive()
        assert len(ended) == 1
    finally:
        never.set()
        thread.join(20)
