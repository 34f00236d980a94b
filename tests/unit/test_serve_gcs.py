"""The bucket of a local hub, read by a real client of Google Cloud Storage and by hand."""

from __future__ import annotations

import base64
import hashlib
import os
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import google_crc32c
import obstore
import pytest
import requests
from obstore.exceptions import PreconditionError
from obstore.store import GCSStore

from hubfs.errors import ConfigError
from hubfs.serve import LocalHub, RequestRecord
from tests.models import make_tree, write_tree

TREE = make_tree(size=200_000, empty_directory=True)
#: What a key may have in it and a URL may not.
ODD = {f"assets/{name}": name.encode() for name in ("a b", "100%", "x%20y", "#?&+", "ü", "a*b~", "<&>\"'")}
BUCKET = "hubfs-serve"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    for handle in ("google/bert/1", "google/bert/9", "google/bert/10", "google/a/b/c/3"):
        write_tree({**TREE, "name.txt": handle.encode()}, root / handle)
    return root


@pytest.fixture
def records() -> list[RequestRecord]:
    return []


@pytest.fixture
def hub(root: Path, tmp_path: Path, records: list[RequestRecord]) -> Iterator[LocalHub]:
    with LocalHub(root, archive_dir=tmp_path / "archives", on_request=records.append) as hub:
        yield hub


def store(hub: LocalHub, bucket: str = BUCKET) -> GCSStore:
    return GCSStore(
        bucket,
        base_url=hub.url,
        skip_signature=True,
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )


def listed(hub: LocalHub, prefix: str) -> dict[str, Any]:
    return {found["path"]: found for batch in obstore.list(store(hub), prefix) for found in batch}


def files(tree: dict[str, bytes], below: str) -> dict[str, bytes]:
    return {f"{below}/{name}": content for name, content in tree.items() if not name.endswith("/")}


def get(hub: LocalHub, target: str, method: str = "GET", **headers: str) -> requests.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.request(
        method, f"{hub.url}/{BUCKET}{target}", headers=named, timeout=20, allow_redirects=False
    )


def entries(answer: requests.Response, path: str) -> list[str]:
    """The texts at a path of an XML answer."""
    assert answer.headers["Content-Type"].startswith("application/xml")
    space = "{http://doc.s3.amazonaws.com/2006-03-01}" if answer.status_code == 200 else ""
    root = ElementTree.fromstring(answer.content)
    return [e.text or "" for e in root.findall("/".join(space + part for part in path.split("/")))]


def test_uncompressed_leads_to_the_bucket(hub: LocalHub) -> None:
    for asked, meant in [("google/bert/9", "google/bert/9"), ("google/bert", "google/bert/10")]:
        url = f"{hub.url}/{asked}?tf-hub-format=uncompressed"
        answer = requests.get(url, timeout=20, allow_redirects=False)
        assert (answer.status_code, answer.text) == (303, f"gs://{BUCKET}/{meant}")
    nothing = requests.get(f"{hub.url}/google/bert/77?tf-hub-format=uncompressed", timeout=20)
    assert nothing.status_code == 404


def test_client_lists_and_reads_a_version(hub: LocalHub) -> None:
    found = listed(hub, "google/bert/9")
    tree = files({**TREE, "name.txt": b"google/bert/9"}, "google/bert/9")
    assert sorted(found) == sorted(tree)
    for key, content in tree.items():
        assert found[key]["size"] == len(content)
        assert found[key]["e_tag"] == f'"{hashlib.md5(content).hexdigest()}"'
        result = obstore.get(store(hub), key, options={"if_match": found[key]["e_tag"]})
        assert bytes(result.bytes()) == content
        assert result.meta["e_tag"] == found[key]["e_tag"]
        assert result.meta["version"] is not None, "the generation"
        assert result.meta["last_modified"] == found[key]["last_modified"]
    data = "google/bert/9/variables/variables.data-00000-of-00001"
    assert bytes(obstore.get_range(store(hub), data, start=1000, end=1010)) == tree[data][1000:1010]
    assert obstore.head(store(hub), data)["size"] == len(tree[data])


