"""Handles, mount paths and keys: tables, and properties that hold for any path."""

from __future__ import annotations

import hashlib
import posixpath
import re
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hubfs.errors import RefusedError
from hubfs.handles import (
    Address,
    Alias,
    HandleMap,
    InModel,
    Namespace,
    Place,
    cache_key,
    compressed_url,
    host_to_allow,
    is_archive,
    version_of,
)

TFHUB = HandleMap(
    "https://tfhub.dev",
    ["example.org", "127.0.0.1:8080", "[::1]:9000", "gs://bucket", "s3://my.models-1"],
)
KAGGLE_HUBS = [
    HandleMap(f"https://www.kaggle.com{path}") for path in ("", "/models", "/models/google", "/api/v1/models")
]
PREFIXED = HandleMap("http://127.0.0.1:8500/models/v2", ["example.org"])

ALLOWED = {
    "https://tfhub.dev", "https://www.kaggle.com", "https://hub.tensorflow.google.cn",
    "gs://bucket", "gs://tfhub-modules", "s3://my.models-1",
    *(f"http://{host}" for host in ("example.org", "127.0.0.1:8080", "[::1]:9000")),
    *(f"https://{host}" for host in ("example.org", "127.0.0.1:8080", "[::1]:9000")),
}  # fmt: skip
KIND = re.compile(r"lite-format=tflite|tfjs-format=compressed")
VARIATION = "https://www.kaggle.com/models/google/demo/tensorFlow2/small"
AT_KAGGLE = ("https:", "www.kaggle.com")


def model(handle: str, inner: str = "") -> InModel:
    return InModel(handle, inner)


