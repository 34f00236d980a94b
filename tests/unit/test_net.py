"""The policy of every request: redirects, errors in the hub's words, pauses, certificates, secrets."""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme
from hypothesis import example, given
from hypothesis import strategies as st

from hubfs import net as net_module
from hubfs.config import Settings
from hubfs.errors import (
    AccessError,
    HubfsError,
    NotFoundError,
    OfflineError,
    ProtocolError,
    RefusedError,
    StoppedError,
    UnavailableError,
)
from hubfs.net import MAX_PAUSE, MAX_REDIRECTS, Call, Net, Route, parse_retry_after
from tests.hub import Fault, FaultHub

PATH = "google/m/1"
BODY = b"an archive's bytes" * 100
HANDLE = "https://tfhub.dev/google/m/1"
MakeNet = Callable[..., Net]
MakeTlsHub = Callable[[], FaultHub]
CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")


@pytest.fixture(autouse=True)
def no_ca_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CA_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def make_net() -> Iterator[MakeNet]:
    made: list[Net] = []

    def make(**settings: object) -> Net:
        flags = {"connect_timeout": 5.0, "stall_timeout": 5.0, "retry_delay": 0.01, **settings}
        made.append(Net(Settings.load(flags, {}, Path("/dev/null"))))
        return made[-1]

    yield make
    for net in made:
        net.close()


@pytest.fixture
def net(make_net: MakeNet) -> Net:
    return make_net()


