"""The `hubfs` command line: its commands, and how a failure is told to the person who typed it.

Whatever is slow to import is imported inside the command that needs it, so that `hubfs --help` and
`hubfs mount` start at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, cast

import typer

from hubfs.cli import doctor, models, mount, options, serving
from hubfs.cli.output import print_error
from hubfs.errors import ConfigError, HubfsError
from hubfs.version import __version__

DONE, FAILED, WRONG_USE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

# Of its usage errors typer shows only BadParameter. Depending on its version their base is click's
# or that of its own copy of click, so take it from there.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])

_EPILOG = """\b
An example session:
  $ hubfs mount /mnt/tfhub
  $ ls /mnt/tfhub/google/nnlm-en-dim128/2       # downloads it on first access
  $ python -c 'import tensorflow as tf
    tf.saved_model.load("/mnt/tfhub/google/nnlm-en-dim128/2")'
  $ hubfs status                                # what is on its way
  $ hubfs ls google/                            # what is cached
  $ hubfs unmount /mnt/tfhub

\b
Without a network:
  $ hubfs serve ./models                        # a hub of your own
  $ hubfs mount --hub http://127.0.0.1:8500 /mnt/tfhub

Settings come from flags, else from the environment variables that each command's help names, else
from ~/.config/hubfs/config.toml. Exit codes: 0 done, 1 failed, 2 wrong use.
"""

app = typer.Typer(
    name="hubfs",
    help="Mount a model hub as a file system: a model's handle is a path, and reading it brings it in.",
    epilog=_EPILOG,
    # Plain help: it is quick, and reads the same in a terminal, a pipe and a bug report.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": options.HELP_OPTIONS, "max_content_width": 100},
)


@app.callback()
def _global_options(
    debug: bool = typer.Option(False, "--debug", help="show the traceback of a failure, and debug messages"),
    version: bool = typer.Option(False, "--version", help="print the version and exit"),
) -> None:
    # For the help only: main() sees to both before typer does.
    pass


app.command("mount")(mount.mount)
app.command("unmount")(mount.unmount)
app.command("status")(mount.status)
app.command("ls")(models.ls)
app.command("pull")(models.pull)
app.command("resolve")(models.resolve)
app.command("serve")(serving.serve)
app.command("doctor")(doctor.doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return the exit code of the process.

    Args:
        arguments: what was typed after `hubfs`; that of this process if not given.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    flags = given[: given.index("--")] if "--" in given else given
    debug = "--debug" in flags
    if debug:
        given.remove("--debug")
    _set_up_log(debug)
    try:
        if given[:1] == ["--version"]:
            print(f"hubfs {__version__}")
            code = DONE
        else:
            # Without a command the help says more than an error would, but nothing was done.
            code = _run(given) if given else _run(["--help"]) or WRONG_USE
        print(end="", flush=True)
        return code
    except Exception as error:  # noqa: BLE001 - the last resort: it becomes a line, not a traceback
        if debug:
            traceback.print_exc()
        _finish_output()
        return _report(error)
    except KeyboardInterrupt:
        return _stopped()


def _run(arguments: list[str]) -> int:
    command: Any = typer.main.get_command(app)
    options.keep_as_typed(command)
    try:
        result = command.main(args=arguments, prog_name="hubfs", standalone_mode=False)
    except typer.Abort:
        return _stopped()
    # A command returns nothing; an int is the code of the typer.Exit that ended it.
    code = result if isinstance(result, int) else DONE
    return _stopped(code) if code in (INTERRUPTED, TERMINATED) else code


def _report(error: Exception) -> int:
    if isinstance(error, ConfigError):
        print_error(error.message, error.hint)
        return WRONG_USE
    if isinstance(error, HubfsError):
        print_error(error.message, error.hint)
        return FAILED
    if isinstance(error, _UsageError):
        return _report_wrong_use(error)
    if isinstance(error, BrokenPipeError):
        # The reader, such as `head`, has what it wanted.
        return FAILED
    if isinstance(error, OSError):
        # Not a bug but the machine, such as a full disk behind stdout.
        print_error(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        return FAILED
    print_error(f"internal error: {type(error).__name__}: {error} (run with --debug for the traceback)")
    return FAILED


def _finish_output() -> None:
    """What cannot be written is given up: Python would try again at exit, and say so in its own way."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_wrong_use(error: typer.BadParameter) -> int:
    message = error.format_message().rstrip(".")
    command = error.ctx.command_path if error.ctx else "hubfs"
    print_error(message[:1].lower() + message[1:], f"{command} --help")
    return WRONG_USE


def _stopped(code: int = INTERRUPTED) -> int:
    print_error("stopped")
    return code


def _set_up_log(debug: bool) -> None:
    import logging

    if debug:
        logging.basicConfig(level=logging.DEBUG, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    elif not (log := logging.getLogger("hubfs")).handlers:
        # Else Python prints the warnings of those who set up no log, and a failure would be told twice.
        log.addHandler(logging.NullHandler())
