"""`hubfs mount`, `hubfs unmount` and `hubfs status`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import typer

from hubfs import mounts
from hubfs.cli.options import ALL, with_settings
from hubfs.cli.output import ago, duration, error_as_json, print_json, size
from hubfs.config import Settings
from hubfs.errors import HubfsError


@with_settings(*ALL)
def mount(
    settings: Settings,
    mountpoint: str = typer.Argument(help="an empty directory; created if missing", metavar="MOUNTPOINT"),
    foreground: bool = typer.Option(
        False, "--foreground", "-f", help="serve until unmounted or stopped by a signal; log to stderr"
    ),
) -> None:
    """Mount a hub: below MOUNTPOINT a handle is a path.

    Returns when the mount answers. Nothing is downloaded before something in a model is read.
    """
    from hubfs import daemon

    path = Path(mountpoint).absolute()
    if foreground:
        _explain_temporary_cache(settings)
        daemon.run(settings, path)
        return
    daemon.start(settings, path)
    print(f"{settings.hub} is mounted on {path} (to end it: hubfs unmount {path})")
    _explain_temporary_cache(settings)


def unmount(
    mountpoint: str = typer.Argument(help="where hubfs is mounted", metavar="MOUNTPOINT"),
    lazy: bool = typer.Option(
        False, "--lazy", "-z", help="take it away although it is in use; it ends when its last user does"
    ),
) -> None:
    """End a mount, and wait until its daemon is gone."""
    path = Path(mountpoint).absolute()
    # Typed inside the mount, this very process would keep it busy.
    os.chdir("/")
    mounts.unmount(path, lazy=lazy)


def status(
    mountpoint: str | None = typer.Argument(None, help="only this mount", metavar="MOUNTPOINT"),
    as_json: bool = typer.Option(False, "--json", help="print a JSON list, one object a mount"),
) -> None:
    """Show the mounts of this machine and what they do.

    For each: hub, cache directory and size, models, running transfers, recent failures.
    """
    if mountpoint:
        # Its failure is the command's.
        found: list[dict[str, Any]] = [mounts.status(Path(mountpoint))]
    else:
        found = [_status_or_error(path) for path in mounts.find()]
    if as_json:
        print_json(found)
    elif not found:
        print("There are no mounts (to make one: hubfs mount MOUNTPOINT)")
    else:
        print("\n\n".join(_describe(one) for one in found))


def _status_or_error(path: Path) -> dict[str, Any]:
    try:
        return mounts.status(path)
    except HubfsError as error:
        return {"mountpoint": str(path), "error": error_as_json(error)}


def _describe(found: dict[str, Any]) -> str:
    if error := found.get("error"):
        lines = [("problem", error["message"]), ("next", error["hint"])]
    else:
        lines = [
            ("hub", f"{found['hub']}{' (offline)' if found['offline'] else ''}, {found['load_format']}"),
            ("cache", _describe_cache(found["cache"])),
            ("shared", _describe_shared(found["shared_cache"])),
            ("daemon", f"pid {found['pid']}, hubfs {found['version']}, started {ago(found['started'])}"),
            ("reading", _describe_reading(found["read_mode"], found["read_mode_reason"])),
            ("open files", str(found["open_files"])),
            *(("transfer", _describe_transfer(transfer)) for transfer in found["transfers"]),
            *(("failed", _describe_failure(failure)) for failure in found["failures"]),
        ]
        if found["log_file"]:
            lines.append(("log", found["log_file"]))
    return "\n".join([str(found["mountpoint"]), *(f"  {name:<11} {text}" for name, text in lines if text)])


def _describe_cache(cache: dict[str, Any]) -> str:
    free = "" if cache["free"] is None else f", {size(cache['free'])} free"
    plural = "" if cache["models"] == 1 else "s"
    return f"{cache['dir']}: {cache['models']} model{plural}, {size(cache['size'])}{free}"


def _describe_shared(shared: dict[str, Any] | None) -> str:
    if shared is None:
        return ""
    uploads = shared["uploads"]
    return str(shared["url"]) + (
        f", {uploads} model{'' if uploads == 1 else 's'} on the way there" if uploads else ""
    )


def _describe_reading(mode: str, reason: str) -> str:
    return "passthrough: by the kernel itself" if not reason else f"{mode}; no passthrough: {reason}"


def _describe_transfer(transfer: dict[str, Any]) -> str:
    received, total, rate = transfer["received"], transfer["total"], transfer["rate"]
    text = f"{transfer['handle']}: {transfer['state']}, {size(received)}"
    if total:
        text += f" of {size(total)} ({100 * received // total} %)"
    if rate:
        text += f", {size(rate)}/s"
        if total:
            text += f", {duration((total - received) / rate)} left"
    if waiting := transfer["waiting"]:
        text += f", {waiting} reader{'s wait' if waiting > 1 else ' waits'}"
    return text


def _describe_failure(failure: dict[str, Any]) -> str:
    left = failure["until"] - time.time()
    again = f" (asked again in {duration(left)} at the earliest)" if left > 1 else ""
    error = failure["error"].removeprefix(f"{failure['handle']}: ")  # nearly all begin with it
    return f"{failure['handle']}: {error}{again}"


def _explain_temporary_cache(settings: Settings) -> None:
    """Say how to keep the cache across reboots, once for each user."""
    marker = _state_directory() / "temporary-cache-explained"
    if not settings.cache_is_temporary or marker.exists():
        return
    print(f"The cache, {settings.cache_dir}, is in a temporary directory. To keep it across reboots:")
    print(
        '  export TFHUB_CACHE_DIR=~/.cache/tfhub_modules, or cache_dir = "…" in ~/.config/hubfs/config.toml'
    )
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError:
        pass  # a home directory that cannot be written: it will be said again, which harms nobody


def _state_directory() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(base) / "hubfs"