PLACES: list[tuple[str, Place]] = [
    ("/", Namespace((), None)),
    ("", Namespace((), None)),
    ("/google", Namespace(("google",), None)),
    ("/google/nnlm", Namespace(("google", "nnlm"), "https://tfhub.dev/google/nnlm")),
    ("/google/nnlm/2", model("https://tfhub.dev/google/nnlm/2")),
    ("/google/nnlm/2/", model("https://tfhub.dev/google/nnlm/2")),
    ("//google///nnlm//2", model("https://tfhub.dev/google/nnlm/2")),
    ("/google/nnlm/2/variables/x", model("https://tfhub.dev/google/nnlm/2", "variables/x")),
    ("/google/nnlm/2/3/4", model("https://tfhub.dev/google/nnlm/2", "3/4")),
    ("/google/a/b/c/d/5", model("https://tfhub.dev/google/a/b/c/d/5")),
    ("/google/7", model("https://tfhub.dev/google/7")),
    # A publisher may be called by a number.
    ("/7", Namespace(("7",), None)),
    ("/7/m/1", model("https://tfhub.dev/7/m/1")),
    ("/google/nnlm/007", model("https://tfhub.dev/google/nnlm/007")),
    ("/google/nnlm/2a", Namespace(("google", "nnlm", "2a"), "https://tfhub.dev/google/nnlm/2a")),
    ("/google/m.tar.gz", model("https://tfhub.dev/google/m.tar.gz")),
    ("/google/m.tgz/saved_model.pb", model("https://tfhub.dev/google/m.tgz", "saved_model.pb")),
    ("/m.tar", model("https://tfhub.dev/m.tar")),
    ("/google/модель/1", model("https://tfhub.dev/google/модель/1")),
    ("/google/a+b=c,d;e:f@g!h/1", model("https://tfhub.dev/google/a+b=c,d;e:f@g!h/1")),
    ("/https:", Namespace(("https:",), None)),
    ("/http:", Namespace(("http:",), None)),
    ("/https:/tfhub.dev", Alias("..")),
    ("/http:/tfhub.dev", Alias("..")),
    ("/https:/tfhub.dev:443", Alias("..")),
    ("/http:/tfhub.dev:80", Alias("..")),
    ("/https:/TFHub.Dev", Alias("..")),
    ("/https:/tfhub.dev/google/nnlm/2/x", model("https://tfhub.dev/google/nnlm/2", "x")),
    ("/https://tfhub.dev/google/nnlm/2", model("https://tfhub.dev/google/nnlm/2")),
    ("/http:/tfhub.dev/google/nnlm/2", model("https://tfhub.dev/google/nnlm/2")),
    ("/https:/example.org", Namespace(("https:", "example.org"), None)),
    ("/https:/EXAMPLE.org", Alias("example.org")),
    ("/https:/example.org:443", Alias("example.org")),
    ("/http:/example.org:80", Alias("example.org")),
    ("/https:/example.org/x.tar.gz", model("https://example.org/x.tar.gz")),
    ("/http:/example.org/x.tar.gz", model("http://example.org/x.tar.gz")),
    ("/https:/example.org:443/p/m/1", model("https://example.org/p/m/1")),
    ("/http:/127.0.0.1:8080/p/m/1", model("http://127.0.0.1:8080/p/m/1")),
    ("/http:/[::1]:9000/p/m/1", model("http://[::1]:9000/p/m/1")),
    # Google's mirror.
    ("/https:/hub.tensorflow.google.cn/google/m/1", model("https://hub.tensorflow.google.cn/google/m/1")),
    # Buckets.
    ("/gs:", Namespace(("gs:",), None)),
    ("/s3:", Namespace(("s3:",), None)),
    ("/gs:/bucket", Namespace(("gs:", "bucket"), None)),
    ("/gs://bucket/", Namespace(("gs:", "bucket"), None)),
    ("/gs:/bucket/dir", Namespace(("gs:", "bucket", "dir"), "gs://bucket/dir")),
    ("/gs:/bucket/my dir/x", Namespace(("gs:", "bucket", "my dir", "x"), "gs://bucket/my dir/x")),
    ("/gs:/bucket/3", model("gs://bucket/3")),
    ("/gs:/bucket/dir/3/variables/x", model("gs://bucket/dir/3", "variables/x")),
    ("/gs:/bucket/dir/3/50%/a#b?c.txt", model("gs://bucket/dir/3", "50%/a#b?c.txt")),
    ("/gs:/bucket/x.tar.gz", model("gs://bucket/x.tar.gz")),
    ("/gs:/bucket/a/x.tgz/saved_model.pb", model("gs://bucket/a/x.tgz", "saved_model.pb")),
    ("/gs:/tfhub-modules/google/spice/2", model("gs://tfhub-modules/google/spice/2")),
    ("/s3:/my.models-1/a/b", Namespace(("s3:", "my.models-1", "a", "b"), "s3://my.models-1/a/b")),
    # A query is no part of a handle in a bucket, and lite-model is a name as any other there.
    ("/gs:/bucket/lite-model/m/1", model("gs://bucket/lite-model/m/1")),
    # TF Lite and TF.js.
    (
        "/tensorflow/lite-model/mobilenet_v2/1/default/1?lite-format=tflite",
        model("https://tfhub.dev/tensorflow/lite-model/mobilenet_v2/1/default/1?lite-format=tflite"),
    ),
    (
        "/google/tfjs-model/imagenet/3/default/1?tfjs-format=compressed/model.json",
        model(
            "https://tfhub.dev/google/tfjs-model/imagenet/3/default/1?tfjs-format=compressed", "model.json"
        ),
    ),
    ("/google/x/1?lite-format=tflite", model("https://tfhub.dev/google/x/1?lite-format=tflite")),
    (
        "/https:/tfhub.dev/g/x/1?lite-format=tflite/a",
        model("https://tfhub.dev/g/x/1?lite-format=tflite", "a"),
    ),
    ("/google/lite-model", Namespace(("google", "lite-model"), None)),
    ("/google/lite-model/m/1/2", Namespace(("google", "lite-model", "m", "1", "2"), None)),
    # Kaggle.
    ("/kaggle:", Alias("https:/www.kaggle.com/models")),
    ("/https:/kaggle.com", Alias("www.kaggle.com")),
    ("/https:/WWW.Kaggle.com:443", Alias("www.kaggle.com")),
    ("/http:/www.kaggle.com", Alias("../https:/www.kaggle.com")),
    ("/http:/kaggle.com", Alias("../https:/www.kaggle.com")),
    ("/https:/www.kaggle.com", Namespace(AT_KAGGLE, None)),
    ("/https:/www.kaggle.com/models", Namespace((*AT_KAGGLE, "models"), None)),
    ("/https:/www.kaggle.com/models/google", Namespace((*AT_KAGGLE, "models", "google"), None)),
    ("/kaggle:/google/demo", Namespace((*AT_KAGGLE, "models", "google", "demo"), None)),
    (
        "/https:/www.kaggle.com/models/google/demo/tensorFlow2",
        Namespace((*AT_KAGGLE, "models", "google", "demo", "tensorFlow2"), None),
    ),
    ("/https:/www.kaggle.com/models/google/demo/TensorFlow2", Alias("tensorFlow2")),
    ("/kaggle:/google/demo/tensor_flow_2", Alias("tensorFlow2")),
    ("/kaggle:/google/demo/NewOne", Alias("newone")),
    (
        "/http:/kaggle.com/models/google/demo/TENSORFLOW2/small",
        Namespace((*AT_KAGGLE, "models", "google", "demo", "tensorFlow2", "small"), VARIATION),
    ),
    ("/https:/www.kaggle.com/models/google/demo/tensorFlow2/small/3", model(f"{VARIATION}/3")),
    ("/kaggle:/google/demo/tensorFlow2/small/3", model(f"{VARIATION}/3")),
    ("/kaggle:/google/demo/Tensorflow2/small/3/a/b.py", model(f"{VARIATION}/3", "a/b.py")),
    ("/kaggle:/google/demo/tensorFlow2/small/3/4", model(f"{VARIATION}/3", "4")),
    ("/kaggle:/google/demo/tensorFlow2/small/3/x.tar.gz", model(f"{VARIATION}/3", "x.tar.gz")),
    ("/kaggle:/google/demo/tensorFlow2/small/3/download", Alias(".")),
    ("/kaggle:/google/demo/tensorFlow2/small/3/download/x", model(f"{VARIATION}/3", "x")),
    ("/kaggle:/google/demo/tensorFlow2/small/config.json", model(VARIATION, "config.json")),
    ("/kaggle:/google/demo/tensorFlow2/small/model.pt", model(VARIATION, "model.pt")),
    ("/kaggle:/google/demo/tensorFlow2/small/model.tar.gz", model(VARIATION, "model.tar.gz")),
    ("/kaggle:/google/demo/tensorFlow2/small/tokenizer.model", model(VARIATION, "tokenizer.model")),
    ("/kaggle:/google/demo/tensorFlow2/small/variables/x", model(VARIATION, "variables/x")),
    (
        "/https:/www.kaggle.com/models/google/demo/frameworks",
        Namespace((*AT_KAGGLE, "models", "google", "demo", "frameworks"), None),
    ),
    (
        "/kaggle:/google/demo/frameworks/TensorFlow2/variations",
        Namespace((*AT_KAGGLE, "models", "google", "demo", "frameworks", "TensorFlow2", "variations"), None),
    ),
    (
        "/https:/www.kaggle.com/models/google/demo/frameworks/TensorFlow2/variations/small",
        Alias("../../../tensorFlow2/small"),
    ),
    ("/kaggle:/google/demo/frameworks/TensorFlow2/variations/small/versions", Alias(".")),
    ("/kaggle:/google/demo/frameworks/TensorFlow2/variations/small/download", Alias(".")),
    (
        "/kaggle:/google/demo/frameworks/TensorFlow2/variations/small/versions/3/x",
        model(f"{VARIATION}/3", "x"),
    ),
    (
        "/kaggle:/google/demo/gemmaCpp/2",
        Namespace(
            (*AT_KAGGLE, "models", "google", "demo", "gemmaCpp", "2"),
            "https://www.kaggle.com/models/google/demo/gemmaCpp/2",
        ),
    ),
    ("/https:/www.kaggle.com/api", Namespace((*AT_KAGGLE, "api"), None)),
    ("/https:/www.kaggle.com/api/v1/models", Alias("../../models")),
    (
        "/https:/www.kaggle.com/api/v1/models/google/demo/tensorFlow2/small/3/download/a",
        model(f"{VARIATION}/3", "a"),
    ),
]


