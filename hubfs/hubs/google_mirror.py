"""Google's mirror of tfhub.dev in China (PROTOCOLS §1): archives, at an address of their own."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

from hubfs.config import LoadFormat
from hubfs.errors import RefusedError
from hubfs.hubs.archive_url import not_one_by_one, probe
from hubfs.hubs.base import Origin
from hubfs.net import Net

HOST: Final = "hub.tensorflow.google.cn"
_ARCHIVES: Final = "https://gcs.tensorflow.google.cn/tfhub-modules"


class GoogleMirror:
    """`https://hub.tensorflow.google.cn/X` is `https://gcs.tensorflow.google.cn/tfhub-modules/X.tar.gz`."""

    def __init__(self, net: Net) -> None:
        self._net = net

    def supports(self, handle: str) -> bool:
        if not handle.startswith(("http://", "https://")):
            return False
        return urlsplit(handle).netloc.lower() in (HOST, f"{HOST}:443")

    def locate(self, handle: str, load_format: LoadFormat = LoadFormat.AUTO) -> Origin:
        """The archive.

        Raises:
            ProtocolError: its files are wanted one by one.
            HubfsError: there is no such version, or no answer.
        """
        if load_format is LoadFormat.UNCOMPRESSED:
            raise not_one_by_one(handle)
        path = urlsplit(handle).path.strip("/").removesuffix(".tar.gz")
        if not path:
            raise RefusedError(f"{handle}: this is no model", hint="give <publisher>/<model>/<version>")
        return probe(self._net, handle, f"{_ARCHIVES}/{path}.tar.gz")
