"""The TF Hub hosting protocol (PROTOCOLS §1): one handle, in two formats.

`?tf-hub-format=compressed` is the archive. `?tf-hub-format=uncompressed` is answered with 303 and, as its
body, the directory of a bucket that has the version's files. Anything else means that it is not offered.
"""

from __future__ import annotations

import logging
import re

from hubfs.config import LoadFormat
from hubfs.errors import AccessError, NotFoundError, ProtocolError
from hubfs.handles import compressed_url, is_archive
from hubfs.hubs.archive_url import probe
from hubfs.hubs.base import Listing, Origin
from hubfs.hubs.bucket import Buckets
from hubfs.net import Net

log = logging.getLogger("hubfs.hubs")

_SEE_OTHER = 303
#: Longer bodies are no location.
_MAX_LOCATION = 4096


class TfHub:
    """tfhub.dev and every server that speaks as it does.

    Args:
        buckets: lists what the hub names.
    """

    def __init__(self, net: Net, buckets: Buckets) -> None:
        self._net = net
        self._buckets = buckets

    def supports(self, handle: str) -> bool:
        return handle.startswith(("http://", "https://")) and not is_archive(handle)

    def locate(self, handle: str, load_format: LoadFormat = LoadFormat.AUTO) -> Origin:
        """The version's files in a bucket, or its archive.

        Under `AUTO` it is the archive where the hub names no bucket, or one that cannot be listed.

        Raises:
            HubfsError: there is no such version, it is not to be had in this format, or there is no answer.
        """
        if load_format is not LoadFormat.COMPRESSED:
            try:
                return self._listing(handle)
            except (NotFoundError, AccessError, ProtocolError) as error:
                if load_format is LoadFormat.UNCOMPRESSED:
                    raise
                log.debug("%s; its archive is asked for", error.message)
        return probe(self._net, handle, compressed_url(handle))

    def _listing(self, handle: str) -> Listing:
        url = compressed_url(handle, "uncompressed")
        with self._net.get(url, handle, statuses=range(100, 600)) as response:
            status = response.status_code
            body = response.raw.read(_MAX_LOCATION, decode_content=True) if status == _SEE_OTHER else b""
        where = re.fullmatch(r"(gs://\S+?)/?\s*", body.decode("utf-8", "replace"))
        if where is None:
            raise ProtocolError(
                f"{handle}: the hub does not offer this model uncompressed (HTTP {status})",
                hint="--load-format auto or compressed downloads its archive",
            )
        # The bucket is allowed with the hub that names it.
        return self._buckets.listing(handle, where[1])
