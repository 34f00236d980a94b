"""hubfs: mount a model hub; a model handle is a path.

`mount` mounts for the length of a `with` block, `resolve` and `pull` bring models into the cache
without a mount.
"""

from hubfs.api import Pulled, TransferStatus, models, mount, pull, resolve
from hubfs.config import LoadFormat, Settings
from hubfs.errors import HubfsError
from hubfs.version import __version__

__all__ = [
    "HubfsError",
    "LoadFormat",
    "Pulled",
    "Settings",
    "TransferStatus",
    "__version__",
    "models",
    "mount",
    "pull",
    "resolve",
]
