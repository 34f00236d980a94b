"""The objects of the shared tier: read, written on conditions, uploaded, copied, listed, removed.

Everything has a deadline and is repeated a bounded number of times.
"""

from __future__ import annotations

import dataclasses
import random
import re
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from hubfs.config import Settings
from hubfs.errors import StoppedError, TooLargeError, UnavailableError
from hubfs.hubs.base import RemoteFile
from hubfs.hubs.bucket import BucketFiles, remote_file
from hubfs.hubs.found import Found
from hubfs.hubs.object_store import BucketPath, ObjectStores

if TYPE_CHECKING:
    from obstore import ObjectMeta, UpdateVersion
    from obstore.store import GCSStore, S3Store

    Store = GCSStore | S3Store

T = TypeVar("T")

#: Slower than this on average, an upload counts as stalled, and so does a copy on the server's side. In
#: bytes per second; a single part that stands still is noticed by `--stall-timeout`.
_SLOWEST_UPLOAD, _SLOWEST_COPY = 64 << 10, 10 << 20
#: What an upload may have in memory: parts on their way, and one that is being read.
_UPLOAD_MEMORY = 25 << 20
#: S3 takes parts of this size or more, and so many of them.
_MIN_PART, _MAX_PARTS = 5 << 20, 9_999
#: Copies and removals at a time.
_AT_ONCE = 8
#: S3 removes so many objects with one request.
_REMOVED_AT_ONCE = 1000
#: The largest object that S3 copies by one request.
LARGEST_COPY = 5 << 30
#: Empty directories of a SavedModel. TensorFlow keeps one in a bucket as an empty object of that name and a
#: slash, which obstore does not tell from an empty file.
_DIRECTORIES = {"assets", "assets.extra", "variables", "debug"}


@dataclass(frozen=True)
class Object:
    """A small object's content, and what names this version of it in a condition."""

    content: bytes
    version: UpdateVersion


class UnsupportedError(Exception):
    """The store cannot overwrite on a condition."""


