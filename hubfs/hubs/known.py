"""Every kind of hub that there is, in the order in which they are asked whether a handle is theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hubfs.hubs.archive_url import ArchiveUrl
from hubfs.hubs.google_mirror import GoogleMirror
from hubfs.hubs.kaggle import Kaggle
from hubfs.hubs.tfhub import TfHub

if TYPE_CHECKING:
    from hubfs.config import Settings
    from hubfs.hubs.base import Hub
    from hubfs.hubs.bucket import Buckets
    from hubfs.net import Net


def hubs(net: Net, settings: Settings, buckets: Buckets) -> list[Hub]:
    """All of them, the special ones first."""
    return [
        buckets,
        Kaggle(net, settings),
        GoogleMirror(net),
        ArchiveUrl(net),
        TfHub(net, settings, buckets),
    ]