def test_names_that_a_url_cannot_have(hub: LocalHub, root: Path) -> None:
    write_tree({"saved_model.pb": b"x", **ODD}, root / "odd/model/1")
    assert sorted(listed(hub, "odd/model/1/assets")) == sorted(files(ODD, "odd/model/1"))
    for key, content in files(ODD, "odd/model/1").items():
        assert bytes(obstore.get(store(hub), key).bytes()) == content


def test_directories_of_the_bucket(hub: LocalHub) -> None:
    def under(prefix: str | None) -> list[str]:
        found = obstore.list_with_delimiter(store(hub), prefix)
        return [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]

    assert under(None) == ["google"]
    assert under("google/bert") == ["google/bert/1", "google/bert/10", "google/bert/9"]
    assert under("google/bert/9") == [
        "google/bert/9/assets",
        "google/bert/9/variables",
        "google/bert/9/fingerprint.pb",
        "google/bert/9/name.txt",
        "google/bert/9/saved_model.pb",
    ]
    assert under("google/nothing") == []


def test_prefix_is_no_directory(hub: LocalHub) -> None:
    def keys(query: str) -> list[str]:
        return entries(get(hub, f"?list-type=2&{query}"), "Contents/Key")

    assert {key.rpartition("/")[2] for key in keys("prefix=google/bert/1/s")} == {"saved_model.pb"}
    both = {key.split("/")[2] for key in keys("prefix=google/bert/1")}
    assert both == {"1", "10"}
    assert keys("prefix=google/bert/77/") == []
    assert keys("prefix=/google") == []
    assert keys("prefix=google/bert/9/../1/") == []


def test_long_listings_come_in_pages(hub: LocalHub, root: Path, records: list[RequestRecord]) -> None:
    many = {f"assets/{i:04}": b"%d" % i for i in range(2500)}
    write_tree({"saved_model.pb": b"x", **many}, root / "big/model/1")
    assert sorted(listed(hub, "big/model/1")) == sorted(
        files({"saved_model.pb": b"x", **many}, "big/model/1")
    )
    hub.stop()  # a record comes after its answer
    assert len(records) == 3


@pytest.mark.parametrize("delimiter", ["", "&delimiter=/"])
def test_pages_of_any_size_have_each_name_once(hub: LocalHub, delimiter: str) -> None:
    whole = get(hub, f"?list-type=2&prefix=google/&{delimiter}")
    expected = entries(whole, "Contents/Key") + entries(whole, "CommonPrefixes/Prefix")
    for size in (1, 3):
        found: list[str] = []
        query = f"?list-type=2&prefix=google/&max-keys={size}{delimiter}"
        answer = get(hub, query)
        while True:
            page = entries(answer, "Contents/Key") + entries(answer, "CommonPrefixes/Prefix")
            assert entries(answer, "KeyCount") == [str(len(page))]
            assert len(page) <= size
            found += page
            if entries(answer, "IsTruncated") == ["false"]:
                break
            (token,) = entries(answer, "NextContinuationToken")
            answer = get(hub, f"{query}&continuation-token={token}")
        assert found == expected
    after = entries(
        get(hub, f"?list-type=2&prefix=google/&start-after={found[0]}{delimiter}"), "Contents/Key"
    )
    assert after == entries(whole, "Contents/Key")[0 if delimiter else 1 :]


def test_headers_are_those_of_google(hub: LocalHub) -> None:
    target, content = "/google/bert/9/saved_model.pb", TREE["saved_model.pb"]
    crc32c = base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode()
    md5 = hashlib.md5(content)
    whole, head = get(hub, target), get(hub, target, "HEAD")
    assert (whole.content, head.content) == (content, b"")
    for headers in (whole.headers, head.headers):
        assert headers["Content-Length"] == str(len(content))
        assert headers["ETag"] == f'"{md5.hexdigest()}"'
        assert headers["x-goog-hash"] == f"crc32c={crc32c},md5={base64.b64encode(md5.digest()).decode()}"
        assert int(headers["x-goog-generation"]) > 0
        assert headers["Last-Modified"].endswith(" GMT")
        assert headers["Accept-Ranges"] == "bytes"