class Bucket:
    """The shared tier's objects, by their names below its prefix. Safe to use from many threads.

    All methods raise `HubfsError`, as `ObjectStores.call` does.
    """

    def __init__(self, url: str, stores: ObjectStores, settings: Settings) -> None:
        self.place = BucketPath.parse(url)
        self._stores = stores
        self._settings = settings
        self._never = threading.Event()

    def get(
        self,
        handle: str,
        name: str,
        limit: int,
        cancel: threading.Event | None = None,
        seconds: float | None = None,
    ) -> Object | None:
        """An object's content; `None` if there is no such object.

        Args:
            seconds: try once, for so long.

        Raises:
            ProtocolError: it has more than `limit` bytes.
        """
        return self._ask(handle, name, lambda store, path: _get(store, path, limit), cancel, seconds)

    def write(
        self,
        handle: str,
        name: str,
        content: bytes,
        instead_of: UpdateVersion | None,
        cancel: threading.Event | None = None,
        seconds: float | None = None,
    ) -> UpdateVersion | None:
        """Write an object if there is none, or if it is still the version `instead_of`; `None` if not so.

        Args:
            content: never written before: by this an answer that was lost is known to have been yes.
            seconds: try once, for so long.

        Raises:
            UnsupportedError: the store cannot overwrite on a condition.
        """
        mode: Any = "create" if instead_of is None else instead_of
        attempts = 0

        async def work(store: Store, path: str) -> UpdateVersion | None:
            nonlocal attempts
            attempts += 1
            return await _write(store, path, content, mode)

        written = self._ask(handle, name, work, cancel, seconds)
        if written is None and attempts > 1:
            found = self.get(handle, name, max(4096, len(content)), cancel)
            return found.version if found is not None and found.content == content else None
        return written

    def overwrite(
        self,
        handle: str,
        name: str,
        content: bytes,
        cancel: threading.Event | None = None,
        seconds: float | None = None,
    ) -> UpdateVersion:
        """Write an object, whatever is there.

        Args:
            seconds: try once, for so long.
        """

        async def work(store: Store, path: str) -> UpdateVersion:
            return await _write(store, path, content, "overwrite") or {}

        return self._ask(handle, name, work, cancel, seconds)

    def upload(
        self,
        handle: str,
        name: str,
        size: int,
        pieces: Callable[[int], Iterator[bytes]],
        cancel: threading.Event,
    ) -> None:
        """Write an object from pieces, in parts. It appears when all of it has arrived, or not at all.

        Args:
            pieces: begins anew with each attempt; gives what has about so many bytes each. What it raises
                ends the upload.
        """
        part = max(_MIN_PART, -(-size // _MAX_PARTS))
        at_once = max(1, _UPLOAD_MEMORY // part - 2)
        seconds = self._base_seconds + size / _SLOWEST_UPLOAD
        self._ask(
            handle,
            name,
            lambda store, path: _upload(store, path, pieces, size, part, at_once),
            cancel,
            seconds,
            repeat=True,
        )

    def copy(self, handle: str, pairs: Sequence[tuple[str, str, int]], cancel: threading.Event) -> None:
        """Copy objects on the server's side, several at a time: from, to and size of each."""
        if pairs:
            seconds = self._base_seconds * len(pairs) + sum(size for *_, size in pairs) / _SLOWEST_COPY
            paths = [(self._path(a), self._path(b)) for a, b, _ in pairs]
            self._ask(handle, pairs[0][1], lambda store, _: _copy(store, paths), cancel, seconds, repeat=True)

    def remove(
        self,
        handle: str,
        names: Sequence[str],
        cancel: threading.Event | None = None,
        seconds: float | None = None,
    ) -> None:
        """Remove objects; those that are not there do not matter.

        Args:
            seconds: try once, for so long.
        """
        for start in range(0, len(names), _REMOVED_AT_ONCE):
            paths = [self._path(name) for name in names[start : start + _REMOVED_AT_ONCE]]
            self._ask(
                handle,
                names[start],
                lambda store, _, paths=paths: _remove(store, paths),  # type: ignore[misc]
                cancel,
                seconds,
            )

    def files(
        self, handle: str, directory: str, cancel: threading.Event | None = None
    ) -> tuple[dict[str, RemoteFile], set[str]]:
        """The files below a directory, by their relative paths, and its directories; both may be empty.

        Raises:
            HostileError: names that could not be files below one directory.
            TooLargeError: more files, or bytes, than the settings allow.
        """
        listed = self.listed(handle, directory, cancel)
        directories = {name[:end] for name in listed for end in _slashes(name)}
        found = Found(f"{handle}: {self._at(directory)}", self._settings)
        for name, meta in listed.items():
            if not meta["size"] and (name in directories or name in _DIRECTORIES):
                directories.add(name)
            else:
                found.add(name, remote_file(meta))
        return found.files, directories

    def listed(
        self,
        handle: str,
        directory: str,
        cancel: threading.Event | None = None,
        seconds: float | None = None,
    ) -> dict[str, ObjectMeta]:
        """All objects below a directory, whatever their names are.

        Args:
            seconds: try once, for so long.
        """
        most, begin = 2 * self._settings.max_model_files, self._path(directory) + "/"
        found = self._ask(
            handle, directory, lambda store, path: _list(store, path, None, begin, most), cancel, seconds
        )
        return {meta["path"][len(begin) :]: meta for meta in found}

    def uploads(
        self, handle: str, key: str, cancel: threading.Event | None = None, seconds: float | None = None
    ) -> dict[str, list[str]]:
        """Names of the objects in `<key>.<uid>.tmp/`, by uid.

        Args:
            seconds: try once, for so long.
        """
        most, begin = 2 * self._settings.max_model_files, self._path(key) + "."
        root = self.place.path
        listed = self._ask(
            handle, key, lambda store, _: _list(store, root, begin, begin, most), cancel, seconds
        )
        found: dict[str, list[str]] = {}
        for meta in listed:
            match = re.match(r"([0-9a-zA-Z]+)\.tmp/", meta["path"][len(begin) :])
            if match:
                found.setdefault(match[1], []).append(meta["path"][len(begin) - len(key) - 1 :])
        return found

    def size(self, handle: str, directory: str, cancel: threading.Event | None = None) -> tuple[int, int]:
        """Objects and bytes below a directory."""
        sizes = [meta["size"] for meta in self.listed(handle, directory, cancel).values()]
        return len(sizes), sum(sizes)

    def source(self, directory: str) -> BucketFiles:
        """Reads the files that are listed below a directory."""
        return BucketFiles(self._stores, self._at(directory), self._settings)

    def where(self, name: str) -> str:
        """For people."""
        return str(self._at(name))

    @property
    def _base_seconds(self) -> float:
        return self._settings.connect_timeout + self._settings.stall_timeout

    def _at(self, name: str) -> BucketPath:
        return dataclasses.replace(self.place, path=self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.place.path}/{name}".lstrip("/")

    def _ask(
        self,
        handle: str,
        name: str,
        work: Callable[[Store, str], Coroutine[Any, Any, T]],
        cancel: threading.Event | None,
        seconds: float | None = None,
        *,
        repeat: bool = False,
    ) -> T:
        """What `work` gives, which is tried again while the store may just not be able to answer now.

        Args:
            seconds: how long an attempt may take; there is only one then, unless `repeat`.
        """
        place, delay = self._at(name), self._settings.retry_delay
        store = self._stores.store(handle, place)
        left = self._settings.retries if seconds is None or repeat else 0
        while True:
            try:
                return self._stores.call(handle, place, lambda: work(store, place.path), cancel, seconds)
            except UnavailableError:
                if not left:
                    raise
            left -= 1
            if (cancel or self._never).wait(delay * (0.5 + 0.5 * random.random())):
                raise StoppedError(f"{handle}: the request was given up")
            delay *= 2


def _slashes(name: str) -> Iterable[int]:
    return (i for i, character in enumerate(name) if character == "/")


async def _list(store: Store, path: str, after: str | None, begin: str, most: int) -> list[ObjectMeta]:
    """The objects whose paths begin so.

    Args:
        path: a directory; `after`: a path in it that all of them come after, in order.
        most: the limit.
    """
    import obstore

    found: list[ObjectMeta] = []
    async for page in obstore.list(store, path or None, offset=after, chunk_size=1000):
        found += (meta for meta in page if meta["path"].startswith(begin))
        if len(found) > most:
            raise TooLargeError(f"{path} has more than {most} objects", hint="see --max-model-files")
        if after is not None and page[-1]["path"] > begin and not page[-1]["path"].startswith(begin):
            break
    return found


async def _get(store: Store, path: str, limit: int) -> Object | None:
    import obstore

    try:
        answer = await obstore.get_async(store, path)
    except FileNotFoundError:
        return None
    if answer.meta["size"] > limit:
        raise ValueError(f"{answer.meta['size']} bytes are too many")
    return Object(bytes(await answer.bytes_async()), _version(answer.meta))


async def _write(store: Store, path: str, content: bytes, mode: Any) -> UpdateVersion | None:
    import obstore
    from obstore import exceptions

    try:
        return _version(await obstore.put_async(store, path, content, mode=mode))
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
        return None
    except (exceptions.NotSupportedError, NotImplementedError) as error:
        raise UnsupportedError(str(error)) from error
    except exceptions.BaseError as error:
        if "status code: 501" in str(error):
            raise UnsupportedError(str(error)) from error
        raise


def _version(found: Any) -> UpdateVersion:
    # obstore takes no None here.
    known: Any = {name: found[name] for name in ("e_tag", "version") if found[name] is not None}
    version: UpdateVersion = known
    return version


async def _upload(
    store: Store, path: str, pieces: Callable[[int], Iterator[bytes]], size: int, part: int, at_once: int
) -> None:
    import obstore

    if size <= part:
        # Not in parts: the ETag is an MD5 then.
        await obstore.put_async(store, path, b"".join(pieces(part)), use_multipart=False)
    else:
        await obstore.put_async(store, path, pieces(1 << 20), chunk_size=part, max_concurrency=at_once)


async def _copy(store: Store, pairs: Sequence[tuple[str, str]]) -> None:
    import asyncio

    import obstore

    free = asyncio.Semaphore(_AT_ONCE)

    async def one(from_: str, to: str) -> None:
        async with free:
            await obstore.copy_async(store, from_, to)

    await asyncio.gather(*(one(*pair) for pair in pairs))


async def _remove(store: Store, paths: list[str]) -> None:
    import asyncio

    import obstore

    free = asyncio.Semaphore(_AT_ONCE)

    async def one(path: str) -> None:
        async with free:
            try:
                await obstore.delete_async(store, path)
            except FileNotFoundError:
                return

    try:
        await obstore.delete_async(store, paths)
    except FileNotFoundError:
        # Google tells of it, and stops there.
        await asyncio.gather(*(one(path) for path in paths))
