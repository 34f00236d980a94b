"""Handles, mount paths and cache keys: what a path means, decided from the path alone.

Nothing here sends a request. A path that this module does not call a model is never asked for.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from hubfs import kaggle_handle
from hubfs.errors import RefusedError
from hubfs.places import (
    BUCKET_SCHEMES,
    WEB,
    Address,
    Alias,
    InModel,
    Namespace,
    Place,
    at_hub,
    in_bucket,
    is_archive,
    is_bucket_name,
    is_kind_query,
    is_litter,
    is_probed,
    version_in,
)

__all__ = [
    "MODEL_FILES",
    "Address",
    "Alias",
    "HandleMap",
    "InModel",
    "Namespace",
    "Place",
    "cache_key",
    "compressed_url",
    "host_to_allow",
    "is_archive",
    "is_litter",
    "version_of",
]

#: Files that show that an unversioned path is a model's directory (DESIGN §4.2).
MODEL_FILES = frozenset({"saved_model.pb", "saved_model.pbtxt", "tfhub_module.pb"})

# And those that show it in a bucket, which is there because its owner's name was allowed on purpose.
_BUCKET_FILES = re.compile(
    r"saved_model\.pb(?:txt)?|(?:tfhub_module|keras_metadata|fingerprint)\.pb|(?:model|config)\.json"
    r"|.+\.(?:tflite|keras|h5|safetensors|onnx|gguf|pt|pth|bin|npz|pkl)"
)
#: Allowed without being named: the servers of Google's models, and the bucket that is behind them.
_KNOWN_HOSTS = (Address("https", "hub.tensorflow.google.cn", 443), *kaggle_handle.HOSTS)
_KAGGLE = ("https:", kaggle_handle.HOSTS[0].netloc)
_KNOWN_BUCKETS = ("gs://tfhub-modules",)
_BUCKET_ROOTS = tuple(f"{scheme}:/" for scheme in BUCKET_SCHEMES)
#: Paths whose meaning is remembered: about 2 MB.
_PLACES = 4096


def cache_key(handle: str) -> str:
    """tensorflow_hub's cache key: lower-case hex SHA-1 of the handle exactly as given."""
    return hashlib.sha1(handle.encode("utf8", "surrogateescape")).hexdigest()


def version_of(handle: str) -> str | None:
    """The version at the end of a handle, if it has one."""
    if kaggle_handle.is_kaggle(handle):
        # There the last name may be a number and yet be a variation's.
        try:
            version = kaggle_handle.parse(handle).version
        except RefusedError:
            return None
        return None if version is None else str(version)
    return version_in(handle.rsplit("/", 1)[-1])


def host_to_allow(handle: str) -> str:
    """What `--allow-host` has to name for a handle: a host with its port, or a bucket as `gs://bucket`.

    It is empty if there is none: the handle is a path at the default hub, or cannot be one at all.
    """
    scheme, _, rest = handle.partition("://")
    if scheme in BUCKET_SCHEMES:
        bucket = rest.partition("/")[0]
        return f"{scheme}://{bucket}" if is_bucket_name(bucket) else ""
    try:
        split = _split(handle)
        return Address.parse(split.scheme, split.netloc).netloc if split.scheme in WEB else ""
    except RefusedError:
        return ""


