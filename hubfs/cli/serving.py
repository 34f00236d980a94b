"""`hubfs serve`: a local hub over a directory of models."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer

from hubfs.errors import ConfigError

if TYPE_CHECKING:
    from hubfs.serve import LocalHub, RequestRecord

_SHOWN_HANDLES = 20


def serve(
    directory: str = typer.Argument(
        help="holds PUBLISHER/MODEL…/VERSION/, each version a SavedModel", metavar="DIR"
    ),
    host: str = typer.Option("127.0.0.1", "--host", help="the address to listen on; 0.0.0.0 for all"),
    port: str = typer.Option("8500", "--port", help="the port to listen on; 0 for any that is free"),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="do not print the requests"),
) -> None:
    """Be a hub: serve a directory of SavedModels.

    It speaks the protocol of tfhub.dev, for sites without a network, demos and tests. It ends at Ctrl-C or
    SIGTERM.
    """
    from hubfs.serve import LocalHub

    if not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"--port: {port!r} is not a port", hint="give a number from 0 to 65535")
    with (
        _until_signal() as ended,
        LocalHub(
            Path(directory).absolute(),
            host=host,
            port=int(port),
            on_request=None if quiet else _print_request,
        ) as hub,
    ):
        _introduce(hub)
        ended.wait()


def _introduce(hub: LocalHub) -> None:
    versions = hub.catalog.models()
    print(f"Serving {hub.catalog.root} at {hub.url}: {len(versions)} model version(s)")
    for version in versions[:_SHOWN_HANDLES]:
        print(f"  {hub.url}/{version.handle}")
    if len(versions) > _SHOWN_HANDLES:
        print(f"  … and {len(versions) - _SHOWN_HANDLES} more")
    # Whoever started this in a pipe waits for these lines.
    print(f"To mount it: hubfs mount --hub {hub.url} /mnt/tfhub", flush=True)


def _print_request(record: RequestRecord) -> None:
    part = f" {record.range}" if record.range else ""
    print(
        f"{record.method} {record.path}{part} -> {record.status}, {record.bytes_sent} bytes",
        file=sys.stderr,
    )


@contextmanager
def _until_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set while this lasts."""
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
