"""Who hubfs is to Kaggle: the credentials that kagglehub would use, in its order (PROTOCOLS §3)."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hubfs.errors import ConfigError


@dataclass(frozen=True)
class Credentials:
    """
    Attributes:
        where: what they were taken from, for people. Never the secret itself.
        header: the value of `Authorization`.
    """

    where: str
    header: str = field(repr=False)


def find_credentials(environ: Mapping[str, str]) -> Credentials | None:
    """The first that there are; `None` without any.

    In this order: `KAGGLE_API_TOKEN` (a token, or the name of a file with one), `~/.kaggle/access_token`,
    `KAGGLE_USERNAME` with `KAGGLE_KEY`, and `kaggle.json` in `$KAGGLE_CONFIG_DIR` or `~/.kaggle`.

    Raises:
        ConfigError: a file of these cannot be used.
    """
    home = Path(environ.get("HOME") or "~").expanduser() / ".kaggle"
    given = environ.get("KAGGLE_API_TOKEN", "")
    if given:
        # Not Path.is_file, which fails on names as long as tokens are.
        token = _content(Path(given)) if os.path.isfile(given) else given
        if token.strip():
            return _bearer(token.strip(), "KAGGLE_API_TOKEN")
    for name in ("access_token", "access_token.txt"):
        token = _content(home / name).strip()
        if token:
            return _bearer(token, str(home / name))
    user, key = environ.get("KAGGLE_USERNAME"), environ.get("KAGGLE_KEY")
    if user and key:
        return _basic(user, key, "KAGGLE_USERNAME and KAGGLE_KEY")
    return _from_json(Path(environ.get("KAGGLE_CONFIG_DIR") or home) / "kaggle.json")


def _from_json(path: Path) -> Credentials | None:
    text = _content(path)
    if not text:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None  # what it says is a secret, so the error's own words are not for a log
    user, key = (found.get("username"), found.get("key")) if isinstance(found, dict) else (None, None)
    if isinstance(user, str) and isinstance(key, str):
        return _basic(user, key, str(path))
    raise ConfigError(
        f"{path}: these are not Kaggle's credentials",
        hint="get a new file at https://www.kaggle.com/settings",
    )


def _content(path: Path) -> str:
    """A file's text, at most 64 KiB of it; empty if there is no such file."""
    try:
        with path.open("rb") as file:
            return file.read(64 << 10).decode("utf-8", "replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise ConfigError(f"{path}: Kaggle's credentials cannot be read: {error.strerror}") from error


def _bearer(token: str, where: str) -> Credentials:
    # The HTTP library would show the whole header in its error.
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ConfigError(f"{where}: this is not a token", hint="make one at https://www.kaggle.com/settings")
    return Credentials(where, f"Bearer {token}")


def _basic(user: str, key: str, where: str) -> Credentials:
    return Credentials(where, "Basic " + base64.b64encode(f"{user}:{key}".encode()).decode("ascii"))
