"""Handles, mount paths and cache keys: what a path means, decided from the path alone.

Nothing here sends a request. A path that this module does not call a model is never asked for.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from hubfs.errors import RefusedError

#: Files that show that an unversioned path is a model's directory (DESIGN §4.2).
MODEL_FILES = frozenset({"saved_model.pb", "saved_model.pbtxt", "tfhub_module.pb"})

_VERSION = re.compile(r"[0-9]+")
_ARCHIVE = (".tar", ".tar.gz", ".tgz")
_DEFAULT_PORTS = {"http": 80, "https": 443}
#: Paths whose meaning is remembered: about 2 MB.
_PLACES = 4096
# Characters that would end or change the path of a URL, or that a URL parser could undo.
_UNFIT = re.compile(r"[\x00-\x1f\x7f\\?#%\ud800-\udfff]")
# What editors, shells and version control look for in any directory they pass through.
_LITTER = re.compile(
    r"\..*|.*~|#.*#|.*\.sw[a-p]|CVS|RCS|SCCS|_darcs|_svn|lost\+found|__pycache__|node_modules|Thumbs\.db"
)
# And what build tools, file managers and language servers look for besides: files, never part of a handle.
_NO_NAME = re.compile(
    r".*\.(bak|orig|rej|tmp|lock|py[co]?|pth|so|dll|exe|ini|inf|cfg|conf|toml|json|ya?ml"
    r"|xml|md|txt|html?|js|ts|rs|go|c|h|cc|cpp|hpp|java|sh|log|db|pid|sock|desktop|pb|pbtxt|zip)"
    r"|G?TAGS|tags|Makefile|makefile|GNUmakefile|autorun|core",
    re.IGNORECASE,
)


def cache_key(handle: str) -> str:
    """tensorflow_hub's cache key: lower-case hex SHA-1 of the handle exactly as given."""
    return hashlib.sha1(handle.encode("utf8", "surrogateescape")).hexdigest()


def is_archive(name: str) -> bool:
    """Whether a file name or handle is that of a plain archive."""
    return name.endswith(_ARCHIVE)


def is_litter(name: str) -> bool:
    """Whether a name is one that tools look for everywhere, and that hubfs asks nobody for."""
    return _LITTER.fullmatch(name) is not None


def version_of(handle: str) -> str | None:
    """The version at the end of a handle, if it has one."""
    last = handle.rsplit("/", 1)[-1]
    return last if _VERSION.fullmatch(last) else None


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