@pytest.mark.parametrize(("path", "place"), PLACES)
def test_path_means(path: str, place: Place) -> None:
    assert TFHUB.place(path) == place


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/google/m/1", model("http://127.0.0.1:8500/models/v2/google/m/1")),
        ("/http:/127.0.0.1:8500/models/v2/google/m/1", model("http://127.0.0.1:8500/models/v2/google/m/1")),
        ("/https:/127.0.0.1:8500/models/v2", Alias("../../..")),
        ("/http:/127.0.0.1:8500/models", Namespace(("http:", "127.0.0.1:8500", "models"), None)),
        ("/http:/127.0.0.1:8500/other/m/1", model("http://127.0.0.1:8500/other/m/1")),
        ("/http:/127.0.0.1:8500/models/v2x/1", model("http://127.0.0.1:8500/models/v2x/1")),
        ("/http:/example.org/a/b/1", model("http://example.org/a/b/1")),
    ],
)
def test_path_means_at_a_hub_with_port_and_prefix(path: str, place: Place) -> None:
    assert PREFIXED.place(path) == place


@pytest.mark.parametrize(
    "path",
    [
        "/https:/other.org/a/b/1",
        "/https:/other.org",
        "/https:/sub.example.org/a/b/1",
        "/https:/example.org.evil.net/a/b/1",
        "/https:/example.org:8443/a/b/1",
        "/https:/127.0.0.1/a/b/1",
        "/http:/127.0.0.1:8081/a/b/1",
        "/http:/[::1]/a/b/1",
        "/https:/user@tfhub.dev/a/b/1",
        "/https:/user:pw@example.org/a/b/1",
        "/https:/example.org:99999/a/b/1",
        "/https:/example.org:0/a/b/1",
        "/https:/example.org:x/a/b/1",
        "/https:/example.org\\.evil.net/a/b/1",
        "/https:/exam ple.org/a/b/1",
        "/https:/tfhub.dev%2f@evil/a/b/1",
        "/https:/..",
        "/https:/[::1",
        "/gs:/other/model",
        "/gs:/other",
        "/s3:/bucket/model",
        "/gs:/my.models-1/model",
        "/gs:/Bucket/model",
        "/gs:/bucket:80/model",
        "/gs:/bucket@evil/model",
        "/gs:/ab/model",
        "/gs:/../model",
        "/gs:/.bucket/model",
        "/gs:/buck\udcffet/model",
        "/http:/hub.tensorflow.google.cn/a/b/1",
        "/http:/www.kaggle.com:8080/models/a/b/jax/c/1",
        "/https:/evil.kaggle.com/models/a/b/jax/c/1",
        "/https:/www.kaggle.com.evil.net/models/a/b/jax/c/1",
        "/https:/user@www.kaggle.com/models/a/b/jax/c/1",
        "/file:/etc/passwd",
        "/ftp:/tfhub.dev/a/b/1",
        "/:/x",
    ],
)
def test_host_that_is_not_allowed_is_refused(path: str) -> None:
    with pytest.raises(RefusedError):
        TFHUB.place(path)


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "a%2f",
        "a?b",
        "a#b",
        "a\\b",
        "a\0b",
        "a\nb",
        "a\tb",
        "a\x7fb",
        "a\x1bb",
        "\udcff",
        "%",
        "a%",
    ],
)
@pytest.mark.parametrize(
    "where",
    [
        "/{}/m/1", "/google/{}/1", "/google/m/{}", "/https:/example.org/{}/m/1",
        "/https:/example.org/a/{}.tar.gz",
        "/gs:/bucket/{}", "/gs:/bucket/{}/m/1", "/s3:/my.models-1/a/{}.tar.gz",
        "/kaggle:/{}/m/jax/v/1", "/kaggle:/o/m/{}/v/1", "/kaggle:/o/m/jax/{}/1",
        "/kaggle:/o/m/frameworks/jax/{}/v",
    ],
)  # fmt: skip
def test_name_that_could_change_the_url_is_refused(name: str, where: str) -> None:
    with pytest.raises(RefusedError):
        TFHUB.place(where.format(name))


