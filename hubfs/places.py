"""What a mount path can be, and which names can be a part of a handle: decided from the names alone."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hubfs.config import BUCKET_NAME
from hubfs.errors import RefusedError

_ARCHIVE = (".tar", ".tar.gz", ".tgz")
_DEFAULT_PORTS = {"http": 80, "https": 443}
#: The schemes of hubs that are asked by HTTP.
WEB = tuple(_DEFAULT_PORTS)
#: The schemes of handles in a bucket.
BUCKET_SCHEMES = ("gs", "s3")

# Characters that would end or change the path of a URL, or that a URL parser could undo.
_UNFIT = re.compile(r"[\x00-\x1f\x7f\\?#%\ud800-\udfff]")
# What no name of an object in a bucket is taken to have.
_NO_OBJECT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_VERSION = re.compile(r"[0-9]+")
# TF Lite and TF.js models of the hosting protocol have their kind in a query (PROTOCOLS §1).
_KIND = r"\?(?:lite-format=tflite|tfjs-format=compressed)"
_QUERY, _QUERIED_VERSION = re.compile(_KIND), re.compile(rf"([0-9]+){_KIND}")
# Numbers below these are no versions: `lite-model/mobilenet/1/default/1?lite-format=tflite`.
_KINDS = frozenset({"lite-model", "tfjs-model"})
_BUCKET = re.compile(BUCKET_NAME)
# What editors, shells and version control look for in any directory they pass through.
_LITTER = re.compile(
    r"\..*|.*~|#.*#|.*\.sw[a-p]|CVS|RCS|SCCS|_darcs|_svn|lost\+found|__pycache__|node_modules|Thumbs\.db",
    re.DOTALL,
)
# And what build tools and file managers look for besides. A publisher's file may be called so, but nobody
# is asked for the latest version because of it.
_PROBED = re.compile(
    r".*\.(bak|orig|rej|tmp|lock|pid|sock|desktop)|autorun\.inf|desktop\.ini"
    r"|G?TAGS|tags|Makefile|makefile|GNUmakefile|autorun|core",
    re.IGNORECASE,
)
# What language servers look for as well: files, never part of a handle.
_FILE = re.compile(
    r".*\.(py[co]?|pth|so|dll|exe|ini|inf|cfg|conf|toml|json|ya?ml"
    r"|xml|md|txt|html?|js|ts|rs|go|c|h|cc|cpp|hpp|java|sh|log|db|pb|pbtxt|zip)",
    re.IGNORECASE,
)


def is_archive(name: str) -> bool:
    """Whether a file name or handle is that of a plain archive."""
    return name.endswith(_ARCHIVE)


def is_litter(name: str) -> bool:
    """Whether a name is one that tools look for everywhere, and that hubfs asks nobody for."""
    return _LITTER.fullmatch(name) is not None


def is_probed(name: str) -> bool:
    """Whether tools look for a name where they expect it, so that a look-up of it asks for no model."""
    return is_litter(name) or _PROBED.fullmatch(name) is not None


def can_be_in_handle(name: str) -> bool:
    """Whether a name, which is no archive's, may stand in a handle."""
    return not (_UNFIT.search(name) or is_probed(name) or _FILE.fullmatch(name))


def can_be_object(name: str) -> bool:
    """Whether a name may be one of the parts of an object's path in a bucket."""
    return name not in (".", "..") and not _NO_OBJECT.search(name)


def is_bucket_name(name: str) -> bool:
    """Whether a bucket can be called so, at Google or at S3."""
    return _BUCKET.fullmatch(name) is not None


def is_kind_query(query: str) -> bool:
    """Whether a query, with its `?`, is one of those that a handle may have."""
    return _QUERY.fullmatch(query) is not None


def version_in(name: str) -> str | None:
    """The version that a handle's last name is, be it with the query of TF Lite or TF.js."""
    queried = _QUERIED_VERSION.fullmatch(name)
    if queried:
        return queried[1]
    return name if _VERSION.fullmatch(name) else None


