"""The settings as command line options, made from the fields of `config.Settings`.

Names, help, environment variables and defaults have no other source than those fields. Typer only
collects what was typed, as text; `Settings.load` converts it, so that a bad value reads the same
wherever it came from.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

import typer

from hubfs.config import LoadFormat, Settings, env_name

#: The settings that say which handles there are and where they are cached.
CACHE = ("hub", "allow_hosts", "cache_dir", "trust_cache_dir")

#: Every setting there is.
ALL = tuple(field.name for field in dataclasses.fields(Settings))

_ONLY_FOR_MOUNTS = (
    "verified_only",
    "download_progress",
    "passthrough",
    "allow_other",
    "log_level",
    "log_file",
)

#: The settings of a command that brings models in.
TRANSFER = tuple(name for name in ALL if name not in _ONLY_FOR_MOUNTS)


#: What asks for help, of the whole and of each command.
HELP_OPTIONS = ["-h", "--help"]

_KINDS = get_type_hints(Settings)


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of the settings `names`, and the `Settings` made from them.

    The command takes them in its parameter `settings`; its other parameters stay as they are.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            flags = {name: given.pop(name) for name in names}
            command(settings=load_settings(flags), **given)

        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [parameter for parameter in own if parameter.name != "settings"]
        parameters += [_parameter(field) for field in dataclasses.fields(Settings) if field.name in names]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        # Typer reads a command's options from these two.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def load_settings(flags: Mapping[str, Any]) -> Settings:
    """The settings for a command that takes `flags`.

    Raises:
        ConfigError: a value cannot be used, or asks for something that hubfs cannot do yet.
    """
    return Settings.load(
        {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    )


def keep_as_typed(group: Any) -> None:
    """Let the commands of a typer group get what was typed, as it is.

    They take only text and switches, yet recent versions of typer also put text through pydantic, and
    its import takes as long as all else that `hubfs mount` does before there is a daemon. An older or
    newer typer that works otherwise is left alone.
    """
    for command in (group, *group.commands.values()):
        # The parameters as the command will see them: with its help option, which it makes on demand.
        for parameter in command.get_params(typer.Context(command, help_option_names=HELP_OPTIONS)):
            if hasattr(parameter, "_runtime_param"):
                parameter._runtime_param = _AsTyped()


class _AsTyped:
    """Stands where typer has a converter."""

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        several = param.multiple or param.nargs == -1
        return () if several and value is None else value


def option_name(field: dataclasses.Field[Any]) -> str:
    """The flag of a setting. One that is a list is given once for each item, so it is singular."""
    name = field.name.removesuffix("s") if _KINDS[field.name] == tuple[str, ...] else field.name
    return "--" + name.replace("_", "-")


def _parameter(field: dataclasses.Field[Any]) -> inspect.Parameter:
    kind, name = _KINDS[field.name], option_name(field)
    annotation: Any = str | None
    if kind is bool:
        # The second form overrules a config file that turns it on.
        annotation, name = bool | None, f"{name}/--no-{name.removeprefix('--')}"
    elif kind == tuple[str, ...]:
        annotation = list[str] | None
    option = typer.Option(
        None, name, help=_help(field, kind), metavar=_metavar(field, kind), show_default=False
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation
    )


def _help(field: dataclasses.Field[Any], kind: Any) -> str:
    text = str(field.metadata["help"])
    notes = []
    if kind == tuple[str, ...]:
        text += "; may be repeated"
    elif kind is bool:
        notes.append(f"default: {'yes' if field.default else 'no'}")
    elif field.default != "":
        notes.append(f"default: {_default_text(field)}")
    notes.append(f"env: {env_name(field)}")
    return f"{text} [{', '.join(notes)}]"


def _default_text(field: dataclasses.Field[Any]) -> str:
    default, unit = field.default, field.metadata["unit"]
    if isinstance(default, LoadFormat):
        return default.value
    if isinstance(default, (int, float)):
        return (
            f"{default:g} {unit}".rstrip() if isinstance(default, float) else f"{default:,} {unit}".rstrip()
        )
    return str(default)


def _metavar(field: dataclasses.Field[Any], kind: Any) -> str | None:
    if kind is LoadFormat:
        return "|".join(item.value for item in LoadFormat)
    if kind is bool:
        return None
    named = str(field.metadata["metavar"] or field.metadata["unit"]).upper()
    return named or {int: "N", float: "N"}.get(kind, "TEXT")
