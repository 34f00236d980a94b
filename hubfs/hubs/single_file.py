"""Versions that are one file at one URL, such as TF Lite's."""

from __future__ import annotations

import re
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from hubfs.errors import ProtocolError
from hubfs.handles import version_of
from hubfs.hubs.base import Listing, RemoteFile
from hubfs.hubs.found import Found
from hubfs.hubs.url_files import UrlFiles, described
from hubfs.names import as_listed
from hubfs.net import Net, content_length

if TYPE_CHECKING:
    import requests

    from hubfs.config import Settings


def single_file(net: Net, settings: Settings, handle: str, suffix: str) -> Listing:
    """The listing of the one file that a handle's own URL gives, asked for one byte of it.

    It is called as it is where the hub redirects to, or else `<version><suffix>`.

    Raises:
        HubfsError: there is no such file, or it cannot be told how large it is.
    """
    with net.get(handle, handle, {"Range": "bytes=0-0"}) as response:
        if "html" in response.headers.get("Content-Type", ""):
            raise ProtocolError(
                f"{handle}: the hub gives a web page and no {suffix} file", hint="does it offer this kind?"
            )
        size, final = _size(response, handle), str(response.url)
        file = described(RemoteFile(handle, size, _modified(response)), response)
    name = unquote(urlsplit(final).path).rpartition("/")[2]
    if not name.endswith(suffix):
        name = f"{version_of(handle) or 'model'}{suffix}"
    found = Found(f"{handle}: the hub", settings)
    found.add(as_listed(name, f"{handle}: the hub"), file)
    return Listing(handle, found.files, UrlFiles(net, settings), handle)


def _size(response: requests.Response, handle: str) -> int:
    headers = response.headers
    if response.status_code == 200:
        size = content_length(headers)
    else:
        match = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", headers.get("Content-Range", ""))
        size = int(match[1]) if match else None
    if size is None:
        raise ProtocolError(f"{handle}: the hub does not say how large the file is")
    return size


def _modified(response: requests.Response) -> int:
    """Epoch seconds of `Last-Modified`, 0 without one."""
    try:
        return max(0, int(parsedate_to_datetime(response.headers.get("Last-Modified", "")).timestamp()))
    except (TypeError, ValueError, OverflowError):
        return 0
