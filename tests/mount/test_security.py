"""Who is trusted: cache directories, certificates, redirects, proxies."""

from __future__ import annotations

import errno
import os
import re
import socket
import socketserver
import ssl
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme

import hubfs
from hubfs.errors import HubfsError
from tests.conftest import Mounted
from tests.hub import Fault, FaultHub
from tests.models import make_archive, make_tree

MODEL = "google/demo/1"
TREE = make_tree(size=1 << 20)
GOOD = make_archive(TREE)


def error_of(read: Callable[[], object]) -> int:
    """The errno with which `read` fails."""
    try:
        read()
    except OSError as error:
        assert error.errno is not None
        return error.errno
    raise AssertionError("it did not fail")


def read_model(mounted: Mounted) -> bytes:
    return (mounted.path / MODEL / "saved_model.pb").read_bytes()


def assert_reads_right(mounted: Mounted) -> None:
    for name, content in TREE.items():
        assert (mounted.path / MODEL / name).read_bytes() == content, name


def why(mounted: Mounted) -> str:
    return os.getxattr(mounted.path / "google/demo", "user.hubfs.error").decode()


class TestCacheDirectory:
    @pytest.fixture
    def cache(self, tmp_path: Path) -> Path:
        path = tmp_path / "somebodys"
        path.mkdir(mode=0o700)
        return path

    def test_is_created_for_its_user_only_whatever_the_umask(
        self, hub: FaultHub, mount, tmp_path: Path
    ) -> None:
        hub.add(MODEL, GOOD)
        old = os.umask(0)
        try:
            mounted = mount(hub, cache_dir=tmp_path / "deep/new/cache")
        finally:
            os.umask(old)
        assert_reads_right(mounted)
        assert stat.S_IMODE(mounted.cache.stat().st_mode) == 0o700

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
    def test_of_another_user_is_refused_unless_trusted(self, hub: FaultHub, mount, cache: Path) -> None:
        os.chown(cache, 12345, -1)
        hub.add(MODEL, GOOD)
        with pytest.raises(HubfsError, match=r"belongs to another user \(uid 12345\).*trust_cache_dir"):
            mount(hub, cache_dir=cache)
        assert os.listdir(cache) == []
        assert_reads_right(mount(hub, cache_dir=cache, trust_cache_dir=True))

    @pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
    def test_that_everybody_may_write_is_refused_unless_trusted(
        self, hub: FaultHub, mount, cache: Path, mode: int
    ) -> None:
        cache.chmod(mode)
        hub.add(MODEL, GOOD)
        with pytest.raises(HubfsError, match=r"written by everybody.*trust_cache_dir"):
            mount(hub, cache_dir=cache)
        assert os.listdir(cache) == []
        assert_reads_right(mount(hub, cache_dir=cache, trust_cache_dir=True))

    @pytest.mark.logs("written by everybody")
    def test_that_becomes_writable_for_everybody_takes_no_model(
        self, hub: FaultHub, mount, cache: Path
    ) -> None:
        hub.add(MODEL, GOOD)
        mounted = mount(hub, cache_dir=cache)
        cache.chmod(0o777)
        assert error_of(lambda: read_model(mounted)) == errno.EIO
        assert "written by everybody" in why(mounted)
        assert os.listdir(cache) == []

    def test_that_is_a_file_is_refused(self, hub: FaultHub, mount, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(HubfsError, match="file"):
            mount(hub, cache_dir=tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"

    def test_link_in_a_cached_model_is_not_followed(self, hub: FaultHub, mount, tmp_path: Path) -> None:
        """Somebody who can write in the cache cannot make the mount read what its user may read."""
        hub.add(MODEL, GOOD)
        directory = Path(hubfs.resolve(MODEL, hub=hub.url, cache_dir=str(tmp_path / "cache")))
        secret = tmp_path / "secret"
        secret.write_bytes(b"s" * len(TREE["fingerprint.pb"]))
        (directory / "fingerprint.pb").unlink()
        (directory / "fingerprint.pb").symlink_to(secret)
        assert (mount(hub).path / MODEL / "fingerprint.pb").read_bytes() == TREE["fingerprint.pb"]


class TestRedirects:
    @pytest.mark.logs(MODEL)
    @pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
    def test_to_what_is_not_the_web_are_refused(self, hub: FaultHub, mount, target: str) -> None:
        hub.add_redirect(MODEL, target)
        mounted = mount(hub)
        assert error_of(lambda: read_model(mounted)) == errno.ENOENT
        assert [request.kind for request in hub.log] == ["listing", "probe"]


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trustme.CA:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)  # the machine's own
    found = trustme.CA()
    found.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return found


@pytest.fixture
def tls_hub(authority: trustme.CA) -> Iterator[FaultHub]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with FaultHub(tls=context) as server:
        server.add(MODEL, GOOD)
        yield server


class TestTls:
    def test_authority_of_ssl_cert_file_is_trusted(
        self, tls_hub: FaultHub, mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        tls_hub.fault(MODEL, Fault.cut(300_000))
        assert_reads_right(mount(tls_hub))

    @pytest.mark.logs(MODEL)
    def test_unknown_authority_is_a_clear_error(
        self, tls_hub: FaultHub, mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trustme.CA().cert_pem.write_to_path(str(tmp_path / "wrong.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "wrong.pem"))
        mounted = mount(tls_hub)
        assert error_of(lambda: read_model(mounted)) == errno.EIO
        assert re.search("certificate", why(mounted), re.IGNORECASE)
        assert tls_hub.log == []

    def test_tensorflow_hubs_variable_turns_the_check_off(
        self, tls_hub: FaultHub, mount, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TFHUB_DISABLE_CERT_VALIDATION", "true")
        assert_reads_right(mount(tls_hub))

    @pytest.mark.logs(MODEL)
    def test_redirect_to_plain_http_is_refused(
        self, tls_hub: FaultHub, hub: FaultHub, mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        hub.add(MODEL, GOOD)
        tls_hub.add_redirect(MODEL, f"{hub.url}/{MODEL}?tf-hub-format=compressed")
        mounted = mount(tls_hub)
        assert error_of(lambda: read_model(mounted)) == errno.ENOENT
        assert hub.log == []
        assert "https to http" in why(mounted)


class Proxy(socketserver.ThreadingTCPServer):
    """An HTTP proxy on loopback: CONNECT, and absolute URLs, one request a connection."""

    daemon_threads = False

    def __init__(self) -> None:
        self.requests: list[str] = []
        super().__init__(("127.0.0.1", 0), _ProxyHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _ProxyHandler(socketserver.StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        method, target, _ = self.rfile.readline().decode().split()
        self.server.requests.append(f"{method} {target}")
        headers = []
        while (line := self.rfile.readline()) not in (b"\r\n", b""):
            headers.append(line)
        address = target if method == "CONNECT" else urlsplit(target).netloc
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port))) as upstream:
            if method == "CONNECT":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            else:
                path = target.split(address, 1)[1]
                kept = [line for line in headers if not line.lower().startswith(b"connection:")]
                head = [f"{method} {path} HTTP/1.1\r\n".encode(), *kept, b"Connection: close\r\n\r\n"]
                upstream.sendall(b"".join(head))
            back = threading.Thread(target=_copy, args=(upstream, self.connection))
            back.start()
            _copy(self.connection, upstream)
            back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class TestProxy:
    def test_of_the_environment_is_used_for_http(
        self, hub: FaultHub, proxy: Proxy, mount, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        hub.add(MODEL, GOOD)
        assert_reads_right(mount(hub))
        assert len(proxy.requests) == len(hub.log) == 3
        assert all(request.startswith(f"GET {hub.url}/{MODEL}?") for request in proxy.requests)

    def test_of_the_environment_is_used_for_https(
        self, tls_hub: FaultHub, proxy: Proxy, mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("https_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert_reads_right(mount(tls_hub))
        assert set(proxy.requests) == {f"CONNECT {tls_hub.host}"}

    def test_is_not_used_for_hosts_that_the_environment_excepts(
        self, hub: FaultHub, proxy: Proxy, mount, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        hub.add(MODEL, GOOD)
        assert_reads_right(mount(hub))
        assert proxy.requests == []
