"""Handles that are in a bucket: `gs://bucket/directory`, `s3://bucket/model.tar.gz`."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

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
from hubfs.hubs.flow import watched
from hubfs.hubs.found import Found
from hubfs.hubs.object_store import BucketPath, ObjectStores, hint_of_refusal, public_url
from hubfs.hubs.url_files import UrlFiles, advising
from hubfs.net import Net

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult, ObjectMeta
    from obstore.store import GCSStore, S3Store


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
        public = _public(place, files)
        if public is None:
            return Listing(handle, files, BucketFiles(self._stores, place, self._settings), str(place))
        source = UrlFiles(self._net, self._settings, lambda: advising(lambda: hint_of_refusal(place)))
        return Listing(handle, public, source, str(place))

    def prepare(self) -> None:
        """Load what the first request needs, before there is one."""
        self._stores.prepare()

    def shut_down(self) -> None:
        """Let nobody wait for a bucket any longer."""
        self._stores.shut_down()

    def close(self) -> None:
        """Give up what is asked for, and end the thread that asks."""
        self._stores.close()


class BucketFiles:
    """A `Source`: reads ranges of objects with the environment's credentials."""

    def __init__(self, stores: ObjectStores, place: BucketPath, settings: Settings) -> None:
        self.stores = stores
        self.place = place
        self.settings = settings

    def declared(self, file: RemoteFile) -> RemoteFile:
        """The file as it was listed: reading brings nothing new about it."""
        return file

    def pieces(
        self, handle: str, file: RemoteFile, start: int, stop: int, cancel: threading.Event
    ) -> Generator[bytes, None, None]:
        """See `Source.pieces`. An object that is gone is a changed one."""
        if stop <= start:
            return
        place = dataclasses.replace(self.place, path=file.location)
        left = stop - start
        answer = self._begin(handle, file, place, range(start, stop), cancel)

        def stopped() -> bool:
            return cancel.is_set() or self.stores.is_stopping

        def wrong() -> UnavailableError:
            came = stop - start - left
            return UnavailableError(
                f"{handle}: {place}: {came} of {stop - start} bytes came", hint="try again later"
            )

        # In this very thread. To have a loop of asyncio wait for each of them, in order to give up at once
        # when one does not come, takes twice the time of a processor.
        coming = self.stores.understanding(handle, place, answer.stream(min_chunk_size=1))
        for data in watched(coming, handle, stopped, self.settings.stall_timeout):
            left -= len(data)
            if not left:
                # Before it is said to be all: nothing may follow.
                left -= len(next(coming, b""))
            if left < 0:
                raise wrong()
            yield data
        if left:
            raise wrong()

    def _begin(
        self, handle: str, file: RemoteFile, place: BucketPath, span: range, cancel: threading.Event
    ) -> GetResult:
        """The head of an answer, which is that of the file."""
        store = self.stores.store(handle, place)
        try:
            answer = self.stores.call(handle, place, lambda: _get(store, file, span), cancel)
        except NotFoundError as error:
            raise ChangedOriginError(f"{handle}: {place} is gone since it was listed") from error
        meta = answer.meta
        if meta["size"] != file.size or (file.etag is not None and meta["e_tag"] != file.etag):
            raise ChangedOriginError(f"{handle}: {place} is not what was listed any more")
        return answer


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


def _public(place: BucketPath, files: Mapping[str, RemoteFile]) -> dict[str, RemoteFile] | None:
    """The files at their URLs, if those are all that one needs to read them.

    To read them so takes half of the processor's time that obstore takes, and brings checksums with the
    bytes. A weak ETag would not tell that a file has changed.
    """
    base = public_url(dataclasses.replace(place, path=""))
    if base is None or not all((file.etag or "").startswith('"') for file in files.values()):
        return None
    return {
        path: dataclasses.replace(file, location=base + quote(file.location)) for path, file in files.items()
    }


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


async def _get(store: GCSStore | S3Store, file: RemoteFile, span: range) -> GetResult:
    import obstore

    options: GetOptions = {"range": (span.start, span.stop)}
    # A weak ETag never matches (RFC 9110, 13.1.1): it is compared afterwards.
    if file.etag is not None and not file.etag.startswith("W/"):
        options["if_match"] = file.etag
    return await obstore.get_async(store, file.location, options=options)
