"""Handles that are in a bucket: `gs://bucket/directory`, `s3://bucket/model.tar.gz`."""

from __future__ import annotations

import re
import threading
import unicodedata
from typing import TYPE_CHECKING, Any

from hubfs.config import LoadFormat, Settings
from hubfs.errors import (
    ChangedOriginError,
    HostileError,
    NotFoundError,
    ProtocolError,
    RefusedError,
    TooLargeError,
    UnavailableError,
)
from hubfs.handles import is_archive
from hubfs.hubs.archive_url import probe
from hubfs.hubs.base import Listing, Origin, RemoteFile
from hubfs.hubs.object_store import BucketPath, ObjectStores
from hubfs.net import Net

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta
    from obstore.store import GCSStore, S3Store

#: Slower than this on average, a read counts as stalled. In bytes per second.
_SLOWEST = 1024
#: What Linux takes: NAME_MAX, and PATH_MAX without its NUL.
_MAX_COMPONENT, _MAX_PATH = 255, 4095


class Buckets:
    """Google Cloud Storage, S3, and what speaks like them.

    Args:
        net: asks for archives, which need no more than a URL.
        settings: limits and deadlines.
    """

    def __init__(self, net: Net, settings: Settings) -> None:
        self._net = net
        self._settings = settings
        self._stores = ObjectStores(settings)

    def supports(self, handle: str) -> bool:
        return handle.startswith(("gs://", "s3://"))

    def locate(self, handle: str, load_format: LoadFormat = LoadFormat.AUTO) -> Origin:
        """The archive of that name, or the files below the directory, whatever the load format.

        Raises:
            HubfsError: there is none, or no access to it.
        """
        if not is_archive(handle):
            return self.listing(handle, handle)
        if load_format is LoadFormat.UNCOMPRESSED:
            raise ProtocolError(
                f"{handle}: this is an archive, whose files cannot be read one by one",
                hint="use another --load-format, or the handle of a directory",
            )
        return probe(self._net, handle, self._stores.url(handle, BucketPath.parse(handle)))

    def listing(self, handle: str, where: str) -> Listing:
        """The files below a directory in a bucket.

        Args:
            where: `gs://bucket/directory`; that its bucket is allowed was decided before.

        Raises:
            NotFoundError: there are none.
            HostileError: names that could not be files below one directory.
            TooLargeError: more files, or bytes, than the settings allow.
            HubfsError: the bucket cannot be listed.
        """
        place = BucketPath.parse(where)
        if not place.path:
            raise RefusedError(f"{handle}: a whole bucket is no model", hint="give a directory in it")
        store = self._stores.store(handle, place)
        found = _Found(handle, place, self._settings)
        pages = _pages(store, place.path)
        while page := self._stores.call(handle, place, lambda: _next_page(pages)):
            for meta in page:
                found.add(meta)
        return Listing(handle, found.files(), BucketFiles(self._stores, place, self._settings), str(place))

    def shut_down(self) -> None:
        """Let nobody wait for a bucket any longer."""
        self._stores.shut_down()

    def close(self) -> None:
        """Give up what is asked for, and end the thread that asks."""
        self._stores.close()


class BucketFiles:
    """A `Source`: reads ranges of objects."""

    def __init__(self, stores: ObjectStores, place: BucketPath, settings: Settings) -> None:
        self._stores = stores
        self._place = place
        self._settings = settings

    def declared(self, file: RemoteFile) -> RemoteFile:
        """The file as it was listed: reading brings nothing new about it."""
        return file

    def read(self, handle: str, file: RemoteFile, start: int, stop: int, cancel: threading.Event) -> bytes:
        """Bytes `start` to `stop` of an object, exactly so many. Tried once.

        Raises:
            ChangedOriginError: the object is another one than when it was listed, or gone.
            UnavailableError: it may be tried again.
            StoppedError: `cancel` was set.
            HubfsError: it cannot be read.
        """
        if stop <= start:
            return b""
        place = BucketPath(self._place.scheme, self._place.bucket, file.location)
        store = self._stores.store(handle, place)
        settings = self._settings
        seconds = settings.connect_timeout + settings.stall_timeout + (stop - start) / _SLOWEST
        try:
            meta, data = self._stores.call(
                handle, place, lambda: _read(store, file, start, stop), cancel, seconds
            )
        except NotFoundError as error:
            raise ChangedOriginError(f"{handle}: {place} is gone since it was listed") from error
        if meta["size"] != file.size or (file.etag is not None and meta["e_tag"] != file.etag):
            raise ChangedOriginError(f"{handle}: {place} is not what was listed any more")
        if len(data) != stop - start:
            raise UnavailableError(f"{handle}: {place}: {len(data)} of {stop - start} bytes came")
        # Copied here, where threads do it at the same time, and not in the one that waits for all.
        return bytes(data)