@pytest.fixture
def make_tls_hub(tmp_path: Path) -> Iterator[MakeTlsHub]:
    """Hubs whose authority is in `tmp_path/ca.pem`."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    made: list[FaultHub] = []

    def make() -> FaultHub:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        made.append(FaultHub(tls=context))
        made[-1].add(PATH, BODY)
        return made[-1]

    yield make
    for hub in made:
        hub.close()


def url(hub: FaultHub, path: str = PATH) -> str:
    return f"{hub.url}/{path}?tf-hub-format=compressed"


def fetch(net: Net, address: str | Route) -> bytes:
    with net.get(address, HANDLE) as response:
        return bytes(response.raw.read())


def error_of(net: Net, address: str | Route) -> HubfsError:
    with pytest.raises(HubfsError) as caught:
        fetch(net, address)
    return caught.value


# ---- redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["{hub}/store/x.tar.gz", "/store/x.tar.gz", "../../../store/x.tar.gz"])
def test_redirect_is_followed(hub: FaultHub, net: Net, status: int, location: str) -> None:
    hub.add("store/x.tar.gz", BODY)
    hub.add_redirect("google/m/a/1", location.format(hub=hub.url), status)
    assert fetch(net, url(hub, "google/m/a/1")) == BODY


def test_relative_redirect_is_taken_against_the_hop_before(hub: FaultHub, net: Net) -> None:
    with FaultHub() as store:
        store.add("b/x.tar.gz", BODY)
        store.add_redirect("a/x.tar.gz", "../b/x.tar.gz")
        hub.add_redirect(PATH, f"{store.url}/a/x.tar.gz")
        assert fetch(net, url(hub)) == BODY


def test_headers_of_the_request_reach_the_last_hop(hub: FaultHub, net: Net) -> None:
    hub.add("store/x.tar.gz", BODY)
    hub.add_redirect(PATH, "/store/x.tar.gz")
    with net.get(url(hub), HANDLE, {"Range": "bytes=5-9"}) as response:
        assert response.status_code == 206
        assert response.raw.read() == BODY[5:10]


def test_redirects_afresh_for_each_request(hub: FaultHub, net: Net) -> None:
    for number in range(2):
        hub.add(f"signed{number}.tar.gz", BODY + bytes([number]))
        hub.add_redirect(PATH, f"/signed{number}.tar.gz")
        assert fetch(net, url(hub)) == BODY + bytes([number])


def test_route_follows_redirects_once(hub: FaultHub, net: Net) -> None:
    hub.add("store/x.tar.gz", BODY)
    hub.add_redirect(PATH, "/step")
    hub.add_redirect("step", "/store/x.tar.gz?signature=1")
    route = Route(url(hub))
    assert [fetch(net, route) for _ in range(3)] == [BODY] * 3
    assert [request.path for request in hub.log] == [PATH, "step", *["store/x.tar.gz"] * 3]
    assert route.final == f"{hub.url}/store/x.tar.gz?signature=1"


def test_route_without_redirects_asks_only_once(hub: FaultHub, net: Net) -> None:
    route = Route(url(hub))
    hub.add(PATH, BODY)
    assert fetch(net, route) == BODY
    hub.fault(PATH, Fault.status(403))
    assert isinstance(error_of(net, route), AccessError)
    assert len(hub.log) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_route_is_followed_afresh_when_it_gives_nothing_any_more(
    hub: FaultHub, net: Net, status: int
) -> None:
    for number in (1, 2):
        hub.add(f"signed{number}.tar.gz", BODY + bytes([number]))
    hub.add_redirect(PATH, "/signed1.tar.gz")
    route = Route(url(hub))
    fetch(net, route)
    hub.fault("signed1.tar.gz", Fault.status(status))
    hub.add_redirect(PATH, "/signed2.tar.gz")
    assert fetch(net, route) == BODY + b"\2"
    assert route.final == f"{hub.url}/signed2.tar.gz"


@pytest.mark.parametrize("fault", [Fault.status(503, headers={"Retry-After": "7"}), Fault.hang_up()])
def test_route_is_forgotten_after_a_failure_that_may_pass(hub: FaultHub, net: Net, fault: Fault) -> None:
    hub.add("store/x.tar.gz", BODY)
    hub.add_redirect(PATH, "/store/x.tar.gz")
    route = Route(url(hub))
    fetch(net, route)
    hub.fault("store/x.tar.gz", fault)
    error = error_of(net, route)
    assert isinstance(error, UnavailableError)
    assert error.retry_after == (7.0 if fault.kind == "status" else None)
    assert route.final is None
    assert fetch(net, route) == BODY
    assert len(hub.requests(PATH)) == 2


def test_route_is_forgotten_if_its_body_breaks(hub: FaultHub, net: Net) -> None:
    hub.add("store/x.tar.gz", BODY)
    hub.add_redirect(PATH, "/store/x.tar.gz")
    route = Route(url(hub))
    with pytest.raises(UnavailableError), net.get(route, HANDLE):
        assert route.final
        raise UnavailableError("the body broke")
    assert route.final is None


def test_route_from_a_public_hub_never_leads_into_a_private_network(hub: FaultHub, net: Net) -> None:
    """Not even if the name that a redirect led to has got another address since."""
    hub.add(PATH, BODY)
    route = Route("https://8.8.8.8/a")
    route.final = url(hub)
    assert isinstance(error_of(net, route), RefusedError)
    assert hub.requests() == []


def test_redirect_loop_ends(hub: FaultHub, net: Net) -> None:
    hub.add_redirect(PATH, url(hub))
    assert isinstance(error_of(net, url(hub)), ProtocolError)
    assert len(hub.requests()) == MAX_REDIRECTS


def test_redirect_without_a_target_is_the_hubs_mistake(hub: FaultHub, net: Net) -> None:
    hub.fault(PATH, Fault.status(302))
    assert isinstance(error_of(net, url(hub)), ProtocolError)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "https://", "gs://bucket/x"])
def test_redirect_to_no_web_address_is_refused(hub: FaultHub, net: Net, target: str) -> None:
    hub.add_redirect(PATH, target)
    assert isinstance(error_of(net, url(hub)), RefusedError)


@pytest.mark.parametrize(
    "target", ["http://[::1", "http://127.0.0.1:99999/x", "http://127.0.0.1:x/", "http://a b/"]
)
def test_redirect_to_an_impossible_address_is_an_error_of_ours(hub: FaultHub, net: Net, target: str) -> None:
    hub.add_redirect(PATH, target)
    assert error_of(net, url(hub)).errno


def test_redirect_from_https_to_http_is_refused(
    hub: FaultHub, make_tls_hub: MakeTlsHub, net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    secure = make_tls_hub()
    hub.add("x.tar.gz", BODY)
    secure.add_redirect(PATH, f"{hub.url}/x.tar.gz")
    error = error_of(net, url(secure))
    assert isinstance(error, RefusedError)
    assert "https to http" in str(error)
    assert hub.requests() == []


def test_redirect_from_http_to_https_is_followed(
    hub: FaultHub, make_tls_hub: MakeTlsHub, net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    hub.add_redirect(PATH, url(make_tls_hub()))
    assert fetch(net, url(hub)) == BODY


# No packet goes to any of these: the check is made before one is sent.
@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "127.1", "2130706433", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1",
        "169.254.169.254", "100.64.0.1", "[::1]", "[fe80::1]", "[fd00::1]", "[::ffff:127.0.0.1]",
        "[::ffff:10.0.0.1]",
        "[::]", "255.255.255.255",
    ],
)  # fmt: skip
def test_redirect_from_a_public_hub_into_a_private_network_is_refused(net: Net, host: str) -> None:
    with pytest.raises(RefusedError, match="private network"):
        net._check_redirect("https://8.8.8.8/a", f"https://{host}/b", HANDLE, start_is_public=True)


@pytest.mark.parametrize("host", ["8.8.4.4", "[2001:4860:4860::8844]"])
def test_redirect_from_a_public_hub_to_a_public_host_is_followed(net: Net, host: str) -> None:
    net._check_redirect("https://8.8.8.8/a", f"https://{host}/b", HANDLE, start_is_public=True)


def test_redirect_within_a_private_network_is_followed(net: Net) -> None:
    net._check_redirect("http://10.0.0.1/a", "http://10.0.0.2/b", HANDLE, start_is_public=False)


def test_host_without_an_address_counts_as_public() -> None:
    # A proxy may know it; what is not known must not open the private network.
    assert net_module._is_public("no-such-host.invalid")
    assert not net_module._is_public("127.0.0.1")


# ---- secrets


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_credentials_in_a_redirect_are_not_shown(hub: FaultHub, net: Net, scheme: str) -> None:
    hub.add_redirect(PATH, f"{scheme}://user:s3cret@127.0.0.1:1/x.tar.gz?token=hush")
    error = error_of(net, url(hub))
    assert "127.0.0.1:1" in str(error)
    assert "s3cret" not in str(error)
    assert "hush" not in str(error)


def test_credentials_in_a_refused_redirect_are_not_shown(hub: FaultHub, net: Net) -> None:
    hub.add_redirect(PATH, "ftp://user:s3cret@127.0.0.1/x")
    assert "s3cret" not in str(error_of(net, url(hub)))


def test_cookies_are_not_kept(hub: FaultHub, net: Net) -> None:
    hub.add(PATH, BODY)
    hub.fault(PATH, Fault.status(200, b"x", {"Set-Cookie": "id=1; Path=/"}))
    hub.fault("other.tar.gz", Fault.status(302, headers={"Location": url(hub), "Set-Cookie": "id=2; Path=/"}))
    fetch(net, url(hub))
    fetch(net, url(hub, "other.tar.gz"))
    assert len(hub.requests()) == 3
    assert not any("cookie" in request.headers for request in hub.requests())


def test_request_says_who_asks_and_takes_bytes_as_they_are(hub: FaultHub, net: Net) -> None:
    hub.add(PATH, BODY)
    fetch(net, url(hub))
    [request] = hub.requests()
    assert request.headers["user-agent"].startswith("hubfs/")
    assert request.headers["accept-encoding"] == "identity"
    assert "authorization" not in request.headers


# ---- errors


@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, NotFoundError), (403, AccessError), (503, UnavailableError), (400, ProtocolError)],
)
def test_status_becomes_an_error(hub: FaultHub, net: Net, status: int, kind: type[HubfsError]) -> None:
    hub.fault(PATH, Fault.status(status))
    error = error_of(net, url(hub))
    assert type(error) is kind
    assert HANDLE in error.message


def test_hubs_own_words_are_shown_without_markup(hub: FaultHub, net: Net) -> None:
    page = (
        b"<!DOCTYPE html><html><head><style>p { color: red }</style><script>var a = '<b>';</script></head>"
        b"<body><h1>Signature\r\nDoesNotMatch</h1>\t<p>The request\x1b[31m signature</p></body></html>"
    )
    hub.fault(PATH, Fault.status(403, page, {"Content-Type": "text/html"}))
    text = str(error_of(net, url(hub)))
    assert "Signature DoesNotMatch The request [31m signature" in text
    assert "color" not in text
    assert "var a" not in text
    assert text.isprintable()


def test_hubs_own_words_are_cut(hub: FaultHub, net: Net) -> None:
    hub.fault(PATH, Fault.status(403, b"word " * 100_000))
    assert len(str(error_of(net, url(hub)))) < 500


def test_words_that_never_end_hold_nobody_up(hub: FaultHub, make_net: MakeNet) -> None:
    headers = {"Content-Length": "1000", "Content-Type": "text/plain"}
    hub.fault(PATH, Fault.status(403, b"refused", headers))
    assert isinstance(error_of(make_net(stall_timeout=0.2), url(hub)), AccessError)


def test_retry_after_is_passed_on(hub: FaultHub, net: Net) -> None:
    hub.fault(PATH, Fault.status(429, headers={"Retry-After": "17"}))
    error = error_of(net, url(hub))
    assert isinstance(error, UnavailableError)
    assert error.retry_after == 17.0


def test_offline_sends_nothing(hub: FaultHub, make_net: MakeNet) -> None:
    hub.add(PATH, BODY)
    assert isinstance(error_of(make_net(offline=True), url(hub)), OfflineError)
    assert hub.requests() == []


def test_refused_connection_is_told_in_plain_words(net: Net) -> None:
    error = error_of(net, "http://127.0.0.1:1/google/m/1")
    assert isinstance(error, UnavailableError)
    assert "127.0.0.1:1" in error.message
    assert "Connection refused" in error.message
    assert "object at 0x" not in error.message
    assert error.hint


def test_hub_that_hangs_up_is_unavailable(hub: FaultHub, net: Net) -> None:
    hub.fault(PATH, Fault.hang_up())
    assert isinstance(error_of(net, url(hub)), UnavailableError)


def test_hub_that_says_nothing_is_given_up(hub: FaultHub, make_net: MakeNet) -> None:
    never = threading.Event()
    hub.fault(PATH, Fault.hang(never))
    error = error_of(make_net(stall_timeout=0.2), url(hub))
    never.set()
    assert isinstance(error, UnavailableError)
    assert "0.2 s" in error.message


def test_answer_416_is_an_answer(hub: FaultHub, net: Net) -> None:
    hub.add(PATH, BODY)
    with net.get(url(hub), HANDLE, {"Range": f"bytes={len(BODY)}-"}) as response:
        assert response.status_code == 416


# ---- calls that another thread ends


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("when", ["before", "without an answer", "in the body"])
def test_call_can_be_ended(
    hub: FaultHub, make_tls_hub: MakeTlsHub, make_net: MakeNet, tls: bool, when: str
) -> None:
    net, never, call = make_net(stall_timeout=30.0, verify_certificates=False), threading.Event(), Call()
    used = make_tls_hub() if tls else hub
    used.add(PATH, BODY)
    used.fault(PATH, Fault.stall(10, never) if when == "in the body" else Fault.hang(never))
    if when == "before":
        call.end()
    got: list[bytes] = []
    ended: list[BaseException] = []

    def run() -> None:
        try:
            with net.get(url(used), HANDLE, call=call) as response:
                while chunk := response.raw.read1(1000, decode_content=False):
                    got.append(chunk)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        if when != "before":
            used.wait_for(
                lambda hub: hub.log and hub.log[0].bytes_sent == (10 if when == "in the body" else 0)
            )
        call.end()
        thread.join(10)
        assert not thread.is_alive()
        # Whatever is given after that, nobody takes it for the whole; never what was sent encrypted.
        assert BODY.startswith(b"".join(got))
        assert ended or b"".join(got) != BODY
    finally:
        never.set()
        thread.join(20)


def test_call_that_is_over_does_not_end_the_next_one(hub: FaultHub, net: Net) -> None:
    hub.add(PATH, BODY)
    call = Call()
    with net.get(url(hub), HANDLE, call=call) as response:
        response.raw.read()
    go_on = threading.Event()
    hub.fault(PATH, Fault.stall(10, go_on))
    with net.get(url(hub), HANDLE) as response:
        call.end()
        go_on.set()
        assert response.raw.read() == BODY
    assert hub.busiest == 1, "it was the same connection"


# ---- certificates


def test_certificate_of_an_unknown_authority_is_refused(make_tls_hub: MakeTlsHub, net: Net) -> None:
    hub = make_tls_hub()
    error = error_of(net, url(hub))
    assert isinstance(error, ProtocolError)
    assert "SSL_CERT_FILE" in error.hint
    assert hub.requests() == []


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"])
def test_authority_is_taken_from_the_environment(
    make_tls_hub: MakeTlsHub, net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, str(tmp_path / "ca.pem"))
    assert fetch(net, url(make_tls_hub())) == BODY


def test_variable_that_names_no_file_is_passed_over(
    make_tls_hub: MakeTlsHub, net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CURL_CA_BUNDLE", str(tmp_path / "none.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    assert fetch(net, url(make_tls_hub())) == BODY


def test_certificate_check_can_be_turned_off(make_tls_hub: MakeTlsHub, make_net: MakeNet) -> None:
    assert fetch(make_net(verify_certificates=False), url(make_tls_hub())) == BODY


def test_turned_off_check_wins_over_an_authority_in_the_environment(
    make_tls_hub: MakeTlsHub, make_net: MakeNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "other.pem"))
    assert fetch(make_net(verify_certificates=False), url(make_tls_hub())) == BODY


# ---- proxies


def test_proxy_of_the_environment_is_used(hub: FaultHub, net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", hub.url)
    # 192.0.2.1 is a documentation address: only a proxy can answer for it.
    monkeypatch.delenv("no_proxy", raising=False)
    assert isinstance(error_of(net, "http://192.0.2.1/google/m/1"), NotFoundError)
    [request] = hub.requests()
    assert request.headers["host"] == "192.0.2.1"


# ---- pauses


class Clock(threading.Event):
    """Takes no time, and notes how long it would have been."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waited.append(timeout)
        return self.is_set()


