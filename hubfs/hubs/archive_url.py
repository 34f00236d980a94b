"""Handles that are the URL of an archive: `https://host/model.tar.gz`."""

from __future__ import annotations

import re

from hubfs.config import LoadFormat
from hubfs.errors import ProtocolError
from hubfs.handles import compressed_url, is_archive
from hubfs.hubs.base import Archive, Origin
from hubfs.net import Net, content_length, strong_etag


class ArchiveUrl:
    """Plain web servers. The query is tensorflow_hub's habit and does no harm to them."""

    def __init__(self, net: Net) -> None:
        self._net = net

    def supports(self, handle: str) -> bool:
        return handle.startswith(("http://", "https://")) and is_archive(handle)

    def locate(self, handle: str, load_format: LoadFormat = LoadFormat.AUTO) -> Origin:
        """The archive.

        Raises:
            ProtocolError: its files are wanted one by one.
            HubfsError: there is none, or no answer.
        """
        if load_format is LoadFormat.UNCOMPRESSED:
            raise not_one_by_one(handle)
        return probe(self._net, handle, compressed_url(handle))


def not_one_by_one(handle: str) -> ProtocolError:
    """The error for an archive where files are wanted that can be read by range."""
    return ProtocolError(
        f"{handle}: this is an archive, whose files cannot be read one by one",
        hint="--load-format auto or compressed downloads it",
    )


def probe(net: Net, handle: str, url: str) -> Archive:
    """Ask whether there is an archive, for one byte of it.

    A GET, since the signed storage URLs that hubs redirect to do not allow HEAD.

    Raises:
        HubfsError: there is none, or no answer.
    """
    etag = None
    with net.get(url, handle, {"Range": "bytes=0-0"}) as response:
        if response.status_code == 206:
            match = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", ""))
            size = int(match[1]) if match else None
            etag = strong_etag(response.headers)
        elif response.status_code == 200:
            size = content_length(response.headers)
        else:
            # 416: it exists and is empty. The transfer will say so.
            size = 0
    return Archive(handle, url, size, etag)