@pytest.mark.parametrize(
    "name",
    [
        ".git", ".svn", ".hg", ".Trash", ".Trash-1000", ".DS_Store", ".hidden", ".directory",
        "autorun.inf", "desktop.ini", "Thumbs.db", "CVS", "RCS", "lost+found", "__pycache__", "node_modules",
        "tags", "TAGS", "GTAGS", "Makefile", "makefile", "GNUmakefile", "setup.cfg", "package.json",
        "x.py", "x.pyc", "x.so", "x.sh", "x~", "#x#", ".x.swp", "x.swp", "x.bak", "x.orig", "x.rej", "x.tmp",
        "x.lock", "README.md", "index.html", "a.txt", "variables.pb", ".tar.gz", "core",
    ],
)  # fmt: skip
def test_litter_never_becomes_a_part_of_a_handle(name: str) -> None:
    above = ["", "/google", "/google/m", "/https:/example.org/a", "/gs:/bucket", "/gs:/bucket/a"]
    above += ["/kaggle:", "/kaggle:/google/demo", "/kaggle:/google/demo/jax", "/https:/www.kaggle.com"]
    for path in above:
        with pytest.raises(RefusedError):
            TFHUB.place(f"{path}/{name}")
        assert TFHUB.unversioned(f"{path}/{name}") is None
    # Below a version the publisher names files as he likes.
    assert TFHUB.place(f"/google/m/1/{name}") == model("https://tfhub.dev/google/m/1", name)


@pytest.mark.parametrize(
    ("handle", "path"),
    [
        ("https://tfhub.dev/google/m/1", "google/m/1"),
        ("https://tfhub.dev/google/m/1/", "google/m/1"),
        ("http://tfhub.dev/google/m/1", "google/m/1"),
        ("https://tfhub.dev:443/google/m/1", "google/m/1"),
        ("https://TFHUB.dev/google/m/1", "google/m/1"),
        ("https://tfhub.dev/google/m/1?tf-hub-format=compressed", "google/m/1"),
        ("https://tfhub.dev/google/m", "google/m"),
        ("https://example.org/x.tar.gz", "https:/example.org/x.tar.gz"),
        ("http://127.0.0.1:8080/a/b/1", "http:/127.0.0.1:8080/a/b/1"),
        ("http://[::1]:9000/a/b/1", "http:/[::1]:9000/a/b/1"),
        ("https://tfhub.dev/google/m/1?lite-format=tflite", "google/m/1?lite-format=tflite"),
        (
            "http://tfhub.dev/t/lite-model/m/1/d/1/?lite-format=tflite&tf-hub-format=compressed",
            "t/lite-model/m/1/d/1?lite-format=tflite",
        ),
        ("https://tfhub.dev/t/lite-model/m/1/d/1", None),
        ("https://tfhub.dev/google/m/1?lite-format=tflite&tfjs-format=compressed", None),
        ("https://tfhub.dev/google/m/1?lite-format=TFLITE", None),
        ("https://tfhub.dev/google/m/1?lite-format=tflite/", None),
        ("https://tfhub.dev/google/m/1?lite-format=tflite#x", None),
        ("https://tfhub.dev/google/m/1?tfjs-format=file", None),
        ("https://tfhub.dev/google/m?lite-format=tflite", None),
        ("https://tfhub.dev/google/m.tar.gz?lite-format=tflite", None),
        ("https://tfhub.dev/google/m/1/x?lite-format=tflite", None),
        ("https://tfhub.dev/google/m/1?=lite-format=tflite", None),
        ("gs://bucket/model", "gs:/bucket/model"),
        ("gs://bucket/my model/", "gs:/bucket/my model"),
        ("s3://my.models-1/a/7", "s3:/my.models-1/a/7"),
        ("s3://my.models-1/a/x.tar.gz", "s3:/my.models-1/a/x.tar.gz"),
        ("gs://bucket", None),
        ("gs://bucket/", None),
        ("gs://other/model", None),
        ("gs://bucket/a//b", None),
        ("gs:///bucket/a", None),
        ("gs://bucket/a/../b", None),
        ("gs://bucket/a?generation=1", None),
        ("gs://bucket/a#1", None),
        ("gs://bucket/m/1/variables", None),
        (f"{VARIATION}/3", "https:/www.kaggle.com/models/google/demo/tensorFlow2/small/3"),
        (VARIATION, "https:/www.kaggle.com/models/google/demo/tensorFlow2/small"),
        (
            "http://kaggle.com/models/google/demo/frameworks/TensorFlow2/variations/small/versions/3?x=y#z",
            "https:/www.kaggle.com/models/google/demo/tensorFlow2/small/3",
        ),
        (
            "https://www.kaggle.com:443/models/google/demo/TensorFlow2/small/3",
            "https:/www.kaggle.com/models/google/demo/tensorFlow2/small/3",
        ),
        ("kaggle://google/demo/jax/v", "https:/www.kaggle.com/models/google/demo/jax/v"),
        (f"{VARIATION}/3/saved_model.pb", None),
        ("https://www.kaggle.com/models/google/demo", None),
        ("https://www.kaggle.com/datasets/google/demo/1", None),
        ("https://www.kaggle.com/x.tar.gz", None),
        ("https://user:pw@www.kaggle.com/models/google/demo/jax/v/1", None),
        ("https://tfhub.dev/google/m/1#part", None),
        ("https://tfhub.dev/google/m/1/variables", None),
        ("https://tfhub.dev/google", None),
        ("https://tfhub.dev/", None),
        ("https://tfhub.dev", None),
        ("https://other.org/a/b/1", None),
        ("https://user:pw@tfhub.dev/google/m/1", None),
        ("/tmp/model", None),
        ("google/m/1", None),
        ("", None),
        ("https://tfhub.dev/google/.git/1", None),
        ("https://tfhub.dev/google/../m/1", None),
        ("https://tfhub.dev/go%6fgle/m/1", None),
        ("https://tfhub.dev/goo\ngle/m/1", None),
        ("https://tfhub.dev/goo\tgle/m/1", None),
        ("https://[::1/google/m/1", None),
        ("https://[v1.x]/google/m/1", None),
        ("https://tfhub.dev\u2100/google/m/1", None),
        # Its mount path would begin as another host's does.
        ("https://tfhub.dev/http:/example.org/1", None),
        ("https://tfhub.dev/https://example.org/m/1", None),
    ],
)
def test_mount_path_of_handle(handle: str, path: str | None) -> None:
    assert TFHUB.mount_path(handle) == path


