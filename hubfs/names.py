"""The names in an archive or a listing: what they mean, and that no two of them mean one place."""

from __future__ import annotations

import unicodedata

from hubfs.errors import DamagedError, HostileError, TooLargeError

#: What Linux takes: NAME_MAX, and PATH_MAX without its NUL.
MAX_COMPONENT = 255
MAX_PATH = 4095
#: Deep trees make recursive clean-up (`shutil.rmtree` before Python 3.13) overflow; models are shallow.
MAX_DEPTH = 128
#: The most characters of all names together, since every one is remembered to find duplicates.
MAX_NAMES = 16 << 20


def clean(raw: bytes) -> str:
    """The relative path that a member's name means, without `.` components; empty for the root.

    Raises:
        HostileError: it leads elsewhere, or is longer or deeper than any honest one.
        DamagedError: it is empty.
    """
    parts = [part for part in raw.split(b"/") if part not in (b"", b".")]
    offence = ""
    if not raw:
        raise DamagedError("the archive has a member without a name")
    if b"\0" in raw:
        offence = "a NUL in its name"
    elif raw.startswith(b"/"):
        offence = "an absolute name"
    elif b".." in parts:
        offence = "'..' in its name"
    elif _is_too_long(raw, parts):
        offence = "too long a name"
    if offence:
        raise HostileError(f"the archive has a member with {offence}: {show(raw)}")
    return b"/".join(parts).decode("utf-8", "surrogateescape")


def as_listed(name: object, what: str) -> str:
    """A name as a listing has it: the path of a file, with nothing in it that would have to be cleaned.

    Args:
        what: has the name; begins the message.

    Raises:
        HostileError: no file below a directory can have it.
    """
    try:
        raw = name.encode() if isinstance(name, str) else b""
    except UnicodeEncodeError:
        raw = b""
    parts = raw.split(b"/")
    if b"\0" in raw or any(part in (b"", b".", b"..") for part in parts) or _is_too_long(raw, parts):
        raise HostileError(f"{what} has a name that no file can have: {show(str(name))}")
    return str(name)


def _is_too_long(raw: bytes, parts: list[bytes]) -> bool:
    return len(raw) > MAX_PATH or len(parts) > MAX_DEPTH or any(len(part) > MAX_COMPONENT for part in parts)


class Names:
    """All names so far, to tell a place that is taken twice."""

    def __init__(self, max_files: int, what: str = "the archive") -> None:
        """
        Args:
            max_files: the most files and directories, with those that are only implied by others' names.
            what: has the names; begins each message.
        """
        self._what = what
        self._max_files = max_files
        self._characters = 0
        self._is_dir: dict[str, bool] = {}
        self._folded: dict[str, str] = {}

    def add(self, name: str, *, is_dir: bool) -> None:
        """
        Raises:
            HostileError: its place, or one above it, is taken.
            TooLargeError: there are too many names, or they are too long together.
        """
        parent = name.rpartition("/")[0]
        if parent and not self._is_dir.get(parent, False):
            end = name.find("/")
            while end >= 0:
                self._claim(name[:end], is_dir=True)
                end = name.find("/", end + 1)
        if name:
            self._claim(name, is_dir=is_dir)

    def _claim(self, name: str, *, is_dir: bool) -> None:
        known = self._is_dir.get(name)
        if known is not None:
            if known and is_dir:
                return  # GNU tar repeats directories when it appends.
            twice = "both a file and a directory" if known or is_dir else "twice"
            raise HostileError(f"{self._what} has a member {twice}: {show(name)}")
        # Canonical caseless matching (Unicode, D145): what case-insensitive file systems take for one name.
        folded = unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())
        other = self._folded.setdefault(folded, name)
        if other != name:
            raise HostileError(
                f"{self._what} has two names that some file systems take for one: {show(other)}, {show(name)}"
            )
        self._is_dir[name] = is_dir
        self._characters += len(name)
        if len(self._is_dir) > self._max_files:
            raise TooLargeError(
                f"{self._what} holds more than {self._max_files} files and directories",
                hint="a larger --max-model-files allows it",
            )
        if self._characters > MAX_NAMES:
            raise TooLargeError(f"{self._what} has names of more than {MAX_NAMES} characters together")


def show(name: str | bytes) -> str:
    """A name for a message: printable, at most 200 characters."""
    text = name[:200].decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name[:200]
    shown = repr(text)
    return shown if len(shown) <= 200 else shown[:199] + "…"
