"""Where the bytes of a remote file go."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hubfs.errors import HubfsError


class Sink:
    """Where a file's bytes go. Ranges are whole chunks, but for the end of the file and for `write`.

    `room`, `kept`, `dropped` and `lost` are called while the fetcher decides: they must not wait, nor call
    it.
    """

    def room(self, start: int, stop: int, *, urgent: bool) -> int:
        """Make room for a range that is going to be asked for.

        Args:
            urgent: somebody waits for it.

        Returns:
            up to where there is some.
        """
        return stop

    def write(self, start: int, data: bytes | memoryview) -> None:
        """Bytes have come: those of a range come in their order, from its start on, in pieces of any size.

        Not called any more once `Remote.close` has returned.

        Raises:
            OSError, HubfsError: they cannot be kept.
        """
        raise NotImplementedError

    def kept(self, start: int, stop: int) -> None:
        """From now on readers are told that the range is there."""

    def dropped(self, start: int, stop: int) -> None:
        """A range could not be had: its room is not needed. Each further attempt asks for room anew."""

    def lost(self, start: int, stop: int) -> None:
        """A range of which readers were told that it is there turned out to be wrong. `failed` follows."""

    def moved(self) -> None:
        """Something came or failed. May be called once more after `Remote.close`, as `failed` may."""

    def failed(self, error: HubfsError) -> None:
        """A range was given up; whoever waits for it is told as well. Called before `moved`."""