@pytest.mark.parametrize(
    ("text", "handle"),
    [
        ("google/m/1", "https://tfhub.dev/google/m/1"),
        ("/google/m/1/", "https://tfhub.dev/google/m/1"),
        ("google/m", "https://tfhub.dev/google/m"),
        ("https://tfhub.dev/google/m/1", "https://tfhub.dev/google/m/1"),
        ("http://tfhub.dev:80/google/m/1", "https://tfhub.dev/google/m/1"),
        ("https://example.org/a/x.tgz", "https://example.org/a/x.tgz"),
        ("https:/example.org/a/x.tgz", "https://example.org/a/x.tgz"),
        ("http:/127.0.0.1:8080/a/b/1", "http://127.0.0.1:8080/a/b/1"),
        ("/gs:/bucket/dir", "gs://bucket/dir"),
        ("gs://bucket/dir/3/", "gs://bucket/dir/3"),
        ("s3:/my.models-1/x.tar.gz", "s3://my.models-1/x.tar.gz"),
        ("kaggle:/google/demo/TensorFlow2/small/3", f"{VARIATION}/3"),
        ("/https:/www.kaggle.com/models/google/demo/tensorFlow2/small", VARIATION),
        (f"{VARIATION}/3/download?x=y", f"{VARIATION}/3"),
        (
            "google/lite-model/m/1/d/1?lite-format=tflite",
            "https://tfhub.dev/google/lite-model/m/1/d/1?lite-format=tflite",
        ),
    ],
)
def test_what_a_user_types_is_taken_as_a_handle(text: str, handle: str) -> None:
    assert TFHUB.handle_of(text) == handle


@pytest.mark.parametrize(
    "text",
    [
        "google", "", "/", "https://tfhub.dev", "https://other.org/a/b/1", "gs://other/m", "gs://bucket",
        "kaggle:/google/demo", f"{VARIATION}/latest", "kaggle:", "gs:", "file:/etc/passwd",
        "google/m/1/saved_model.pb",
        "google/m/1?x=y", "google/../m/1", "https://[::1/google/m/1", "goo\ngle/m/1", "https://", "https:///a/b/1",
    ],
)  # fmt: skip
def test_what_cannot_be_a_handle_is_refused(text: str) -> None:
    with pytest.raises(RefusedError):
        TFHUB.handle_of(text)


def test_refused_host_is_named_with_the_remedy() -> None:
    with pytest.raises(RefusedError, match=r"other\.org.*--allow-host other\.org"):
        TFHUB.handle_of("https://other.org/a/b/1")


@pytest.mark.parametrize("path", ["gs://other/m", "/gs:/other", "/gs:/other/m/1/x"])
def test_refused_bucket_is_named_with_the_remedy(path: str) -> None:
    with pytest.raises(RefusedError, match=r"gs://other: .*mount with --allow-host gs://other$"):
        TFHUB.place(path)


@pytest.mark.parametrize(
    "entry",
    ["gs://", "gs://Bucket", "gs://bucket/dir", "ftp://host", "https://example.org", "a b", "", "gs://x"],
)
def test_what_cannot_be_allowed_is_refused(entry: str) -> None:
    with pytest.raises(RefusedError):
        HandleMap("https://tfhub.dev", [entry])


@pytest.mark.parametrize(
    ("handle", "host"),
    [
        ("gs://bucket/my model", "gs://bucket"),
        ("s3://bucket", "s3://bucket"),
        ("gs://Bucket/m", ""),
        ("https://Example.org:8443/a/1", "example.org:8443"),
        ("https://example.org:443/a/1", "example.org"),
        ("https://user:pw@example.org/a/1", ""),
        ("https://[::1/a", ""),
        ("kaggle://o/m", ""),
        ("google/m/1", ""),
    ],
)
def test_host_that_a_handle_needs(handle: str, host: str) -> None:
    assert host_to_allow(handle) == host
    if host:
        HandleMap("https://tfhub.dev", [host])


@pytest.mark.parametrize(
    "inner",
    [
        ".git", "a/.git", "..", "a/../../x", "HEAD~", "Makefile", "tags", "core", "x.tmp", "x.swp",
        "desktop.ini", "0", "007", "12345678901", "__pycache__/x", "a\nb", ".x\ny", "a\0b", "a/\udcff",
    ],
)  # fmt: skip
def test_litter_is_not_looked_for_in_kaggles_latest_version(inner: str) -> None:
    with pytest.raises(RefusedError):
        TFHUB.place(f"/kaggle:/google/demo/jax/v/{inner}")


@pytest.mark.parametrize("inner", ["..", "a/./b", "a/..", "a\nb", "a/\x1f", "\x7f", "a\0b", "\udcff"])
@pytest.mark.parametrize("handle", ["gs:/bucket/m/1", "s3:/my.models-1/x.tar.gz"])
def test_name_that_no_object_has_is_refused_in_a_bucket(handle: str, inner: str) -> None:
    with pytest.raises(RefusedError):
        TFHUB.place(f"{handle}/{inner}")