def test_conditions(hub: LocalHub) -> None:
    target, size = "/google/bert/9/saved_model.pb", len(TREE["saved_model.pb"])
    known = get(hub, target, "HEAD").headers
    etag, generation = known["ETag"], known["x-goog-generation"]
    for condition in (etag, f'"x", {etag}', "*"):
        assert get(hub, target, Range="bytes=5-9", If_Match=condition).status_code == 206, condition
    for condition in ('"x"', f"W/{etag}"):
        answer = get(hub, target, Range="bytes=5-9", If_Match=condition)
        assert (answer.status_code, entries(answer, "Code")) == (412, ["PreconditionFailed"]), condition
    part = get(hub, target, Range="bytes=5-9", If_Range=etag)
    assert (part.content, part.headers["Content-Range"]) == (
        TREE["saved_model.pb"][5:10],
        f"bytes 5-9/{size}",
    )
    for other in ('"x"', known["Last-Modified"]):
        assert get(hub, target, Range="bytes=5-9", If_Range=other).status_code == 200
    assert get(hub, target, If_None_Match=etag).status_code == 304
    beyond = get(hub, target, Range=f"bytes={size}-")
    assert (beyond.status_code, entries(beyond, "Code")) == (416, ["InvalidRange"])
    for number, status in [(generation, 200), ("1", 404)]:
        assert get(hub, f"{target}?generation={number}").status_code == status
    for number, status in [(generation, 200), ("1", 412)]:
        assert get(hub, target, x_goog_if_generation_match=number).status_code == status


def test_client_sees_that_an_object_changed(hub: LocalHub, root: Path) -> None:
    key = "google/bert/9/name.txt"
    before = obstore.head(store(hub), key)
    (root / key).write_bytes(b"another")
    with pytest.raises(PreconditionError):
        obstore.get(store(hub), key, options={"if_match": before["e_tag"]})
    after = obstore.head(store(hub), key)
    assert after["version"] != before["version"]
    assert listed(hub, "google/bert/9")[key]["e_tag"] == after["e_tag"]
    (root / key).unlink()
    with pytest.raises(FileNotFoundError):
        obstore.get(store(hub), key)
    assert key not in listed(hub, "google/bert/9")