class _Found:
    """What a listing has brought so far, within limits and without clashes."""

    def __init__(self, handle: str, place: BucketPath, settings: Settings) -> None:
        self._handle = handle
        self._place = place
        self._settings = settings
        self._files: dict[str, RemoteFile] = {}
        self._directories: set[str] = set()
        self._folded: dict[str, str] = {}
        self._bytes = 0

    def add(self, meta: ObjectMeta) -> None:
        path = meta["path"]
        if path == self._place.path and not meta["size"]:
            return  # `directory/` itself, as some tools make it
        if not path.startswith(f"{self._place.path}/"):
            raise HostileError(f"{self._handle}: {self._place} lists what is elsewhere: {path[:200]!r}")
        name = path[len(self._place.path) + 1 :]
        parts = name.split("/")
        too_long = len(name.encode()) > _MAX_PATH or any(len(p.encode()) > _MAX_COMPONENT for p in parts)
        if too_long or "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise HostileError(
                f"{self._handle}: {self._place} has a name that no file can have: {name[:200]!r}"
            )
        for depth in range(1, len(parts)):
            self._directories.add(self._once("/".join(parts[:depth])))
        self._files[self._once(name)] = _remote_file(self._place.scheme, meta)
        self._bytes += meta["size"]
        if len(self._files) + len(self._directories) > self._settings.max_model_files:
            raise TooLargeError(
                f"{self._handle}: more than {self._settings.max_model_files} files and directories",
                hint="a larger --max-model-files allows it",
            )
        if self._bytes > self._settings.max_model_size:
            raise TooLargeError(
                f"{self._handle}: more than {self._settings.max_model_size} bytes",
                hint="a larger --max-model-size allows it",
            )

    def files(self) -> dict[str, RemoteFile]:
        """All files.

        Raises:
            NotFoundError: there are none.
            HostileError: a name is both a file's and a directory's.
        """
        for name in self._directories & self._files.keys():
            # An empty object of a directory's name is how some tools make directories.
            if self._files.pop(name).size:
                raise HostileError(f"{self._handle}: {self._place} has both a file and a directory {name!r}")
        if not self._files:
            raise NotFoundError(
                f"{self._handle}: there is nothing below {self._place}", hint="check the spelling"
            )
        return self._files

    def _once(self, name: str) -> str:
        # As in archives: two names that some file systems take for one.
        folded = unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())
        other = self._folded.setdefault(folded, name)
        if other != name:
            raise HostileError(
                f"{self._handle}: {self._place} has two names that some file systems take for one: "
                f"{other!r}, {name!r}"
            )
        return name


def _remote_file(scheme: str, meta: ObjectMeta) -> RemoteFile:
    etag = meta["e_tag"]
    # At Google an ETag of this form is the MD5. At S3 it may be that of the encrypted bytes, and nothing
    # in a listing tells.
    digest = re.fullmatch('"([0-9a-f]{32})"', etag or "") if scheme == "gs" else None
    return RemoteFile(
        location=meta["path"],
        size=meta["size"],
        mtime=int(meta["last_modified"].timestamp()),
        etag=etag,
        md5=bytes.fromhex(digest[1]) if digest else None,
    )


def _pages(store: GCSStore | S3Store, path: str) -> Any:
    import obstore

    return obstore.list(store, path, chunk_size=1000)


async def _next_page(pages: Any) -> list[ObjectMeta]:
    try:
        page: list[ObjectMeta] = await anext(pages)
    except StopAsyncIteration:
        return []
    return page


async def _read(store: GCSStore | S3Store, file: RemoteFile, start: int, stop: int) -> tuple[ObjectMeta, Any]:
    import obstore

    options: GetOptions = {"range": (start, stop)}
    # A weak ETag never matches (RFC 9110, 13.1.1): it is compared afterwards.
    if file.etag is not None and not file.etag.startswith("W/"):
        options["if_match"] = file.etag
    answer = await obstore.get_async(store, file.location, options=options)
    return answer.meta, await answer.bytes_async()
