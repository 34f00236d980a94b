"""The benchmark's own hub: it answers as others do, and counts what it sends."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import obstore
import pytest
import requests
from obstore.exceptions import PreconditionError
from obstore.store import GCSStore

from scripts.bench.models import Archive, Model, checksums
from scripts.bench.server import BUCKET, LOOPBACK, Counts, Link, counts, serving
from tests.google import led_to
from tests.models import make_archive, make_tree, write_tree

TREE = make_tree(size=3_000_000)
DATA = "variables/variables.data-00000-of-00001"
HANDLE = "bench/small/1"


@pytest.fixture
def model(tmp_path: Path) -> Model:
    archive = tmp_path / "archive.tar.gz"
    archive.write_bytes(content := make_archive(TREE))
    md5, crc32c = hashlib.md5(content).digest(), google_crc32c.value(content).to_bytes(4, "big")
    declared = (base64.b64encode(md5).decode(), base64.b64encode(crc32c).decode())
    size = sum(map(len, TREE.values()))
    return Model(HANDLE, write_tree(TREE, tmp_path / "tree"), Archive(archive, len(content), *declared), size)


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    return tmp_path / "ca.pem"


@pytest.fixture
def url(model: Model, authority: Path) -> Iterator[str]:
    archives = {HANDLE: model.archive}
    with serving(archives, LOOPBACK, trees=[model], bucket=[model], authority=authority) as url:
        yield url


def get(url: str, **headers: str) -> requests.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.get(url, headers=named, timeout=20, allow_redirects=False)


def test_archive_and_its_parts(url: str, model: Model) -> None:
    content = model.archive.path.read_bytes()
    whole = get(f"{url}/{HANDLE}?tf-hub-format=compressed")
    assert (whole.status_code, whole.content) == (200, content)
    part = get(f"{url}/{HANDLE}", Range="bytes=100-199", If_Range=whole.headers["ETag"])
    assert (part.status_code, part.content) == (206, content[100:200])
    assert get(f"{url}/bench/nothing/1?tf-hub-format=compressed").status_code == 404


def test_uncompressed_leads_to_the_bucket(url: str) -> None:
    answer = get(f"{url}/{HANDLE}?tf-hub-format=uncompressed")
    assert (answer.status_code, answer.text) == (303, f"gs://{BUCKET}/{HANDLE}")
    assert answer.headers["X-Hubfs-Storage"] == "/"


def test_uncompressed_is_not_offered_without_a_bucket(model: Model) -> None:
    with serving({HANDLE: model.archive}, LOOPBACK) as url:
        assert get(f"{url}/{HANDLE}?tf-hub-format=uncompressed").status_code == 404
        assert get(f"{url}/{HANDLE}?tf-hub-format=compressed").status_code == 200


def test_obstore_reads_the_bucket(url: str, model: Model) -> None:
    options = {"allow_http": True}
    store = GCSStore(BUCKET, base_url=url, skip_signature=True, client_options=options)
    found = {meta["path"]: meta for page in obstore.list(store, HANDLE) for meta in page}
    assert {path: meta["e_tag"] for path, meta in found.items()} == {
        f"{HANDLE}/{name}": f'"{md5}"' for name, md5 in checksums(model).items()
    }
    for name, content in TREE.items():
        key = f"{HANDLE}/{name}"
        answer = obstore.get(store, key, options={"if_match": found[key]["e_tag"]})
        assert bytes(answer.bytes()) == content
    data = f"{HANDLE}/{DATA}"
    assert bytes(obstore.get_range(store, data, start=5, end=2_000_005)) == TREE[DATA][5:2_000_005]
    with pytest.raises(PreconditionError):
        obstore.get(store, data, options={"if_match": '"another"'})


def test_the_same_through_the_proxy(url: str, authority: Path) -> None:
    environment = led_to(url, authority)
    answer = requests.get(
        f"https://storage.googleapis.com/{BUCKET}/{HANDLE}/{DATA}",
        proxies={"https": environment["https_proxy"]},
        verify=environment["CURL_CA_BUNDLE"],
        headers={"Range": "bytes=7-2999999"},
        timeout=20,
    )
    assert (answer.status_code, answer.content) == (206, TREE[DATA][7:])


def test_files_below_handles(url: str) -> None:
    page = get(f"{url}/files/{HANDLE}/variables/").text
    assert '<a href="variables.index">' in page
    assert get(f"{url}/files/{HANDLE}/{DATA}").content == TREE[DATA]
    assert get(f"{url}/files/{HANDLE}/nothing").status_code == 404


def test_counts_tell_what_was_sent(url: str) -> None:
    assert counts(url) == Counts(0, 0)
    get(f"{url}/{BUCKET}/{HANDLE}/{DATA}", Range="bytes=0-999999")
    before = counts(url)
    assert before == Counts(1, 1_000_000)
    get(f"{url}/{BUCKET}/{HANDLE}/saved_model.pb")
    assert counts(url).since(before) == Counts(1, len(TREE["saved_model.pb"]))


def test_a_limited_line_brings_the_same_bytes(model: Model, authority: Path) -> None:
    with serving({}, Link("limited", 1e9, 0.001), bucket=[model], authority=authority) as url:
        assert get(f"{url}/{BUCKET}/{HANDLE}/{DATA}").content == TREE[DATA]
        https = f"https://storage.googleapis.com/{BUCKET}/{HANDLE}/{DATA}"
        answer = requests.get(https, proxies={"https": url}, verify=str(authority), timeout=20)
        assert answer.content == TREE[DATA]
