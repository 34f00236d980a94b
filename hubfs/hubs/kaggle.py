"""Kaggle Models (PROTOCOLS §3): versions, paged listings, files by range, archives.

Kaggle is asked by the REST form of its API, which takes plain GETs:
`<endpoint>/api/v1/models/<owner>/<model>/<framework>/<variation>/…`. The bytes come from a storage service,
to which it redirects with a signed URL.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

from hubfs.config import LoadFormat
from hubfs.errors import ConfigError, NotFoundError, ProtocolError
from hubfs.hubs.archive_url import probe
from hubfs.hubs.base import Listing, Origin, RemoteFile
from hubfs.hubs.found import Found
from hubfs.hubs.kaggle_login import Credentials, find_credentials
from hubfs.hubs.url_files import Body, UrlFiles, advising
from hubfs.kaggle_handle import KaggleModel, is_kaggle, parse
from hubfs.net import Net

if TYPE_CHECKING:
    from hubfs.config import Settings

_log = logging.getLogger(__name__)

#: Files of one page. The most that Kaggle gives; with fewer it is asked more often.
_PAGE = 200
#: Bytes of one JSON answer at most: a page has some 150 bytes a file.
_MAX_JSON = 4 << 20
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def endpoint(environ: Mapping[str, str]) -> str:
    """Where Kaggle's API is: `KAGGLE_API_ENDPOINT`, or kagglesdk's test server if that is what it is set to.

    Raises:
        ConfigError: the variable has no address in it.
    """
    url = environ.get("KAGGLE_API_ENDPOINT", "").rstrip("/")
    if not url:
        test = environ.get("KAGGLE_API_ENVIRONMENT") == "TEST"
        return "http://localhost:7777" if test else "https://www.kaggle.com"
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url):
        raise ConfigError("KAGGLE_API_ENDPOINT is not the address of a server")
    return url.removesuffix("/api/v1")


class Kaggle:
    """The hub. Any framework's models, TensorFlow's or not."""

    def __init__(self, net: Net, settings: Settings) -> None:
        self._net = net
        self._settings = settings
        self._api = f"{endpoint(os.environ)}/api/v1/models/"
        # Not over a line on which others can read them.
        if self._api.startswith("https:") or urlsplit(self._api).hostname in _LOOPBACK:
            net.authorize(self._api, lambda: _headers(find_credentials(os.environ)))

    def supports(self, handle: str) -> bool:
        return is_kaggle(handle)

    def locate(self, handle: str, load_format: LoadFormat = LoadFormat.AUTO) -> Origin:
        """The version's files, or under `COMPRESSED` and where Kaggle does not list them its archive.

        Raises:
            HubfsError: there is no such version, or Kaggle does not give it.
        """
        model = parse(handle)
        with helpful(model):
            if model.version is None:
                model = self._latest(handle, model)
            if load_format is not LoadFormat.COMPRESSED:
                try:
                    return self._listing(handle, model)
                except (NotFoundError, ProtocolError) as error:
                    if load_format is LoadFormat.UNCOMPRESSED:
                        raise
                    _log.info("%s; its archive is asked for", error.message)
            return probe(self._net, handle, f"{self._api}{model}/download")

    def _latest(self, handle: str, model: KaggleModel) -> KaggleModel:
        number = self._json(f"{self._api}{model}/get", handle).get("versionNumber")
        if type(number) is not int or number < 1:
            raise ProtocolError(f"{handle}: Kaggle does not say which version is the latest")
        return dataclasses.replace(model, version=number)

    def _listing(self, handle: str, model: KaggleModel) -> Listing:
        found = Found(f"{handle}: Kaggle", self._settings)
        for entry in self._pages(handle, model):
            name, size = entry.get("name"), entry.get("size", 0)
            mtime = parse_time(entry.get("creationDate"))
            if type(size) is not int or size < 0:
                raise ProtocolError(f"{handle}: Kaggle lists a file without its size: {str(name)[:200]!r}")
            address = f"{self._api}{model}/download/{quote(str(name), errors='replace')}"
            found.add(name, RemoteFile(address, size, mtime))
        if not found.files:
            raise ProtocolError(f"{handle}: Kaggle lists no files")
        source = UrlFiles(self._net, self._settings, functools.partial(helpful, model))
        return Listing(handle, found.files, source, model.handle)

    def _pages(self, handle: str, model: KaggleModel) -> Iterator[dict[str, Any]]:
        """The entries of the listing, page after page."""
        token, seen = "", {""}
        while True:
            query = urlencode({"page_size": _PAGE, **({"page_token": token} if token else {})})
            answer = self._json(f"{self._api}{model}/files?{query}", handle)
            entries, token = answer.get("files", []), answer.get("nextPageToken") or ""
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise ProtocolError(f"{handle}: Kaggle's listing is not one of files")
            # Else a server that errs, or lies, would keep this going for ever.
            if token and (not isinstance(token, str) or token in seen or not entries):
                raise ProtocolError(f"{handle}: Kaggle's listing does not come to an end")
            yield from entries
            if not token:
                return
            seen.add(token)

    def _json(self, url: str, handle: str) -> dict[str, Any]:
        with self._net.get(url, handle, {"Accept": "application/json"}) as response:
            body = Body(response, handle, threading.Event(), self._settings.stall_timeout).take(_MAX_JSON)
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise ProtocolError(f"{handle}: Kaggle's answer is not what its API gives")
        return answer


def helpful(model: KaggleModel) -> AbstractContextManager[None]:
    """Say what to do where Kaggle refuses: it answers so for a missing licence, login and model alike."""
    return advising(functools.partial(_advice, model))


def _advice(model: KaggleModel) -> str:
    page = dataclasses.replace(model, version=None).handle
    login = find_credentials(os.environ)
    if login is None:
        hint = (
            f"log in: put a token from https://www.kaggle.com/settings into KAGGLE_API_TOKEN or "
            f"~/.kaggle/access_token, and accept the model's licence at {page} if it has one"
        )
    else:
        hint = (
            f"accept the model's licence at {page} as the user of {login.where}; if that was done, make "
            f"a new token at https://www.kaggle.com/settings"
        )
    return f"{hint}; or there is no such model"


def parse_time(text: object) -> int:
    """Epoch seconds of a time as Kaggle's JSON has it (`2024-02-21T09:30:00.1234567Z`), 0 without one."""
    match = re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", text) if isinstance(text, str) else None
    try:
        return int(datetime.fromisoformat(match[0]).replace(tzinfo=timezone.utc).timestamp()) if match else 0
    except ValueError:
        return 0


def _headers(login: Credentials | None) -> Mapping[str, str]:
    return {} if login is None else {"Authorization": login.header}
