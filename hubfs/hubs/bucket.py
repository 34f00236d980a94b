"""Handles that are in a bucket: `gs://bucket/directory`, `s3://bucket/model.tar.gz`."""

from __future__ import annotations

import re
import threading
from collections.abc import Awaitable, Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from hubfs.config import LoadFormat, Settings
from hubfs.errors import (
    ChangedOriginError,
    HostileError,
    NotFoundError,
    RefusedError,
    TooLargeError,
    UnavailableError,
)
from hubfs.handles import is_archive
from hubfs.hubs.archive_url import not_one_by_one, probe
from hubfs.hubs.base import Listing, Origin, RemoteFile
from hubfs.hubs.found import Found
from hubfs.hubs.object_store import BucketPath, ObjectStores
from hubfs.hubs.pieces import USUAL, cut
from hubfs.net import Net

if TYPE_CHECKING:
    from obstore import BytesStream, GetOptions, GetResult, ObjectMeta
    from obstore.store import GCSStore, S3Store

T = TypeVar("T")

#: Slower than this on average, a read counts as stalled. In bytes per second.
_SLOWEST = 1024


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
            return self.listing(handle, BucketPath.parse(handle))
        if load_format is LoadFormat.UNCOMPRESSED:
            raise not_one_by_one(handle)
        return probe(self._net, handle, self._stores.url(handle, BucketPath.parse(handle)))

    def listing(self, handle: str, place: BucketPath) -> Listing:
        """The files below a directory in a bucket.

        Args:
            place: that its bucket is allowed was decided before.

        Raises:
            NotFoundError: there are none.
            HostileError: names that could not be files below one directory.
            TooLargeError: more files, or bytes, than the settings allow.
            HubfsError: the bucket cannot be listed.
        """
        if not place.path:
            raise RefusedError(f"{handle}: a whole bucket is no model", hint="give a directory in it")
        store = self._stores.store(handle, place)
        listed: list[ObjectMeta] = []
        pages = _pages(store, place.path)
        while page := self._stores.call(handle, place, lambda: _next_page(pages)):
            listed += page
            most = self._settings.max_model_files
            if len(listed) > most + 1:
                raise TooLargeError(
                    f"{handle}: {place} holds more than {most} files and directories",
                    hint="a larger --max-model-files allows it",
                )
        files = _files(handle, place, listed, self._settings)
        return Listing(handle, files, BucketFiles(self._stores, place, self._settings), str(place))

    def shut_down(self) -> None:
        """Let nobody wait for a bucket any longer."""
        self._stores.shut_down()

    def close(self) -> None:
        """Give up what is asked for, and end the thread that asks."""
        self._stores.close()


class BucketFiles:
    """A `Source`: reads ranges of objects."""

    def __init__(self, stores: ObjectStores, place: BucketPath, settings: Settings) -> None:
        self.stores = stores
        self.place = place
        self.settings = settings

    def declared(self, file: RemoteFile) -> RemoteFile:
        """The file as it was listed: reading brings nothing new about it."""
        return file

    def read(self, handle: str, file: RemoteFile, start: int, stop: int, cancel: threading.Event) -> bytes:
        """See `Source.read`. An object that is gone is a changed one."""
        if stop <= start:
            return b""
        asked = _Asked(self, handle, file, range(start, stop), cancel)
        data = asked.first(stop - start, lambda answer: answer.bytes_async())
        if len(data) != stop - start:
            raise asked.incomplete(len(data))
        # Copied here, where threads do it at the same time, and not in the one that waits for all.
        return bytes(data)

    def pieces(
        self, handle: str, file: RemoteFile, start: int, stop: int, cancel: threading.Event, piece: int
    ) -> Generator[bytes | memoryview, None, None]:
        """See `Source.pieces`."""
        least = max(piece, USUAL)
        if stop - start <= least:
            if stop > start:
                yield self.read(handle, file, start, stop, cancel)
            return
        asked = _Asked(self, handle, file, range(start, stop), cancel)
        yield from cut(asked.chunks(least), piece)