def pauses(net: Net, error: HubfsError, attempts: int) -> list[float]:
    clock = Clock()
    for attempt in range(1, attempts + 1):
        net.pause(attempt, error, clock)
    return clock.waited


def test_pause_doubles_around_its_first_length(make_net: MakeNet) -> None:
    waited = pauses(make_net(retry_delay=1.0), UnavailableError("x"), 5)
    for number, seconds in enumerate(waited):
        assert 0.75 * 2**number <= seconds <= 1.25 * 2**number


def test_pause_is_bounded_whatever_the_hub_says(make_net: MakeNet) -> None:
    net = make_net(retry_delay=1.0)
    assert pauses(net, UnavailableError("x", retry_after=1e9), 1) == [MAX_PAUSE]
    assert max(pauses(net, UnavailableError("x"), 100)) == MAX_PAUSE
    assert max(pauses(net, UnavailableError("x"), 2000)) == MAX_PAUSE


def test_pause_lasts_as_long_as_the_hub_asks(make_net: MakeNet) -> None:
    net = make_net(retry_delay=0.01)
    assert pauses(net, UnavailableError("x", retry_after=17.0), 1) == [17.0]
    assert pauses(net, UnavailableError("x", retry_after=0.0), 1)[0] > 0


def test_pause_is_cancelled_at_once(make_net: MakeNet) -> None:
    cancel = threading.Event()
    timer = threading.Timer(0.1, cancel.set)
    timer.start()
    with pytest.raises(StoppedError):
        make_net(retry_delay=60.0).pause(1, UnavailableError("x", retry_after=50.0), cancel)
    timer.join(5)
    assert not timer.is_alive()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, None),
        ("", None),
        ("0", 0.0),
        ("120", 120.0),
        (" 7 ", 7.0),
        ("-5", None),
        ("soon", None),
        ("1.5", None),
        ("\xb2", None),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90.0),
        ("Thu, 01 Jan 1970 00:01:40 -0000", 90.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("Thursday, 01-Jan-70 00:01:40 GMT", 90.0),
        ("Thu, 99 Jan 1970 00:00:00 GMT", None),
    ],
)
def test_retry_after(text: str | None, seconds: float | None) -> None:
    assert parse_retry_after(text, now=10.0) == seconds


