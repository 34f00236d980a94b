"""`hubfs ls`, `hubfs pull` and `hubfs resolve`: the cached models, without a mount."""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import typer

from hubfs.cli.options import CACHE, TRANSFER, with_settings
from hubfs.cli.output import error_as_json, print_error, print_json, print_table, size, size_cell, time_cell
from hubfs.config import Settings

if TYPE_CHECKING:
    from hubfs.api import Pulled, TransferStatus

#: What `TransferStatus.state` is at the end of a transfer.
_ENDED = ("complete", "cached", "failed")


@with_settings(*CACHE)
def ls(
    settings: Settings,
    prefix: str = typer.Argument(
        "", help="only handles that begin with this: google/ or a whole URL", metavar="PREFIX"
    ),
    as_json: bool = typer.Option(False, "--json", help="print a JSON list, one object a model"),
) -> None:
    """List the cached models.

    For each: handle, version, size, state, last use. Needs no mount.
    """
    from hubfs import api

    found = api.models(settings, prefix)
    if as_json:
        print_json([dataclasses.asdict(model) for model in found])
    elif found:
        rows = [
            (
                # tensorflow_hub's cache may lack the file that tells the handle of a key.
                model.handle or f"({model.key})",
                model.version or "-",
                size_cell(model.size),
                model.state,
                time_cell(model.last_used),
            )
            for model in found
        ]
        print_table(("handle", "version", "size", "state", "last use"), rows, right=("version", "size"))
    else:
        matching = f" that begin with {prefix}" if prefix else ""
        print(f"hubfs: no models{matching} in {settings.cache_dir}", file=sys.stderr)


@with_settings(*TRANSFER)
def pull(
    settings: Settings,
    handles: list[str] = typer.Argument(
        help="models, as google/nnlm-en-dim128/2 or a whole URL", metavar="HANDLE"
    ),
    as_json: bool = typer.Option(False, "--json", help="print a JSON list, one object a handle"),
) -> None:
    """Bring models into the cache, without a mount.

    Ctrl-C stops all of them and leaves nothing half-done.
    """
    from hubfs import api

    cancel = threading.Event()
    with _stop_on_signal(cancel) as received, _progress() as show:
        pulled = api.pull(handles, settings, on_progress=show, cancel=cancel)
    if as_json:
        print_json([_pulled_as_json(one) for one in pulled])
    else:
        for one in pulled:
            if one.error is None:
                how = "was cached already" if one.cached else "is cached"
                print(f"{one.handle} {how}: {one.path} ({size(one.size)})")
    if received:
        raise typer.Exit(128 + received[0])
    for one in pulled:
        if one.error is not None:
            print_error(one.error.message, one.error.hint)
    if any(one.error is not None for one in pulled):
        raise typer.Exit(1)


@with_settings(*TRANSFER)
def resolve(
    settings: Settings,
    handle: str = typer.Argument(help="a model, as google/nnlm-en-dim128/2 or a whole URL", metavar="HANDLE"),
    as_json: bool = typer.Option(False, "--json", help="print a JSON object with handle and path"),
) -> None:
    """Print the local directory of a model.

    It is the one that tensorflow_hub's resolve names. What is not cached is brought in first.
    """
    from hubfs import api

    path = api.resolve(handle, settings)
    if as_json:
        print_json({"handle": handle, "path": path})
    else:
        print(path)


def _pulled_as_json(one: Pulled) -> dict[str, object]:
    return {
        "handle": one.handle,
        "path": one.path,
        "size": one.size,
        "cached": one.cached,
        "error": error_as_json(one.error),
    }


@contextmanager
def _stop_on_signal(cancel: threading.Event) -> Iterator[list[int]]:
    """While it lasts, the first Ctrl-C or SIGTERM sets `cancel`; a second one interrupts at once.

    Yields:
        the numbers of the signals that came.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        cancel.set()
        if len(received) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers: its owner decides when to stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress() -> Iterator[Callable[[TransferStatus], None]]:
    """Show transfers on stderr: as bars at a terminal, else one line at each change of state."""
    if not sys.stderr.isatty():
        yield _progress_lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.fields[handle]}", markup=False),
        TextColumn("{task.fields[state]}", style="dim"),
        BarColumn(bar_width=24),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[rate]}", justify="right"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    lock = threading.Lock()  # guards `tasks`: the transfers report from threads of their own
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def show(status: TransferStatus) -> None:
            with lock:
                if status.handle not in tasks:
                    tasks[status.handle] = progress.add_task(
                        "", handle=status.handle, state="", rate="", total=None
                    )
            progress.update(
                tasks[status.handle],
                completed=status.received,
                total=status.total,
                state=status.state,
                rate=f"{size(status.rate)}/s" if status.rate else "",
            )

        yield show


def _progress_lines() -> Callable[[TransferStatus], None]:
    said: dict[str, str] = {}
    lock = threading.Lock()  # guards `said`: the transfers report from threads of their own

    def show(status: TransferStatus) -> None:
        with lock:
            if said.get(status.handle) == status.state:
                return
            said[status.handle] = status.state
        total = f" ({size(status.total)})" if status.total and status.state not in _ENDED else ""
        print(f"{status.handle}: {status.state}{total}", file=sys.stderr)

    return show