class HandleMap:
    """Handle <-> mount path for one default hub and its allow-list."""

    def __init__(self, hub: str, allow_hosts: Iterable[str] = ()) -> None:
        """
        Args:
            hub: the default hub's URL.
            allow_hosts: `host`, `host:port`, `gs://bucket` or `s3://bucket`, each.

        Raises:
            RefusedError: one of these is none, or the hub's URL is that of a model, or not of models.
        """
        split = _split(hub)
        self.hub = hub.rstrip("/")
        self._address = Address.parse(split.scheme, split.netloc)
        self._prefix = tuple(part for part in split.path.split("/") if part)
        self._hub_is_kaggle = _is_kaggle(self._address)
        if self._hub_is_kaggle:
            self._address = kaggle_handle.HOSTS[0]
            self._prefix = kaggle_handle.canonical(self._prefix)
            self.hub = "/".join((f"https://{self._address.netloc}", *self._prefix))
        self._allowed = [*_KNOWN_HOSTS]
        self._buckets = {*_KNOWN_BUCKETS}
        for entry in allow_hosts:
            scheme, found, bucket = entry.partition("://")
            if not found:
                self._allowed += [Address.parse(scheme, entry) for scheme in WEB]
            elif scheme in BUCKET_SCHEMES and is_bucket_name(bucket):
                self._buckets.add(entry)
            else:
                raise RefusedError(f"{entry!r} is neither a host nor a bucket such as gs://bucket")
        # Each request of the kernel asks for a path and those above it.
        self._known_place = functools.lru_cache(_PLACES)(self._place)
        if self.place("") != Namespace((), None):
            raise RefusedError(
                f"{hub}: this is a model and no hub", hint="give https://www.kaggle.com/models"
            )

    def place(self, path: str) -> Place:
        """What a mount path (absolute or not, `//` folded or not) means.

        Raises:
            RefusedError: it cannot be a model, or its host is not allowed.
        """
        return self._known_place(path)

    def unversioned(self, path: str) -> InModel | None:
        """The unversioned model that a path would be a file of, if its last name shows it (DESIGN §4.2).

        What `place` says of the same path is the other thing that it may be.
        """
        above, _, name = path.strip("/").rpartition("/")
        shows = above.startswith(_BUCKET_ROOTS) and _BUCKET_FILES.fullmatch(name)
        if name not in MODEL_FILES and (not shows or is_probed(name)):
            return None
        try:
            place = self.place(above)
        except RefusedError:
            return None
        if isinstance(place, Namespace) and place.handle:
            return InModel(place.handle, name)
        return None

    def _place(self, path: str) -> Place:
        parts = tuple(part for part in path.split("/") if part)
        if not parts or not parts[0].endswith(":"):
            if self._hub_is_kaggle:
                return kaggle_handle.place((*self._prefix, *parts), self._kaggle_path)
            return at_hub(self.hub, parts, parts)
        scheme = parts[0][:-1]
        if scheme == "kaggle":
            if len(parts) == 1:
                return Alias("/".join(self._kaggle_path(kaggle_handle.MODELS)) or ".")
            return self._at_kaggle((*kaggle_handle.MODELS, *parts[1:]))
        if scheme not in (*WEB, *BUCKET_SCHEMES):
            raise RefusedError(f"{path}: handles that begin with {scheme}: are not known to hubfs")
        if len(parts) == 1:
            return Namespace(parts, None)
        if scheme in BUCKET_SCHEMES:
            self._check_bucket(f"{scheme}://{parts[1]}")
            return in_bucket(parts)
        return self._at_host(scheme, parts)

    def _at_host(self, scheme: str, parts: tuple[str, ...]) -> Place:
        """The place of a mount path `https:/<host>/…`."""
        address = Address.parse(scheme, parts[1])
        rest = parts[2:]
        if _is_kaggle(address):
            if not rest and parts != _KAGGLE:
                return Alias(_KAGGLE[1] if parts[0] == _KAGGLE[0] else "/".join(("..", *_KAGGLE)))
            return self._at_kaggle(rest)
        if address.same_service(self._address) and rest[: len(self._prefix)] == self._prefix:
            inside = rest[len(self._prefix) :]
            if not inside:
                return Alias("/".join([".."] * (len(parts) - 1)))
            return at_hub(self.hub, inside, inside)
        if not self.allows(address):
            raise RefusedError(
                f"{parts[1]}: this host is not on the allow-list", hint=f"mount with --allow-host {parts[1]}"
            )
        if parts[1] != address.netloc:
            if not rest:
                return Alias(address.netloc)
            parts = (parts[0], address.netloc, *rest)
        return at_hub(f"{scheme}://{address.netloc}", rest, parts)

    def _at_kaggle(self, names: tuple[str, ...]) -> Place:
        """The place of a path at Kaggle's host, reached by its name."""
        at_top = self._hub_is_kaggle and kaggle_handle.canonical(names) == self._prefix
        if at_top and names != kaggle_handle.API_MODELS:
            # The link lies in a directory of canonical names, whatever way led there.
            return Alias("/".join([".."] * (len(self._prefix) + 1)))
        return kaggle_handle.place(names, self._kaggle_path)

    def _kaggle_path(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The mount path of a path at Kaggle's host."""
        depth = len(self._prefix)
        if self._hub_is_kaggle and names[:depth] == self._prefix:
            return names[depth:]
        return (*_KAGGLE, *names)

    def _check_bucket(self, bucket: str) -> None:
        if bucket in self._buckets:
            return
        if not is_bucket_name(bucket.partition("://")[2]):
            raise RefusedError(f"{bucket!r}: no bucket has such a name")
        raise RefusedError(
            f"{bucket}: this bucket is not on the allow-list", hint=f"mount with --allow-host {bucket}"
        )

    def allows(self, address: Address) -> bool:
        """Whether models may be asked for there."""
        return address.same_service(self._address) or any(
            address.host == allowed.host and address.port == allowed.port for allowed in self._allowed
        )

    def mount_path(self, handle: str) -> str | None:
        """The one mount path of a handle, `None` if this mount does not show it.

        `http`, a default port, a trailing slash and a `tf-hub-format` query make no difference, nor does the
        spelling of a handle of Kaggle's.
        """
        try:
            handle = self._canonical(handle)
        except RefusedError:
            return None
        if handle.startswith(self.hub + "/"):
            return handle[len(self.hub) + 1 :]
        return handle.replace("://", ":/", 1)

    def _canonical(self, url: str) -> str:
        """The one handle of the model that a URL names.

        Raises:
            RefusedError: it names none, or one that this mount does not show.
        """
        place = self.place(_path_of(url))
        if isinstance(place, InModel) and not place.inner:
            return place.handle
        if isinstance(place, Namespace) and place.handle:
            return place.handle
        raise _no_handle(url)

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
        text = re.sub(r"^/*(https?|gs|s3|kaggle):/+", r"\1://", text)
        if not re.match(r"[a-z0-9]+:/", text):
            text = f"{self.hub}/{text.strip('/')}"
        return self._canonical(text)


def _is_kaggle(address: Address) -> bool:
    return any(address.same_service(host) for host in kaggle_handle.HOSTS)


def _path_of(url: str) -> str:
    """The path below a mount point that a URL is, without what makes no difference.

    Raises:
        RefusedError: it is not a URL that can be a handle.
    """
    if kaggle_handle.is_kaggle(url):
        return kaggle_handle.parse(url).handle
    scheme, _, rest = url.partition("://")
    if scheme in BUCKET_SCHEMES:
        # Not taken apart as a URL: an object's name may have blanks in it.
        if rest.startswith("/") or "//" in rest.rstrip("/"):
            raise _no_handle(url)
        return f"{scheme}:/{rest}"
    split = _split(url)
    pairs = [pair for pair in parse_qsl(split.query, True) if pair[0] != "tf-hub-format"]
    query = "?" + "&".join("=".join(pair) for pair in pairs) if pairs else ""
    if split.scheme not in WEB or not split.netloc or split.fragment or (query and not is_kind_query(query)):
        raise _no_handle(url)
    return f"{split.scheme}:/{split.netloc}{split.path.rstrip('/')}{query}"


def _no_handle(text: str) -> RefusedError:
    return RefusedError(
        f"{text}: this is not a model's handle",
        hint="give <publisher>/<model>/<version>, a URL of that form, or the URL of a .tar.gz",
    )


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
