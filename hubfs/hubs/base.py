"""What a hub is to the rest of hubfs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Archive:
    """An origin: one tar or tar.gz with all files of a version.

    Attributes:
        handle: whose bytes these are.
        url: where to ask for them. Redirects are followed afresh for each transfer: what they lead to may
            be signed for a few days only.
        size: bytes of the archive, `None` where the hub does not say.
        etag: its strong ETag, if the hub gives ranges of it.
    """

    handle: str
    url: str
    size: int | None = None
    etag: str | None = None


Origin = Archive


class Hub(Protocol):
    """A protocol by which models are found."""

    def supports(self, handle: str) -> bool:
        """Whether this protocol is the one for the handle. No request is sent."""

    def locate(self, handle: str) -> Origin:
        """Where the version's bytes are.

        Raises:
            HubfsError: there is no such version, or the hub cannot be asked.
        """
