"""All settings of hubfs: one frozen dataclass is the source of flags, environment, config file and docs.

A value is taken from the first of: command line flag, environment variable, `config.toml`, default.
An empty environment variable counts as not set, as it does for tensorflow_hub.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, get_type_hints

from hubfs.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class LoadFormat(str, enum.Enum):
    """tensorflow_hub's model load formats."""

    AUTO = "auto"
    COMPRESSED = "compressed"
    UNCOMPRESSED = "uncompressed"


#: The least memory to read with: less would be used up by what is on its way.
MIN_MEMORY = 16 << 20

#: A bucket's name, at Google and at S3, as a regular expression.
BUCKET_NAME = "[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]"

_BUCKET = rf"(?:gs|s3)://{BUCKET_NAME}"
_HOST = r"(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?::(?P<port>[0-9]{1,5}))?"


def _is_url(text: str) -> bool:
    return re.match(r"[a-z0-9]+://", text) is not None


def _is_port(text: str | None) -> bool:
    return text is None or 0 < int(text) < 65536


def _setting(default: Any, help: str, *, env: str = "", unit: str = "", metavar: str = "") -> Any:
    metadata = {"help": help, "env": env, "unit": unit, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """What a mount or a command needs to know. Build it with `Settings.load`."""

    hub: str = _setting("https://tfhub.dev", "the hub whose handles are the top of the mount", metavar="URL")
    allow_hosts: tuple[str, ...] = _setting(
        (),
        "further hosts and buckets that may be asked for models: `host`, `host:port`, `gs://bucket`, `s3://bucket`",
        metavar="HOST",
    )
    cache_dir: str = _setting(
        "",
        "the backing cache, shared with tensorflow_hub; default `<tempdir>/tfhub_modules`",
        env="TFHUB_CACHE_DIR",
        metavar="DIR",
    )
    shared_cache: str = _setting(
        "",
        "a bucket behind the cache, common to many machines: `gs://bucket/prefix` or `s3://…`; "
        "a bucket in `TFHUB_CACHE_DIR` is taken for it",
        metavar="URL",
    )
    load_format: LoadFormat = _setting(
        LoadFormat.AUTO,
        "how a model is brought in: `compressed`, its archive; `uncompressed`, its files as they are read, "
        "without keeping them; `auto`, its files, kept, or its archive where the hub offers no more",
        env="TFHUB_MODEL_LOAD_FORMAT",
    )
    read_ahead: bool = _setting(
        True, "bring in the rest of a model in the background once one of its data files is opened"
    )
    memory_limit: int = _setting(
        256 * 10**6,
        "memory for files that are read without being kept, over all of them",
        unit="bytes",
        metavar="SIZE",
    )
    offline: bool = _setting(False, "never use the network: serve what is cached")
    verified_only: bool = _setting(
        False, "let readers wait until a model's archive has arrived and been checked as a whole"
    )
    read_timeout: float = _setting(120.0, "how long a reader waits while nothing arrives", unit="seconds")
    connections: int = _setting(
        8, "connections to one host at a time, over all transfers; each has at least one"
    )
    connect_timeout: float = _setting(10.0, "how long a connection may take to open", unit="seconds")
    stall_timeout: float = _setting(
        30.0, "a connection slower than 1 KiB/s for so long is given up and resumed", unit="seconds"
    )
    retries: int = _setting(5, "attempts in a row that may fail without any progress")
    retry_delay: float = _setting(
        0.5, "pause before the first repetition; it doubles with each further one", unit="seconds"
    )
    lock_timeout: float = _setting(
        600.0, "when another machine's download counts as dead if it does not grow", unit="seconds"
    )
    max_model_size: int = _setting(
        200 * 10**9, "the largest model that is accepted, unpacked", unit="bytes", metavar="SIZE"
    )
    max_model_files: int = _setting(100_000, "the largest number of files and directories of a model")
    trust_cache_dir: bool = _setting(
        False, "use a cache directory that belongs to another user or that everybody may write"
    )
    verify_certificates: bool = _setting(
        True,
        "check the hub's TLS certificate; the variable is tensorflow_hub's: `true` turns the check off",
        env="TFHUB_DISABLE_CERT_VALIDATION",
    )
    download_progress: bool = _setting(
        False, "log the progress of downloads; any value turns it on", env="TFHUB_DOWNLOAD_PROGRESS"
    )
    passthrough: bool = _setting(
        True, "let the kernel read complete files by itself where it can: Linux 6.9, libfuse 3.17.2, root"
    )
    allow_other: bool = _setting(False, "let other users of this machine read the mount")
    log_level: str = _setting("info", "debug, info, warning or error", metavar="LEVEL")
    log_file: str = _setting(
        "",
        "where the mount writes its log; default `$XDG_STATE_HOME/hubfs/<mount point>.log`",
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        match = re.fullmatch(rf"https?://({_HOST})(/[^?#\s]*)?", self.hub)
        if not match or not _is_port(match["port"]):
            raise ConfigError(f"hub: {self.hub!r} is not a URL such as https://tfhub.dev")
        object.__setattr__(self, "hub", self.hub.rstrip("/"))
        for host in self.allow_hosts:
            match = re.fullmatch(_HOST, host)
            if not re.fullmatch(_BUCKET, host) and (not match or not _is_port(match["port"])):
                raise ConfigError(
                    f"allow_hosts: {host!r} is not a host such as example.org or localhost:8080, "
                    "nor a bucket such as gs://models"
                )
        if _is_url(self.cache_dir):
            raise ConfigError(
                f"cache_dir: {self.cache_dir} is a bucket, and this is the cache on the machine's own disk",
                hint="give it with --shared-cache, or in TFHUB_CACHE_DIR",
            )
        shared = self.shared_cache.rstrip("/")
        if shared and not re.fullmatch(rf"{_BUCKET}(/[^/?#]+)*", shared):
            raise ConfigError(
                f"shared_cache: {self.shared_cache!r} is not a place in a bucket such as gs://bucket/prefix"
            )
        object.__setattr__(self, "shared_cache", shared)
        cache_dir = self.cache_dir or str(Path(tempfile.gettempdir()) / "tfhub_modules")
        object.__setattr__(self, "cache_dir", str(Path(cache_dir).expanduser().absolute()))
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ConfigError(f"log_level: {self.log_level!r} is not one of debug, info, warning, error")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not value > 0:
                raise ConfigError(f"{field.name}: {value} is not a positive number")
        if self.memory_limit < MIN_MEMORY:
            raise ConfigError(
                f"memory_limit: {self.memory_limit} bytes are too little to read with",
                hint=f"give {MIN_MEMORY >> 20} MiB or more",
            )
        if self.verified_only and self.load_format is LoadFormat.UNCOMPRESSED:
            raise ConfigError(
                "verified_only: files that are not kept cannot be checked as a whole before they are read",
                hint="use --load-format auto or compressed with it",
            )

    @classmethod
    def load(
        cls,
        flags: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
        config_file: Path | None = None,
    ) -> Settings:
        """Settings from flags, environment and config file.

        Args:
            flags: values given explicitly, by field name; `None` means not given.
            environ: environment variables; `os.environ` if not given.
            config_file: TOML file; `~/.config/hubfs/config.toml` if not given. It may be missing.

        Raises:
            ConfigError: a value, a key or the file itself cannot be understood.
        """
        environ = os.environ if environ is None else environ
        config_file = default_config_file(environ) if config_file is None else config_file
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        from_file = _read_config(config_file)
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            name, kind = field.name, hints[field.name]
            text = environ.get(env_name(field), "")
            if flags and flags.get(name) is not None and flags[name] != ():
                origins[name] = "command line"
                values[name] = _convert(field, kind, flags[name], origins[name])
            elif text:
                origins[name] = f"environment variable {env_name(field)}"
                values[name] = _from_environment(field, kind, text, origins[name])
            elif name in from_file:
                origins[name] = str(config_file)
                values[name] = _convert(field, kind, from_file[name], origins[name])
        _move_bucket(values, origins, flags or {}, environ, from_file)
        try:
            return cls(**values)
        except ConfigError as error:
            origin = origins.get(error.message.partition(":")[0])
            raise ConfigError(error.message + (f" ({origin})" if origin else ""), hint=error.hint) from error

    def to_flags(self) -> dict[str, Any]:
        """Plain JSON values that `load(flags=…)` turns into the same settings again."""
        return {
            field.name: value.value if isinstance(value, LoadFormat) else value
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }

    @property
    def cache_is_temporary(self) -> bool:
        """Whether the cache is below a directory that is emptied at a reboot."""
        temporary = {Path(tempfile.gettempdir()).resolve(), Path("/tmp"), Path("/var/tmp"), Path("/dev/shm")}
        return any(parent in temporary for parent in Path(self.cache_dir).resolve().parents)


def _move_bucket(
    values: dict[str, Any],
    origins: dict[str, str],
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    from_file: Mapping[str, Any],
) -> None:
    """Take a bucket that was given as cache directory for the shared one; the local one is named elsewhere.

    tensorflow_hub has one variable for both kinds.
    """
    variable = environ.get("TFHUB_CACHE_DIR", "")
    given = (
        (flags.get("cache_dir"), "command line"),
        (variable, "environment variable TFHUB_CACHE_DIR"),
        (from_file.get("cache_dir"), "the config file"),
    )
    texts = [(str(text), origin) for text, origin in given if text]
    bucket = next(((text, origin) for text, origin in texts if _is_url(text)), None)
    if bucket is None:
        return
    if "shared_cache" not in values:
        values["shared_cache"], origins["shared_cache"] = bucket
    local = next(((text, origin) for text, origin in texts if not _is_url(text)), None)
    values.pop("cache_dir", None)
    if local is not None:
        values["cache_dir"], origins["cache_dir"] = local


def default_config_file(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME") or "~").expanduser() / ".config")
    return Path(base) / "hubfs" / "config.toml"


def env_name(field: dataclasses.Field[Any]) -> str:
    """The environment variable of a setting: tensorflow_hub's own where it has one."""
    return str(field.metadata["env"]) or f"HUBFS_{field.name.upper()}"


def parse_size(text: str) -> int:
    """Bytes of `500`, `20MB`, `1.5GiB` and the like.

    Raises:
        ValueError: it is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?)[bB]?\s*", text)
    if not match:
        raise ValueError(f"{text!r} is not a size such as 500MB or 20GiB")
    power = " kmgt".index(match[2].lower() or " ")
    return int(Decimal(match[1]) * (1024 if match[3] else 1000) ** power)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            found: dict[str, Any] = tomllib.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    known = {field.name for field in dataclasses.fields(Settings)}
    for key in found:
        if key not in known:
            raise ConfigError(
                f"{path}: there is no setting {key!r}", hint=f"there are: {', '.join(sorted(known))}"
            )
    return found


def _from_environment(field: dataclasses.Field[Any], kind: Any, text: str, origin: str) -> Any:
    # Two of tensorflow_hub's variables have meanings of their own.
    if field.name == "verify_certificates":
        return text != "true"
    if field.name == "download_progress":
        return True
    if kind == tuple[str, ...]:
        return tuple(part for part in re.split(r"[,\s]+", text) if part)
    return _convert(field, kind, text, origin)


def _convert(field: dataclasses.Field[Any], kind: Any, value: Any, origin: str) -> Any:
    try:
        return _as_kind(kind, value, field.metadata["unit"])
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{field.name}: {value!r} ({origin}) cannot be used: {error}") from error


def _as_kind(kind: Any, value: Any, unit: str) -> Any:
    if unit == "bytes":
        return parse_size(str(value))
    if kind is bool:
        if isinstance(value, bool):
            return value
        lowered = str(value).lower()
        if lowered in ("1", "true", "yes", "on"):
            return True
        if lowered in ("0", "false", "no", "off"):
            return False
        raise ValueError("give true or false")
    if kind is LoadFormat:
        try:
            return LoadFormat(str(getattr(value, "value", value)).lower())
        except ValueError:
            raise ValueError("give auto, compressed or uncompressed") from None
    if isinstance(value, bool):
        raise TypeError("give a number" if kind in (int, float) else "give a text")
    if kind is int:
        return int(value)
    if kind is float:
        return float(value)
    if kind == tuple[str, ...]:
        if isinstance(value, str):
            raise TypeError("give a list")
        return tuple(str(item) for item in value)
    return str(value)