@pytest.mark.parametrize(
    "path",
    [
        "/google/m/1?lite-format=tflite&x=y", "/google/m/1?lite-format=", "/google/m/1?x=y", "/google/m/1?",
        "/google/m/1?lite-format=tflite?", "/google/m/x?lite-format=tflite", "/1?lite-format=tflite",
        "/google/m/1?LITE-format=tflite", "/google/1x?lite-format=tflite/m/1",
        "/google/m.tar.gz?lite-format=tflite",
        "/gs:/bucket/m/1?lite-format=tflite", "/kaggle:/google/demo/jax/v?lite-format=tflite/1",
    ],
)  # fmt: skip
def test_other_queries_are_refused(path: str) -> None:
    with pytest.raises(RefusedError):
        TFHUB.place(path)


@pytest.mark.parametrize(
    "path",
    [
        "/https:/www.kaggle.com/datasets", "/https:/www.kaggle.com/x.tar.gz", "/https:/www.kaggle.com/a/b/1",
        "/https:/www.kaggle.com/api/v2", "/https:/www.kaggle.com/api/v1/kernels",
        "/https:/www.kaggle.com/Models/a",
        "/kaggle:/o/m/Frameworks", "/kaggle:/o/m/frameworks/jax/versions", "/kaggle:/o/m/jax/x.tar.gz#/1",
        "/kaggle:/o/m/a:b/v/1", "/kaggle:/-o/m/jax/v/1", "/kaggle:/o/m/jax/sm all/1",
    ],
)  # fmt: skip
def test_only_models_are_shown_of_kaggle(path: str) -> None:
    with pytest.raises(RefusedError):
        TFHUB.place(path)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/google/m/saved_model.pb", model("https://tfhub.dev/google/m", "saved_model.pb")),
        ("/google/m/tfhub_module.pb", model("https://tfhub.dev/google/m", "tfhub_module.pb")),
        ("/https:/example.org/a/b/saved_model.pbtxt", model("https://example.org/a/b", "saved_model.pbtxt")),
        ("/google/saved_model.pb", None),
        ("/saved_model.pb", None),
        ("/google/m/1/saved_model.pb", None),
        ("/google/m/config.json", None),
        ("/google/m/x.tflite", None),
        ("/google/m/variables/variables.index", None),
        ("/google/lite-model/m/saved_model.pb", None),
        ("/https:/other.org/a/b/saved_model.pb", None),
        ("/https:/tfhub.dev/saved_model.pb", None),
        ("/gs:/bucket/m/saved_model.pb", model("gs://bucket/m", "saved_model.pb")),
        ("/gs:/bucket/m/config.json", model("gs://bucket/m", "config.json")),
        ("gs://bucket/m/model.json", model("gs://bucket/m", "model.json")),
        ("/s3:/my.models-1/a/b/x.safetensors", model("s3://my.models-1/a/b", "x.safetensors")),
        *((f"/gs:/bucket/m/x.{end}", model("gs://bucket/m", f"x.{end}")) for end in (
            "tflite", "keras", "h5", "onnx", "gguf", "pt", "pth", "bin", "npz", "pkl"
        )),
        ("/gs:/bucket/saved_model.pb", None),
        ("/gs:/saved_model.pb", None),
        ("/gs:/other/m/saved_model.pb", None),
        ("/gs:/bucket/m/package.json", None),
        ("/gs:/bucket/m/other.pb", None),
        ("/gs:/bucket/m/.keras", None),
        ("/gs:/bucket/m/.x.keras", None),
        ("/gs:/bucket/m/3/x.keras", None),
        ("/gs:/bucket/.git/x.bin", None),
        # `place` says it of these.
        ("/kaggle:/google/demo/jax/v/3/saved_model.pb", None),
        ("/kaggle:/google/demo/saved_model.pb", None),
        ("/https:/www.kaggle.com/models/google/demo/jax/v/saved_model.pb",
         model("https://www.kaggle.com/models/google/demo/jax/v", "saved_model.pb")),
    ],
)  # fmt: skip
def test_file_that_shows_an_unversioned_model(path: str, found: InModel | None) -> None:
    assert TFHUB.unversioned(path) == found


@pytest.mark.parametrize(
    ("hub", "path", "place"),
    [
        ("", "/models/google/demo/tensorFlow2/small/3/x", model(f"{VARIATION}/3", "x")),
        ("", "/google/demo/1", None),
        ("", "/https:/www.kaggle.com", Alias("..")),
        ("", "/https:/kaggle.com", Alias("www.kaggle.com")),
        ("", "/kaggle:", Alias("models")),
        ("", "/api/v1/models", Alias("../../models")),
        ("/models", "/google/demo/tensorFlow2/small/3", model(f"{VARIATION}/3")),
        ("/models", "/google/demo/tensorFlow2", Namespace(("google", "demo", "tensorFlow2"), None)),
        ("/models", "/google/demo/jax/v", Namespace(
            ("google", "demo", "jax", "v"), "https://www.kaggle.com/models/google/demo/jax/v"
        )),
        ("/models", "/kaggle:", Alias(".")),
        ("/models", "/kaggle:/google", Namespace(("google",), None)),
        ("/models", "/https:/www.kaggle.com", Namespace(AT_KAGGLE, None)),
        ("/models", "/https:/www.kaggle.com/models", Alias("../..")),
        ("/models", "/https:/www.kaggle.com/api/v1/models", Alias("../../models")),
        ("/models", "/https:/www.kaggle.com/models/google", Namespace(("google",), None)),
        ("/models/google", "/demo/tensorFlow2/small/3", model(f"{VARIATION}/3")),
        ("/models/google", "/https:/www.kaggle.com/models/google", Alias("../../..")),
        ("/models/google", "/kaggle:/keras", Namespace((*AT_KAGGLE, "models", "keras"), None)),
        ("/api/v1/models", "/google/demo/tensorFlow2/small/3", model(f"{VARIATION}/3")),
    ],
)  # fmt: skip
def test_path_means_where_kaggle_is_the_hub(hub: str, path: str, place: Place | None) -> None:
    handles = HandleMap(f"http://kaggle.com{hub}")
    if place is None:
        with pytest.raises(RefusedError):
            handles.place(path)
    else:
        assert handles.place(path) == place