class HandleMap:
    """Handle <-> mount path for one default hub and its allow-list."""

    def __init__(self, hub: str, allow_hosts: Iterable[str] = ()) -> None:
        split = _split(hub)
        self.hub = hub.rstrip("/")
        self._address = Address.parse(split.scheme, split.netloc)
        self._prefix = tuple(part for part in split.path.split("/") if part)
        self._allowed = [Address.parse(scheme, host) for host in allow_hosts for scheme in _DEFAULT_PORTS]
        # Each request of the kernel asks for a path and those above it.
        self._known_place = functools.lru_cache(_PLACES)(self._place)

    def place(self, path: str) -> Place:
        """What a mount path (absolute or not, `//` folded or not) means.

        Raises:
            RefusedError: it cannot be a model, or its host is not allowed.
        """
        return self._known_place(path)

    def _place(self, path: str) -> Place:
        parts = tuple(part for part in path.split("/") if part)
        if not parts or not parts[0].endswith(":"):
            return self._below(self.hub, parts, parts)
        scheme = parts[0][:-1]
        if scheme not in _DEFAULT_PORTS:
            raise RefusedError(f"{path}: handles that begin with {scheme}: are not known to hubfs")
        if len(parts) == 1:
            return Namespace(parts, None)
        address = Address.parse(scheme, parts[1])
        rest = parts[2:]
        if address.same_service(self._address) and rest[: len(self._prefix)] == self._prefix:
            inside = rest[len(self._prefix) :]
            if not inside:
                return Alias("/".join([".."] * (len(parts) - 1)))
            return self._below(self.hub, inside, inside)
        if not self.allows(address):
            raise RefusedError(
                f"{parts[1]}: this host is not on the allow-list", hint=f"mount with --allow-host {parts[1]}"
            )
        if parts[1] != address.netloc:
            if not rest:
                return Alias(address.netloc)
            parts = (parts[0], address.netloc, *rest)
        return self._below(f"{scheme}://{address.netloc}", rest, parts)

    def allows(self, address: Address) -> bool:
        """Whether models may be asked for there."""
        return address.same_service(self._address) or any(
            address.host == allowed.host and address.port == allowed.port for allowed in self._allowed
        )

    def mount_path(self, handle: str) -> str | None:
        """The one mount path of a handle, `None` if this mount does not show it.

        `http`, a default port, a trailing slash and a `tf-hub-format` query make no difference.
        """
        try:
            split = _split(handle)
        except RefusedError:
            return None
        query = [pair for pair in parse_qsl(split.query, True) if pair[0] != "tf-hub-format"]
        if split.scheme not in _DEFAULT_PORTS or query or split.fragment:
            return None
        try:
            place = self.place(f"{split.scheme}:/{split.netloc}{split.path}")
        except RefusedError:
            return None
        if isinstance(place, InModel):
            handle = place.handle
            if place.inner:
                return None
        elif isinstance(place, Namespace) and place.handle:
            handle = place.handle
        else:
            return None
        if handle.startswith(self.hub + "/"):
            return handle[len(self.hub) + 1 :]
        return handle.replace("://", ":/", 1)

    def handle_at(self, mount_path: str) -> str:
        """The handle whose mount path this is, as `mount_path` gave it."""
        place = self.place(mount_path)
        assert isinstance(place, (InModel, Namespace)) and place.handle
        return place.handle

    def handle_of(self, text: str) -> str:
        """The handle that a user means on the command line: a URL, or a path at the default hub.

        Raises:
            RefusedError: it cannot be a model's handle.
        """
        text = re.sub(r"^/*(https?):/+", r"\1://", text)
        if not re.match(r"[a-z0-9]+:/", text):
            text = f"{self.hub}/{text.strip('/')}"
        split = _split(text)
        path = self.mount_path(text)
        if path is None or not split.netloc:
            if split.scheme in _DEFAULT_PORTS and split.netloc:
                self.place(f"{split.scheme}:/{split.netloc}{split.path}")
            raise RefusedError(
                f"{text}: this is not a model's handle",
                hint="give <publisher>/<model>/<version>, a URL of that form, or the URL of a .tar.gz",
            )
        return self.handle_at(path)

    def _below(self, base: str, rest: tuple[str, ...], parts: tuple[str, ...]) -> Place:
        """The place of `rest` at the hub `base`; `parts` is the whole mount path."""
        if rest and rest[0].endswith(":"):
            raise RefusedError(f"{'/'.join(parts)}: a handle cannot have a whole handle in it")
        for index, name in enumerate(rest):
            if _UNFIT.search(name):
                raise RefusedError(f"{'/'.join(parts)}: a handle cannot have such a name in it")
            if (is_archive(name) and not name.startswith(".")) or (index >= 1 and _VERSION.fullmatch(name)):
                handle = "/".join((base, *rest[: index + 1]))
                return InModel(handle, "/".join(rest[index + 1 :]))
            if is_litter(name) or _NO_NAME.fullmatch(name):
                raise RefusedError(f"{'/'.join(parts)}: {name!r} cannot be a part of a handle")
        return Namespace(parts, "/".join((base, *rest)) if len(rest) >= 2 else None)


def _split(url: str) -> SplitResult:
    """urlsplit, without its silent dropping of control characters.

    Raises:
        RefusedError: it is not a URL.
    """
    if re.search(r"[\x00-\x20\x7f]", url):
        raise RefusedError(f"{url!r}: a handle cannot have blanks or control characters in it")
    try:
        return urlsplit(url)
    except ValueError as error:
        raise RefusedError(f"{url!r} is not a URL: {error}") from error


def compressed_url(handle: str, form: str = "compressed") -> str:
    """The URL of a handle's archive in the hosting protocol, or another form; the handle's query is kept.

    Source: tensorflow_hub 0.16.1, `HttpResolverBase._append_format_query`.
    """
    split = urlsplit(handle)
    query = [*parse_qsl(split.query), ("tf-hub-format", form)]
    return split._replace(query=urlencode(query)).geturl()