def test_checksums_outlive_a_restart(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def etags() -> dict[str, str]:
        with LocalHub(root, archive_dir=tmp_path / "archives") as hub:
            return {key: found["e_tag"] for key, found in listed(hub, "google/bert/9").items()}

    before = etags()
    with monkeypatch.context() as patch:
        patch.setattr("hubfs.serve.objects.open_member", None)  # nothing is read again
        assert etags() == before
    (description,) = (tmp_path / "archives").glob("*.json")
    for damage in ("{", "[]", '{"name.txt": 3}'):
        description.write_text(damage)
        assert etags() == before


def test_archives_are_objects_too(hub: LocalHub) -> None:
    known = requests.get(f"{hub.url}/google/bert/9.tar.gz", timeout=20)
    assert bytes(obstore.get(store(hub), "google/bert/9.tar.gz").bytes()) == known.content
    with tarfile.open(fileobj=BytesIO(known.content)) as tar:
        assert "./saved_model.pb" in tar.getnames()
    assert get(hub, "/google/bert/9.tar.gz", "HEAD").headers["x-goog-hash"] == known.headers["x-goog-hash"]


@pytest.mark.parametrize(
    "target",
    [
        "/google/bert/9/none",
        "/google/bert/9/variables",
        "/google/bert/9/variables/",
        "/google/bert/9",
        "/google/bert/77/saved_model.pb",
        "/google/bert/77.tar.gz",
        "/google/bert/9//saved_model.pb",
        "/google/bert/9/%2e%2e/1/saved_model.pb",
        "/google%2Fbert%2F9%2F..%2F1%2Fsaved_model.pb",
        "/..%2F..%2Fetc%2F1%2Fpasswd",
        "/google/bert/9/%00",
        "/google/bert/9/%ff",
        f"/google/bert/9/{'x' * 300}",
    ],
)
def test_other_objects_are_not_there(hub: LocalHub, target: str) -> None:
    answer = requests.Request("GET", hub.url).prepare()
    answer.url = f"{hub.url}/{BUCKET}{target}"
    with requests.Session() as session:
        found = session.send(answer, timeout=20)
    assert (found.status_code, entries(found, "Code")) == (404, ["NoSuchKey"])


@pytest.mark.parametrize("query", ["", "list-type=1", "list-type=2&max-keys=0", "list-type=2&max-keys=x"])
def test_listings_that_make_no_sense(hub: LocalHub, query: str) -> None:
    answer = get(hub, f"?{query}")
    assert (answer.status_code, entries(answer, "Code")) == (400, ["InvalidArgument"])
    answer = get(hub, "?list-type=2&continuation-token=%ff")
    assert (answer.status_code, entries(answer, "Code")) == (400, ["InvalidArgument"])


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE"])
def test_nothing_can_be_changed(hub: LocalHub, root: Path, method: str) -> None:
    answer = get(hub, "/google/bert/9/name.txt", method)
    assert (answer.status_code, entries(answer, "Code")) == (405, ["MethodNotAllowed"])
    assert (root / "google/bert/9/name.txt").read_bytes() == b"google/bert/9"


def test_other_buckets_are_not_there(hub: LocalHub) -> None:
    with pytest.raises(obstore.exceptions.BaseError, match="404"):
        list(obstore.list(store(hub, "another")))
    with pytest.raises(FileNotFoundError):
        obstore.get(store(hub, f"{BUCKET}2"), "google/bert/9/name.txt")


@pytest.mark.logs("google/bert/9")
@pytest.mark.parametrize("kind", ["outside", "directory", "control", "not UTF-8"])
def test_what_no_object_can_stand_for_is_an_error(hub: LocalHub, root: Path, kind: str) -> None:
    directory = root / "google/bert/9"
    if kind == "outside":
        (directory / "strange").symlink_to("/etc/passwd")
    elif kind == "directory":
        (directory / "strange").symlink_to("assets")
    else:
        (directory / ("a\nb" if kind == "control" else os.fsdecode(b"\xff"))).touch()
    answer = get(hub, "?list-type=2&prefix=google/bert/9/")
    assert (answer.status_code, entries(answer, "Code")) == (500, ["InternalError"])
    assert sorted(listed(hub, "google/bert/10"))
    assert get(hub, "/google/bert/9/strange/vocab.txt").status_code in (404, 500)


def test_links_inside_of_a_version_are_objects(hub: LocalHub, root: Path) -> None:
    (root / "google/bert/9/link").symlink_to("name.txt")
    assert bytes(obstore.get(store(hub), "google/bert/9/link").bytes()) == b"google/bert/9"


def test_names_of_buckets(root: Path, tmp_path: Path) -> None:
    with LocalHub(root, archive_dir=tmp_path / "a", bucket="my-models") as hub:
        answer = requests.get(f"{hub.url}/google/bert?tf-hub-format=uncompressed", timeout=20)
        assert answer.text == "gs://my-models/google/bert/10"
        assert bytes(obstore.get(store(hub, "my-models"), "google/bert/10/name.txt").bytes())
    for wrong in ("no", "Upper", "a/b", "-x-"):
        with pytest.raises(ConfigError, match="bucket"):
            LocalHub(root, archive_dir=tmp_path / "a", bucket=wrong)
    with pytest.raises(ConfigError, match="publisher"):
        LocalHub(root, archive_dir=tmp_path / "a", bucket="google")