@pytest.mark.parametrize("path", ["datasets", "models/a/b/jax/c", "models/a/b/jax/c/1", "models/a/b/Jax"])
def test_hub_at_kaggle_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(RefusedError):
        HandleMap(f"https://www.kaggle.com/{path}")


_NAME = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_+=,-]{0,20}", fullmatch=True)
_HOST = st.sampled_from(
    ["", "https:/example.org", "http:/example.org", "http:/127.0.0.1:8080", "https:/[::1]:9000"]
)


_END = st.integers(0, 10**12).map(str) | st.sampled_from(
    ["x.tar.gz", "x.tgz", "1?lite-format=tflite", "2?tfjs-format=compressed"]
)


@given(host=_HOST, names=st.lists(_NAME, min_size=1, max_size=5), end=_END)
def test_handle_and_mount_path_are_each_others_inverse(host: str, names: list[str], end: str) -> None:
    path = "/".join(filter(None, [host, *names, end]))
    try:
        place = TFHUB.place(path)
    except RefusedError:
        return  # a name of litter
    assert isinstance(place, InModel)
    is_round_trip(TFHUB, place.handle)


@given(
    bucket=st.sampled_from(["gs:/bucket", "gs:/tfhub-modules", "s3:/my.models-1"]),
    names=st.lists(_NAME | st.just("a b") | st.integers(0, 9).map(str), min_size=1, max_size=5),
    end=st.sampled_from(["", "/x.tar.gz", "/7"]),
)
def test_handle_and_mount_path_of_a_bucket_are_each_others_inverse(
    bucket: str, names: list[str], end: str
) -> None:
    try:
        place = TFHUB.place("/".join([bucket, *names]) + end)
    except RefusedError:
        return  # a name of litter
    assert isinstance(place, InModel) or not end
    assert isinstance(place, (InModel, Namespace)) and place.handle
    is_round_trip(TFHUB, place.handle)


_SLUG = st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,8}", fullmatch=True)


@pytest.mark.parametrize("handles", [TFHUB, *KAGGLE_HUBS], ids=lambda handles: handles.hub)
@given(
    names=st.tuples(
        st.just("google") | _SLUG, _SLUG, st.sampled_from(["TensorFlow2", "tf_lite", "JAX"]) | _SLUG, _SLUG
    ),
    version=st.none() | st.integers(1, 10**10 - 1),
    long=st.booleans(),
)
def test_handle_and_mount_path_at_kaggle_are_each_others_inverse(
    handles: HandleMap, names: tuple[str, ...], version: int | None, long: bool
) -> None:
    text = "kaggle:/" + "/".join(
        [*names[:2], "frameworks", names[2], "variations", names[3]] if long else names
    )
    if version is not None:
        text += f"/versions/{version}" if long else f"/{version}"
    try:
        handle = handles.handle_of(text)
    except RefusedError:
        return  # a name of litter
    assert version_of(handle) == (None if version is None else str(version))
    is_round_trip(handles, handle)


def is_round_trip(handles: HandleMap, handle: str) -> None:
    shown = handles.mount_path(handle)
    assert shown is not None
    place = handles.place(shown)
    assert place == (
        InModel(handle, "") if isinstance(place, InModel) else Namespace(tuple(shown.split("/")), handle)
    )
    assert handles.handle_at(shown) == handle
    assert handles.handle_of(shown) == handle
    assert handles.handle_of(handle) == handle


_TAIL = st.lists(
    st.sampled_from(["versions", "download", "3", "0", "x", "saved_model.pb", ".git"]), max_size=4
)
_VARIATION = st.tuples(
    st.sampled_from(["google", "other"]), st.just("demo"), st.just("frameworks") | st.none(),
    st.sampled_from(["TensorFlow2", "tensorFlow2", "JAX", "Frameworks", "frameworks"]),
    st.sampled_from(["variations", "versions", None]), st.just("small"),
)  # fmt: skip
_START = st.sampled_from(
    [
        "kaggle:", "https:/www.kaggle.com/models", "http:/Kaggle.com:80/api/v1/models",
        "https:/kaggle.com/models",
        "https:/www.kaggle.com/api/v2/models", "api/v1/models", "models", "",
        "https:/EXAMPLE.org", "http:/tfhub.dev",
    ]
)  # fmt: skip


@pytest.mark.parametrize("handles", [TFHUB, *KAGGLE_HUBS], ids=lambda handles: handles.hub)
@given(start=_START, variation=_VARIATION, cut=st.integers(1, 8), tail=_TAIL)
def test_links_lead_where_the_whole_path_leads(
    handles: HandleMap, start: str, variation: tuple[str | None, ...], cut: int, tail: list[str]
) -> None:
    """The kernel goes a component at a time, and follows each link; other users of a path do not."""
    steps = [*filter(None, variation)]
    names = [*filter(None, start.split("/")), *steps[:cut], *(tail if cut >= len(steps) else [])]
    at = ""
    try:
        for name in names[:-1]:
            at = f"{at}/{name}"
            for _ in range(4):
                place = handles.place(at)
                if isinstance(place, Alias):
                    at = posixpath.normpath(posixpath.join(posixpath.dirname(at), place.target))
        found: Place | None = handles.place(f"{at}/{names[-1]}")
    except RefusedError:
        found = None
    try:
        whole: Place | None = handles.place("/".join(names))
    except RefusedError:
        whole = None
    assert whole == found


_TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from("/.:@?#%\\[]~\0\n0123456789"), max_size=40)
_PIECE = st.sampled_from(
    [
        "/https:/", "/http:/", "/gs:/", "/s3:/", "kaggle:/", "tfhub.dev", "example.org", "..", "/1",
        "/x.tar.gz", "bucket/", "my.models-1/", "www.kaggle.com/models/", "o/m/jax/v/", "a/b",
        "?lite-format=tflite",
    ]
)  # fmt: skip
_PATH = st.lists(_TEXT | _PIECE, max_size=8).map("".join)


@given(path=_PATH)
@example(path="/https:/example.org:80@evil.net/a/b/1")
@example(path="/https:/example.org#@evil.net/a/1")
def test_no_path_leads_to_a_host_that_is_not_allowed(path: str) -> None:
    try:
        place = TFHUB.place(path)
    except RefusedError:
        return
    handle = getattr(place, "handle", None)
    if handle is None:
        return
    for url in (handle, compressed_url(handle)):
        is_allowed(url)
    # What the path says is what is asked for: no other part of it was read as a query.
    query = urlsplit(handle).query
    assert query == "" or KIND.fullmatch(query)


def is_allowed(url: str) -> None:
    split = urlsplit(url)
    assert f"{split.scheme}://{split.netloc}" in ALLOWED
    assert not split.fragment
    assert not re.search(r"[\x00-\x1f\x7f\\%]|/\.\.?(/|$)", split.path)


@given(text=_PATH | st.text(max_size=40))
@example(text="https://[::1/google/m/1")
@example(text="/http:/TFHUB.DEV")
@example(text="https://tfhub.dev\u2100/google/m/1")
def test_any_text_is_a_handle_or_refused(text: str) -> None:
    TFHUB.mount_path(text)
    try:
        handle = TFHUB.handle_of(text)
    except RefusedError:
        return
    assert TFHUB.handle_of(handle) == handle
    is_allowed(handle)


@given(handle=st.text(st.characters(codec="utf-8"), max_size=80))
def test_cache_key_is_the_sha1_of_the_handle_as_given(handle: str) -> None:
    assert cache_key(handle) == hashlib.sha1(handle.encode("utf-8")).hexdigest()


def test_cache_key_tells_spellings_apart_as_tensorflow_hub_does() -> None:
    assert cache_key("https://tfhub.dev/a/b/1") != cache_key("https://tfhub.dev/a/b/1/")


@pytest.mark.parametrize(
    ("handle", "query"),
    [
        ("https://tfhub.dev/a/b/1", {"tf-hub-format": ["compressed"]}),
        ("https://h.org/a/b/1?key=v", {"key": ["v"], "tf-hub-format": ["compressed"]}),
        ("https://h.org/x.tar.gz?a=1&b=2", {"a": ["1"], "b": ["2"], "tf-hub-format": ["compressed"]}),
        ("https://h.org/x.tar.gz?a=%26%3D", {"a": ["&="], "tf-hub-format": ["compressed"]}),
    ],
)
def test_url_of_the_archive_keeps_the_handles_own_query(handle: str, query: dict[str, list[str]]) -> None:
    url = compressed_url(handle)
    assert parse_qs(urlsplit(url).query) == query
    assert url.startswith(handle.partition("?")[0] + "?")


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (("https", "a.org"), ("https", "a.org:443"), True),
        (("https", "a.org"), ("http", "a.org"), True),
        (("https", "a.org"), ("http", "A.ORG:80"), True),
        (("http", "a.org:8500"), ("https", "a.org:8500"), True),
        (("https", "a.org"), ("https", "a.org:8443"), False),
        (("http", "a.org:8500"), ("http", "a.org"), False),
        (("https", "a.org"), ("https", "b.org"), False),
        (("http", "[::1]:80"), ("http", "[::1]"), True),
    ],
)
def test_same_service(first: tuple[str, str], second: tuple[str, str], same: bool) -> None:
    one, other = Address.parse(*first), Address.parse(*second)
    assert one.same_service(other) is same
    assert other.same_service(one) is same


def test_allowed_host_with_a_port_is_allowed_at_that_port_only() -> None:
    handles = HandleMap("https://tfhub.dev", ["a.org:81"])
    assert handles.allows(Address.parse("http", "a.org:81"))
    assert not handles.allows(Address.parse("http", "a.org"))
    assert not handles.allows(Address.parse("https", "a.org:443"))


@pytest.mark.parametrize(
    ("handle", "version"),
    [
        ("https://h/a/b/12", "12"),
        ("https://h/a/b", None),
        ("https://h/a/b/1x", None),
        ("https://h/x.tar.gz", None),
        ("https://h/a/lite-model/m/2/d/1?lite-format=tflite", "1"),
        ("https://h/a/1?tfjs-format=compressed", "1"),
        ("https://h/a/1?x=y", None),
        ("gs://bucket/a/3", "3"),
        ("gs://bucket/a", None),
        (f"{VARIATION}/3", "3"),
        (VARIATION, None),
        ("https://www.kaggle.com/models/o/m/gemmaCpp/2", None),
        ("https://www.kaggle.com/models/o/m/frameworks/jax/variations/2/versions/4", "4"),
        ("https://www.kaggle.com/models/o/m/4", None),
    ],
)
def test_version_of_a_handle(handle: str, version: str | None) -> None:
    assert version_of(handle) == version


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tgz"])
def test_archive_names(name: str) -> None:
    assert is_archive(name)
    assert not is_archive(name + ".txt")
    assert not is_archive(name.replace(".", "_"))