class _Asked:
    """A range of an object that is asked for once."""

    def __init__(
        self, files: BucketFiles, handle: str, file: RemoteFile, span: range, cancel: threading.Event
    ) -> None:
        place = files.place
        self._place = BucketPath(place.scheme, place.bucket, file.location, place.endpoint)
        self._stores = files.stores
        self._settings = files.settings
        self._handle = handle
        self._file = file
        self._span = span
        self._cancel = cancel

    def first(self, size: int, take: Callable[[GetResult], Awaitable[T]]) -> T:
        """The answer, and what is taken from it at once; of `size` bytes, which the deadline depends on."""
        file = self._file
        store = self._stores.store(self._handle, self._place)
        seconds = self._settings.connect_timeout + self._settings.stall_timeout + size / _SLOWEST
        try:
            meta, taken = self._stores.call(
                self._handle, self._place, lambda: _get(store, file, self._span, take), self._cancel, seconds
            )
        except NotFoundError as error:
            raise ChangedOriginError(f"{self._handle}: {self._place} is gone since it was listed") from error
        if meta["size"] != file.size or (file.etag is not None and meta["e_tag"] != file.etag):
            raise ChangedOriginError(f"{self._handle}: {self._place} is not what was listed any more")
        return taken

    def chunks(self, least: int) -> Iterator[bytes]:
        """All of it in chunks of at least so many bytes, except the last."""

        async def begin(answer: GetResult) -> BytesStream:
            return answer.stream(min_chunk_size=least)

        stream = self.first(least, begin)
        seconds = self._settings.stall_timeout + least / _SLOWEST
        came = 0
        # One ahead, so that the connection does not stand still while the last one is written.
        coming = self._stores.begin(self._handle, lambda: _next(stream))
        try:
            while chunk := self._stores.wait(self._handle, self._place, coming, self._cancel, seconds):
                came += len(chunk)
                if came > len(self._span):
                    raise self.incomplete(came)
                coming = self._stores.begin(self._handle, lambda: _next(stream))
                if came == len(self._span):
                    # Before it is said to be all: nothing may follow.
                    came += len(self._stores.wait(self._handle, self._place, coming, self._cancel, seconds))
                    if came > len(self._span):
                        raise self.incomplete(came)
                    yield chunk
                    return
                yield chunk
        finally:
            coming.cancel()
        raise self.incomplete(came)

    def incomplete(self, came: int) -> UnavailableError:
        return UnavailableError(
            f"{self._handle}: {self._place}: {came} of {len(self._span)} bytes came", hint="try again later"
        )


def _files(
    handle: str, place: BucketPath, listed: list[ObjectMeta], settings: Settings
) -> dict[str, RemoteFile]:
    """What objects are which files."""
    found = Found(f"{handle}: {place}", settings)
    directories = {place.path}
    for meta in listed:
        path = meta["path"]
        if path != place.path and not path.startswith(f"{place.path}/"):
            raise HostileError(f"{handle}: {place} lists what is elsewhere: {path[:200]!r}")
        while (path := path.rpartition("/")[0]) and path not in directories:
            directories.add(path)
    for meta in listed:
        # An empty object of a directory's name is how some tools make directories.
        if meta["size"] or meta["path"] not in directories:
            file = remote_file(meta, md5_of(place.scheme, meta["e_tag"]))
            found.add(meta["path"][len(place.path) + 1 :], file)
    if not found.files:
        raise NotFoundError(f"{handle}: there is nothing below {place}", hint="check the spelling")
    return found.files


def remote_file(meta: ObjectMeta, md5: bytes | None = None) -> RemoteFile:
    """An object as a listing has it."""
    modified = int(meta["last_modified"].timestamp())
    return RemoteFile(meta["path"], meta["size"], modified, meta["e_tag"], md5)


def md5_of(scheme: str, etag: str | None) -> bytes | None:
    """The MD5 that an ETag is, at Google. At S3 it may be that of the encrypted bytes, and nothing tells."""
    match = re.fullmatch('"([0-9a-f]{32})"', etag or "") if scheme == "gs" else None
    return bytes.fromhex(match[1]) if match else None


def _pages(store: GCSStore | S3Store, path: str) -> Any:
    import obstore

    return obstore.list(store, path, chunk_size=1000)


async def _next_page(pages: Any) -> list[ObjectMeta]:
    try:
        page: list[ObjectMeta] = await anext(pages)
    except StopAsyncIteration:
        return []
    return page


async def _get(
    store: GCSStore | S3Store, file: RemoteFile, span: range, take: Callable[[GetResult], Awaitable[T]]
) -> tuple[ObjectMeta, T]:
    import obstore

    options: GetOptions = {"range": (span.start, span.stop)}
    # A weak ETag never matches (RFC 9110, 13.1.1): it is compared afterwards.
    if file.etag is not None and not file.etag.startswith("W/"):
        options["if_match"] = file.etag
    answer = await obstore.get_async(store, file.location, options=options)
    return answer.meta, await take(answer)


async def _next(stream: BytesStream) -> bytes:
    """What comes next; empty at the end."""
    try:
        return await anext(stream)
    except StopAsyncIteration:
        return b""
