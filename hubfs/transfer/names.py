"""The names in an archive: what they mean, and that no two of them mean one place."""

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
    elif len(raw) > MAX_PATH or len(parts) > MAX_DEPTH or any(len(part) > MAX_COMPONENT for part in parts):
        offence = "too long a name"
    if offence:
        raise HostileError(f"the archive has a member with {offence}: {show(raw)}")
    return b"/".join(parts).decode("utf-8", "surrogateescape")


class Names:
    """All names so far, to tell a place that is taken twice."""

    def __init__(self, max_files: int) -> None:
        """
        Args:
            max_files: the most files and directories, with those that are only implied by others' names.
        """
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
            raise HostileError(f"the archive has a member {twice}: {show(name)}")
        # Canonical caseless matching (Unicode, D145): what case-insensitive file systems take for one name.
        folded = unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())
        other = self._folded.setdefault(folded, name)
        if other != name:
            raise HostileError(
                f"the archive has two names that some file systems take for one: {show(other)}, {show(name)}"
            )
        self._is_dir[name] = is_dir
        self._characters += len(name)
        if len(self._is_dir) > self._max_files:
            raise TooLargeError(f"the archive holds more than {self._max_files} files and directories")
        if self._characters > MAX_NAMES:
            raise TooLargeError(f"the archive's names have more than {MAX_NAMES} characters together")


def show(name: str | bytes) -> str:
    """A name for a message: printable, at most 200 characters."""
    text = name[:200].decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name[:200]
    shown = repr(text)
    return shown if len(shown) <= 200 else shown[:199] + "…"
