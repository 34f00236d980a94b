"""The TF Hub hosting protocol (PROTOCOLS §1): `GET <handle>?tf-hub-format=compressed` is the archive."""

from __future__ import annotations

from hubfs.handles import compressed_url, is_archive
from hubfs.hubs.archive_url import probe
from hubfs.hubs.base import Origin
from hubfs.net import Net


class TfHub:
    """tfhub.dev and every server that speaks as it does."""

    def __init__(self, net: Net) -> None:
        self._net = net

    def supports(self, handle: str) -> bool:
        return handle.startswith(("http://", "https://")) and not is_archive(handle)

    def locate(self, handle: str) -> Origin:
        return probe(self._net, handle, compressed_url(handle))
