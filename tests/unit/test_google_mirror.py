"""Google's mirror in China, which on this machine is a proxy's other end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hubfs.config import LoadFormat, Settings
from hubfs.errors import NotFoundError, ProtocolError, RefusedError
from hubfs.hubs.archive_url import ArchiveUrl
from hubfs.hubs.base import Archive, Hub
from hubfs.hubs.bucket import Buckets
from hubfs.hubs.google_mirror import GoogleMirror
from hubfs.hubs.known import hubs
from hubfs.hubs.tfhub import TfHub
from hubfs.net import Net
from tests.answers import Answer, AnswerServer, Seen, own_authority

HUB, STORAGE = "hub.tensorflow.google.cn", "gcs.tensorflow.google.cn"
URL = f"https://{HUB}/google/m/1"
STORED = "/tfhub-modules/google/m/1.tar.gz"


@pytest.fixture
def china(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AnswerServer]:
    """All of the net beyond the proxy of the environment."""
    tls, certificate = own_authority(tmp_path, HUB, STORAGE)
    with AnswerServer(tls, as_proxy=True) as server:
        monkeypatch.setenv("https_proxy", server.url)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        yield server


@pytest.fixture
def net() -> Iterator[Net]:
    net = Net(Settings())
    yield net
    net.close()


@pytest.mark.parametrize(
    "handle",
    [URL, f"{URL}/", f"{URL}?tf-hub-format=compressed&x=y", f"https://{HUB}:443/google/m/1",
     f"http://{HUB}/google/m/1", "https://Hub.tensorflow.google.cn/google/m/1", f"{URL}.tar.gz"],
)  # fmt: skip
@pytest.mark.parametrize("load_format", [LoadFormat.AUTO, LoadFormat.COMPRESSED])
def test_archive_is_at_its_own_address(
    china: AnswerServer, net: Net, handle: str, load_format: LoadFormat
) -> None:
    china.answers[STORED] = Answer(206, b"a", {"Content-Range": "bytes 0-0/7", "ETag": '"e"'})
    hub = GoogleMirror(net)
    assert hub.supports(handle)
    assert hub.locate(handle, load_format) == Archive(handle, f"https://{STORAGE}{STORED}", 7, '"e"')
    assert china.connects == [f"{STORAGE}:443"]
    assert china.seen == [Seen(STORAGE, STORED, "bytes=0-0")]


def test_what_is_not_there(china: AnswerServer, net: Net) -> None:
    with pytest.raises(NotFoundError, match=URL):
        GoogleMirror(net).locate(URL)
    with pytest.raises(RefusedError):
        GoogleMirror(net).locate(f"https://{HUB}/")
    assert len(china.seen) == 1


def test_files_are_not_to_be_had(china: AnswerServer, net: Net) -> None:
    with pytest.raises(ProtocolError, match="one by one; --load-format auto or compressed"):
        GoogleMirror(net).locate(URL, LoadFormat.UNCOMPRESSED)
    assert china.connects == []


def test_each_handle_has_its_hub(net: Net) -> None:
    settings = Settings()
    known = hubs(net, settings, Buckets(net, settings))

    def kind(handle: str) -> type[Hub]:
        return type(next(hub for hub in known if hub.supports(handle)))

    assert kind(URL) is kind(f"{URL}.tar.gz") is GoogleMirror
    assert kind(f"https://x.{HUB}/google/m/1") is kind("https://tfhub.dev/google/m/1") is TfHub
    assert kind("https://example.org/m.tar.gz") is ArchiveUrl
    assert kind("gs://bucket/m.tar.gz") is kind("s3://bucket/m") is Buckets