@dataclass(frozen=True)
class Namespace:
    """A directory above versions. It exists without a request.

    Attributes:
        parts: its path below the mount point.
        handle: the unversioned handle that it would be, `None` where there cannot be one.
    """

    parts: tuple[str, ...]
    handle: str | None


@dataclass(frozen=True)
class Alias:
    """Another spelling of a directory, shown as a symbolic link to `target`."""

    target: str


@dataclass(frozen=True)
class InModel:
    """A model's directory (`inner` is empty) or something below it."""

    handle: str
    inner: str


Place = Namespace | Alias | InModel


@dataclass(frozen=True)
class Address:
    """Where a hub listens."""

    scheme: str
    host: str
    port: int

    @classmethod
    def parse(cls, scheme: str, netloc: str) -> Address:
        """
        Raises:
            RefusedError: it is not a host with an optional port; user names are refused too.
        """
        match = re.fullmatch(
            r"(\[[0-9a-f:.]+\]|[a-z0-9]([a-z0-9._-]*[a-z0-9])?)(?::(\d{1,5}))?", netloc.lower()
        )
        if not match or int(match[3] or 1) not in range(1, 65536):
            raise RefusedError(f"{netloc!r} is not a host")
        return cls(scheme, match[1], int(match[3]) if match[3] else _DEFAULT_PORTS[scheme])

    @property
    def netloc(self) -> str:
        default = self.port == _DEFAULT_PORTS[self.scheme]
        return self.host if default else f"{self.host}:{self.port}"

    def same_service(self, other: Address) -> bool:
        """Whether both name one server: http and https of a host's default ports count as one."""
        ports = {self.port, other.port}
        return self.host == other.host and (len(ports) == 1 or ports == set(_DEFAULT_PORTS.values()))


def at_hub(base: str, rest: tuple[str, ...], parts: tuple[str, ...]) -> Place:
    """The place of `rest` at a hub that speaks the hosting protocol, or a plain web server.

    Args:
        base: the hub's URL.
        parts: the whole mount path.

    Raises:
        RefusedError: it cannot be a model.
    """
    if rest and rest[0].endswith(":"):
        raise RefusedError(f"{'/'.join(parts)}: a handle cannot have a whole handle in it")
    plain = True
    for index, name in enumerate(rest):
        version = (plain and _VERSION.fullmatch(name)) or _QUERIED_VERSION.fullmatch(name)
        if (index >= 1 and version) or _is_archive_name(name):
            return InModel("/".join((base, *rest[: index + 1])), "/".join(rest[index + 1 :]))
        _check(name, parts)
        plain = plain and name not in _KINDS
    # What is of a kind has its query.
    return Namespace(parts, "/".join((base, *rest)) if len(rest) >= 2 and plain else None)


def in_bucket(parts: tuple[str, ...]) -> Place:
    """The place of a mount path `gs:/<bucket>/…`, whose bucket is allowed.

    Raises:
        RefusedError: it cannot be a model.
    """
    base, rest = f"{parts[0]}//{parts[1]}", parts[2:]
    for index, name in enumerate(rest):
        if _VERSION.fullmatch(name) or _is_archive_name(name):
            inner = rest[index + 1 :]
            if not all(can_be_object(part) for part in inner):
                raise RefusedError(f"{'/'.join(parts)}: no object in a bucket is read by such a name")
            return InModel("/".join((base, *rest[: index + 1])), "/".join(inner))
        _check(name, parts)
    return Namespace(parts, "/".join((base, *rest)) if rest else None)


def _is_archive_name(name: str) -> bool:
    """Whether a name is a plain archive's, and fit for a URL."""
    return is_archive(name) and not (name.startswith(".") or _UNFIT.search(name))


def _check(name: str, parts: tuple[str, ...]) -> None:
    if not can_be_in_handle(name):
        raise RefusedError(f"{'/'.join(parts)}: {name!r} cannot be a part of a handle")
