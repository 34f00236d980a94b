"""The bench's own hub: a server that is slower than the client would hide the client's speed.

Seconds for a GB over one connection, with nothing done with the bytes.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from scripts.bench.bench import Bench, warm
from scripts.bench.models import Archive, transfer_model
from scripts.bench.results import Result, single
from scripts.bench.server import GIGABIT, LOOPBACK, serving


def server(bench: Bench) -> Iterator[Result]:
    model = transfer_model(bench.work, "large", bench.sizes.large)
    archives = {model.handle: model.archive}
    warm(model.archive.path)
    for link, limit in ((LOOPBACK, 1.0), (GIGABIT, None)):
        with serving(archives, link) as url:
            runs = [
                1e9 * _receive(url, model.handle, model.archive) / model.archive.size
                for _ in range(bench.sizes.runs)
            ]
        yield single(f"receive from the bench's hub, {link.name}", "s/GB", runs, limit)


def _receive(url: str, handle: str, archive: Archive) -> float:
    address = urlsplit(url)
    buffer = bytearray(1 << 20)
    began, received = time.perf_counter(), 0
    with socket.create_connection((address.hostname or "", address.port or 0)) as connection:
        connection.sendall(f"GET /{handle} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n".encode())
        while count := connection.recv_into(buffer):
            received += count
    if received <= archive.size:
        raise RuntimeError(f"the hub sent {received} of {archive.size} bytes")
    return time.perf_counter() - began