@given(st.text(st.characters(max_codepoint=255), max_size=40) | st.text("0123456789²³¹ :,-GMT", max_size=40))
@example("0\x1f")
def test_retry_after_is_never_trouble(text: str) -> None:
    seconds = parse_retry_after(text, now=10.0)
    assert seconds is None or seconds >= 0


def test_connections_are_given_back_after_errors(hub: FaultHub, net: Net) -> None:
    """A hundred refused requests in a row leave no descriptor open."""
    hub.fault(PATH, Fault.status(503, b"busy " * 2000, times=None))
    error_of(net, url(hub))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        error_of(net, url(hub))
    hub.wait_for(lambda hub: all(request.done.is_set() for request in hub.log))
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_credentials_go_to_their_prefix_only(hub: FaultHub, net: Net) -> None:
    with FaultHub() as other:
        hub.add("api/x.tar.gz", b"x")
        other.add("x.tar.gz", b"x")
        hub.add_redirect("api/away.tar.gz", f"{other.url}/x.tar.gz")
        hub.add_redirect("in.tar.gz", f"{hub.url}/api/x.tar.gz")
        net.authorize(f"{hub.url}/api/", lambda: {"Authorization": "Bearer secret"})
        for path in ("api/x.tar.gz", "api/away.tar.gz", "in.tar.gz"):
            with net.get(f"{hub.url}/{path}", "h") as response:
                assert response.raw.read() == b"x"
        sent = [(r.path, r.headers.get("authorization")) for r in hub.requests() + other.requests()]
        assert sent == [
            ("api/x.tar.gz", "Bearer secret"), ("api/away.tar.gz", "Bearer secret"), ("in.tar.gz", None),
            ("api/x.tar.gz", "Bearer secret"), ("x.tar.gz", None),
        ]  # fmt: skip


@pytest.mark.parametrize("prefix", ["https://www.kaggle.com", "https://", "http://127.0.0.1:80"])
def test_credentials_need_a_whole_host(net: Net, prefix: str) -> None:
    with pytest.raises(ValueError, match="another host"):
        net.authorize(prefix, dict)
