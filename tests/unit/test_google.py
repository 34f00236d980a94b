"""The stand-in for Google's storage, asked by obstore and by hand; by TensorFlow in tests/tensorflow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import obstore
import pytest
import requests
from obstore.exceptions import AlreadyExistsError, PreconditionError
from obstore.store import GCSStore

from tests.google import Google

BUCKET = "bench-models"
#: What a name may have in it and a URL may not.
ODD = ("a b", "100%", "x%20y", "#?&+", "ü", "a*b~", "<&>\"'")


@pytest.fixture
def google() -> Iterator[Google]:
    with Google() as google:
        google.make(BUCKET)
        yield google


def store(google: Google, bucket: str = BUCKET) -> GCSStore:
    # With `skip_signature` alone obstore asks a metadata service for a token before it writes.
    key = {"gcs_base_url": google.url, "disable_oauth": True}
    nobody = {"client_email": "", "private_key": "", "private_key_id": ""}
    return GCSStore(
        bucket,
        service_account_key=json.dumps({**key, **nobody}),
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )


def ask(google: Google, method: str, target: str, **more: Any) -> requests.Response:
    return requests.request(method, google.url + target, timeout=20, allow_redirects=False, **more)


def test_obstore_reads_what_is_there(google: Google) -> None:
    content = bytes(range(256)) * 100
    google.put(BUCKET, "a/b.bin", content)
    found = obstore.head(store(google), "a/b.bin")
    assert (found["size"], found["e_tag"]) == (len(content), f'"{hashlib.md5(content).hexdigest()}"')
    assert (
        bytes(obstore.get(store(google), "a/b.bin", options={"if_match": found["e_tag"]}).bytes()) == content
    )
    assert bytes(obstore.get_range(store(google), "a/b.bin", start=300, end=700)) == content[300:700]
    with pytest.raises(PreconditionError):
        obstore.get(store(google), "a/b.bin", options={"if_match": '"another"'})
    with pytest.raises(FileNotFoundError):
        obstore.get(store(google), "a/c.bin")
    with pytest.raises(FileNotFoundError):
        obstore.get(store(google, "no-such-bucket"), "a/b.bin")


def test_obstore_writes_and_deletes(google: Google) -> None:
    for name in ODD:
        obstore.put(store(google), name, name.encode(), use_multipart=False)
    assert google.tree(BUCKET) == {name: name.encode() for name in ODD}
    listed = [meta["path"] for page in obstore.list(store(google)) for meta in page]
    assert sorted(listed) == sorted(ODD)
    obstore.copy(store(google), "ü", "copied")
    assert google.tree(BUCKET)["copied"] == "ü".encode()
    obstore.delete(store(google), list(ODD))
    assert google.tree(BUCKET) == {"copied": "ü".encode()}


def test_only_one_creates_an_object(google: Google) -> None:
    obstore.put(store(google), "lock", b"first", mode="create")
    with pytest.raises(AlreadyExistsError):
        obstore.put(store(google), "lock", b"second", mode="create")
    assert google.tree(BUCKET) == {"lock": b"first"}


def test_an_object_is_replaced_only_as_it_was_seen(google: Google) -> None:
    seen = obstore.put(store(google), "lease", b"mine")
    obstore.put(store(google), "lease", b"still mine", mode=dict(seen))
    with pytest.raises(PreconditionError):
        obstore.put(store(google), "lease", b"late", mode=dict(seen))
    assert google.tree(BUCKET) == {"lease": b"still mine"}


def test_an_upload_in_parts_is_seen_when_it_is_complete(google: Google) -> None:
    content = b"0123456789" * 1_200_000
    with obstore.open_writer(store(google), "big", buffer_size=5 << 20) as writer:
        writer.write(content)
        assert google.tree(BUCKET) == {}
    assert google.tree(BUCKET) == {"big": content} and google.uploads == []
    assert len(google.seen("PUT")) > 1


def test_listing_has_pages_and_prefixes(google: Google) -> None:
    names = [f"d{i % 3}/{i:04}" for i in range(2500)]
    for name in names:
        google.put(BUCKET, name, b"")
    listed = [meta["path"] for page in obstore.list(store(google), "d1") for meta in page]
    assert sorted(listed) == sorted(name for name in names if name.startswith("d1/"))
    assert obstore.list_with_delimiter(store(google))["common_prefixes"] == ["d0", "d1", "d2"]
    all_names, token = [], ""
    while True:
        answer = ask(google, "GET", f"/storage/v1/b/{BUCKET}/o", params={"pageToken": token}).json()
        all_names += [item["name"] for item in answer["items"]]
        if not (token := answer.get("nextPageToken", "")):
            break
    assert all_names == sorted(names)
    few = ask(google, "GET", f"/storage/v1/b/{BUCKET}/o?prefix=&delimiter=%2F&maxResults=2").json()
    assert few["prefixes"] == ["d0/", "d1/"] and "items" not in few and few["nextPageToken"]


def test_json_objects(google: Google) -> None:
    upload = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name=d%2Fx"
    made = ask(google, "POST", f"{upload}&ifGenerationMatch=0", data=b"hello").json()
    assert ask(google, "POST", f"{upload}&ifGenerationMatch=0", data=b"again").status_code == 412
    found = ask(google, "GET", f"/storage/v1/b/{BUCKET}/o/d%2Fx").json()
    assert (found["name"], found["size"], found["generation"]) == ("d/x", "5", made["generation"])
    assert ask(google, "GET", f"/storage/v1/b/{BUCKET}/o/d%2Fx?alt=media").content == b"hello"
    copied = ask(google, "POST", f"/storage/v1/b/{BUCKET}/o/d%2Fx/rewriteTo/b/{BUCKET}/o/y").json()
    assert copied["done"] and google.tree(BUCKET)["y"] == b"hello"
    assert ask(google, "DELETE", f"/storage/v1/b/{BUCKET}/o/d%2Fx").status_code == 204
    gone = ask(google, "DELETE", f"/storage/v1/b/{BUCKET}/o/d%2Fx")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, 404)


def test_json_upload_continues_where_it_was(google: Google) -> None:
    begin = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&name=x"
    place = ask(google, "POST", begin).headers["Location"].removeprefix(google.url)

    def send(data: bytes, span: str) -> requests.Response:
        return ask(google, "PUT", place, data=data, headers={"Content-Range": f"bytes {span}"})

    assert "Range" not in send(b"", "*/6").headers
    first = send(b"abcd", "0-3/6")
    assert (first.status_code, first.headers["Range"]) == (308, "bytes=0-3")
    assert send(b"", "*/6").headers["Range"] == "bytes=0-3"
    assert send(b"f", "5-5/6").status_code == 400
    assert google.tree(BUCKET) == {}
    assert send(b"ef", "4-5/6").status_code == 200
    assert google.tree(BUCKET) == {"x": b"abcdef"}


def test_proxy_is_google_for_who_trusts_it_and_leads_nowhere_else(google: Google) -> None:
    google.put(BUCKET, "x", b"hello")
    certificate = google.environment["CURL_CA_BUNDLE"]
    with requests.Session() as session:
        session.proxies = {"https": google.url}
        session.verify = certificate
        answer = session.get(f"https://storage.googleapis.com/{BUCKET}/x", timeout=20)
        assert answer.content == b"hello"
        with pytest.raises(requests.exceptions.ProxyError):
            session.get("https://example.org/x", timeout=20)
    with pytest.raises(requests.exceptions.SSLError):
        requests.get("https://storage.googleapis.com/", proxies={"https": google.url}, timeout=20)
    assert [(s.host, s.status) for s in google.seen("CONNECT")] == [
        ("storage.googleapis.com", 200), ("example.org", 403), ("storage.googleapis.com", 200),
    ]  # fmt: skip
