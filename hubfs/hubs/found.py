"""The files of a listing while it comes: within limits, and with names that can stand next to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hubfs.errors import TooLargeError
from hubfs.hubs.base import RemoteFile
from hubfs.names import Names, as_listed

if TYPE_CHECKING:
    from hubfs.config import Settings


class Found:
    """What a listing has brought so far.

    Attributes:
        files: by their path relative to the version's root.
    """

    def __init__(self, what: str, settings: Settings) -> None:
        """
        Args:
            what: is listed; begins each message.
            settings: have the limits.
        """
        self.files: dict[str, RemoteFile] = {}
        self._what = what
        self._names = Names(settings.max_model_files, what)
        self._most = settings.max_model_size
        self._bytes = 0

    def add(self, name: object, file: RemoteFile) -> None:
        """
        Raises:
            HostileError: the name is none that a file can have, or its place is taken.
            TooLargeError: these are more files, or bytes, than the settings allow.
        """
        path = as_listed(name, self._what)
        self._names.add(path, is_dir=False)
        self.files[path] = file
        self._bytes += file.size
        if self._bytes > self._most:
            raise TooLargeError(
                f"{self._what} holds more than {self._most} bytes", hint="a larger --max-model-size allows it"
            )
