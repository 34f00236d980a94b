"""Settings: where each value comes from, tensorflow_hub's variables, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubfs.config import LoadFormat, Settings, default_config_file, env_name, parse_size
from hubfs.errors import ConfigError

FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
#: For each setting: what a flag gives, what the variable says and means, and the same for the file.
VALUES: dict[str, tuple[Any, tuple[str, Any], tuple[str, Any]]] = {
    "hub": ("https://flag.org", ("http://env.org", "http://env.org"), ('"https://f.org"', "https://f.org")),
    "allow_hosts": (
        ("flag.org", "gs://flag"), ("a.org,b:80 s3://env", ("a.org", "b:80", "s3://env")),
        ('["file.org"]', ("file.org",)),
    ),
    "cache_dir": ("/flag", ("/env", "/env"), ('"/file"', "/file")),
    "shared_cache": ("gs://flag/a", ("s3://env", "s3://env"), ('"gs://file/a/b"', "gs://file/a/b")),
    "memory_limit": (1 << 25, ("20MB", 20_000_000), ('"1GiB"', 1 << 30)),
    "load_format": ("compressed", ("UNCOMPRESSED", LoadFormat.UNCOMPRESSED), ('"auto"', LoadFormat.AUTO)),
    "verify_certificates": (False, ("true", False), ("false", False)),
    "download_progress": (True, ("0", True), ("true", True)),
    "max_model_size": (10, ("20MB", 20_000_000), ('"3GiB"', 3 << 30)),
    "max_model_files": (10, ("20", 20), ("30", 30)),
    "connections": (4, ("5", 5), ("6", 6)),
    "retries": (7, ("8", 8), ("9", 9)),
    "log_level": ("debug", ("warning", "warning"), ('"error"', "error")),
    "log_file": ("/flag.log", ("/env.log", "/env.log"), ('"/file.log"', "/file.log")),
}  # fmt: skip
for _name, _field in FIELDS.items():
    if isinstance(_field.default, bool):
        VALUES.setdefault(_name, (True, ("yes", True), ("true", True)))
    elif isinstance(_field.default, float):
        VALUES.setdefault(_name, (1.5, ("2.5", 2.5), ("3.5", 3.5)))

ConfigFile = Callable[[str], Path]


@pytest.fixture
def config_file(tmp_path: Path) -> ConfigFile:
    def write(text: str) -> Path:
        path = tmp_path / "config.toml"
        path.write_text(text)
        return path

    return write


def load(environ: dict[str, str] | None = None, file: Path | None = None, **flags: Any) -> Settings:
    return Settings.load(flags, environ or {}, file or Path("/dev/null"))


def test_every_setting_is_tried() -> None:
    assert VALUES.keys() == FIELDS.keys()


@pytest.mark.parametrize("name", FIELDS)
def test_default_stands_where_nothing_is_said(name: str) -> None:
    default = FIELDS[name].default
    if name == "cache_dir":
        default = str(Path(tempfile.gettempdir()) / "tfhub_modules")
    assert getattr(load(), name) == default


@pytest.mark.parametrize("name", FIELDS)
def test_file_overrides_the_default(name: str, config_file: ConfigFile) -> None:
    text, meaning = VALUES[name][2]
    assert getattr(load(file=config_file(f"{name} = {text}")), name) == meaning


@pytest.mark.parametrize("name", FIELDS)
def test_variable_overrides_the_file(name: str, config_file: ConfigFile) -> None:
    variable, (text, meaning) = env_name(FIELDS[name]), VALUES[name][1]
    file = config_file(f"{name} = {VALUES[name][2][0]}")
    assert getattr(load({variable: text}, file), name) == meaning


@pytest.mark.parametrize("name", FIELDS)
def test_flag_overrides_variable_and_file(name: str, config_file: ConfigFile) -> None:
    flag, (text, _), (in_file, _) = VALUES[name]
    settings = load({env_name(FIELDS[name]): text}, config_file(f"{name} = {in_file}"), **{name: flag})
    assert getattr(settings, name) == flag


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if isinstance(field.default, bool)])
def test_flag_can_turn_off_what_the_file_turns_on(name: str, config_file: ConfigFile) -> None:
    assert getattr(load(file=config_file(f"{name} = true"), **{name: False}), name) is False
    assert getattr(load(file=config_file(f"{name} = false"), **{name: True}), name) is True


@pytest.mark.parametrize("name", FIELDS)
def test_empty_variable_counts_as_not_set(name: str, config_file: ConfigFile) -> None:
    text, meaning = VALUES[name][2]
    file = config_file(f"{name} = {text}")
    assert getattr(load({env_name(FIELDS[name]): ""}, file), name) == meaning


@pytest.mark.parametrize("name", FIELDS)
def test_flag_that_is_none_counts_as_not_given(name: str, config_file: ConfigFile) -> None:
    text, meaning = VALUES[name][2]
    assert getattr(load(file=config_file(f"{name} = {text}"), **{name: None}), name) == meaning


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_documented(name: str) -> None:
    assert FIELDS[name].metadata["help"]


def test_variables_are_tensorflow_hubs_own_where_it_has_them() -> None:
    own = {name: env_name(field) for name, field in FIELDS.items() if env_name(field).startswith("TFHUB_")}
    assert own == {
        "cache_dir": "TFHUB_CACHE_DIR",
        "load_format": "TFHUB_MODEL_LOAD_FORMAT",
        "verify_certificates": "TFHUB_DISABLE_CERT_VALIDATION",
        "download_progress": "TFHUB_DOWNLOAD_PROGRESS",
    }
    assert env_name(FIELDS["read_timeout"]) == "HUBFS_READ_TIMEOUT"


@pytest.mark.parametrize(
    ("text", "verified"),
    [("true", False), ("True", True), ("TRUE", True), ("1", True), ("false", True), (" true", True)],
)  # fmt: skip
def test_certificate_check_is_off_for_exactly_true(text: str, verified: bool) -> None:
    assert load({"TFHUB_DISABLE_CERT_VALIDATION": text}).verify_certificates is verified


@pytest.mark.parametrize("text", ["1", "true", "0", "false", "no", " "])
def test_any_value_turns_download_progress_on(text: str) -> None:
    assert load({"TFHUB_DOWNLOAD_PROGRESS": text}).download_progress is True


@pytest.mark.parametrize("text", ["COMPRESSED", "compressed", "Compressed"])
def test_load_format_is_taken_in_any_case(text: str, config_file: ConfigFile) -> None:
    assert load({"TFHUB_MODEL_LOAD_FORMAT": text}).load_format is LoadFormat.COMPRESSED
    assert load(file=config_file(f'load_format = "{text}"')).load_format is LoadFormat.COMPRESSED
    assert load(load_format=text).load_format is LoadFormat.COMPRESSED


def test_environment_and_file_of_the_process_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    file = default_config_file(os.environ)
    file.parent.mkdir(parents=True)
    file.write_text("retries = 3\nread_timeout = 9\n")
    monkeypatch.setenv("HUBFS_RETRIES", "4")
    settings = Settings.load()
    assert (settings.retries, settings.read_timeout) == (4, 9.0)


def test_config_file_is_where_xdg_says_or_below_home() -> None:
    assert default_config_file({"XDG_CONFIG_HOME": "/x", "HOME": "/h"}) == Path("/x/hubfs/config.toml")
    assert default_config_file({"HOME": "/h"}) == Path("/h/.config/hubfs/config.toml")


BAD = [
    ("read_timeout", "soon", '"soon"'),
    ("read_timeout", "0", "0"),
    ("read_timeout", "-1", "-1"),
    ("read_timeout", "nan", "nan"),
    ("retries", "many", '"many"'),
    ("retries", "-1", "-1"),
    ("offline", "maybe", '"maybe"'),
    ("max_model_size", "big", '"big"'),
    ("max_model_size", "1XB", '"1XB"'),
    ("load_format", "zip", '"zip"'),
    ("log_level", "loud", '"loud"'),
    ("hub", "tfhub.dev", '"tfhub.dev"'),
    ("hub", "ftp://tfhub.dev", '"ftp://tfhub.dev"'),
    ("hub", "https://user:pw@tfhub.dev", '"https://user:pw@tfhub.dev"'),
    ("hub", "https://tfhub.dev?x=1", '"https://tfhub.dev?x=1"'),
    ("hub", "https://[::1", '"https://[::1"'),
    ("hub", "https://tfhub.dev:99999", '"https://tfhub.dev:99999"'),
    ("allow_hosts", "https://a.org", '["https://a.org"]'),
    ("allow_hosts", "a.org/path", '["a.org/path"]'),
    ("allow_hosts", "a.org:99999", '["a.org:99999"]'),
    ("allow_hosts", "gs://", '["gs://"]'),
    ("allow_hosts", "gs://bucket/dir", '["gs://bucket/dir"]'),
    ("allow_hosts", "gs://Bucket", '["gs://Bucket"]'),
    ("allow_hosts", "gcs://bucket", '["gcs://bucket"]'),
    ("shared_cache", "/srv/models", '"/srv/models"'),
    ("shared_cache", "https://bucket/prefix", '"https://bucket/prefix"'),
    ("shared_cache", "gs:/bucket", '"gs:/bucket"'),
    ("shared_cache", "gs://", '"gs://"'),
    ("shared_cache", "gs://b", '"gs://b"'),
    ("shared_cache", "gs://bucket//prefix", '"gs://bucket//prefix"'),
    ("shared_cache", "gs://bucket/a?x=1", '"gs://bucket/a?x=1"'),
    ("shared_cache", "s3://bucket/a#b", '"s3://bucket/a#b"'),
    ("memory_limit", "15MiB", '"15MiB"'),
    ("memory_limit", "0", "0"),
    ("memory_limit", "much", '"much"'),
]


@pytest.mark.parametrize(("name", "text", "in_file"), BAD)
def test_bad_value_names_the_setting_and_where_it_came_from(
    name: str, text: str, in_file: str, config_file: ConfigFile
) -> None:
    variable, file = env_name(FIELDS[name]), config_file(f"{name} = {in_file}")
    flag = (text,) if name == "allow_hosts" else text
    cases: list[tuple[str, Callable[[], Settings]]] = [
        (variable, lambda: load({variable: text})),
        (str(file), lambda: load(file=file)),
        ("command line", lambda: load(**{name: flag})),
    ]
    for source, attempt in cases:
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert name in str(caught.value)
        assert source in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"), [("retries", "true"), ("allow_hosts", '"a.org"'), ("hub", "5"), ("offline", "2")]
)
def test_value_of_another_type_in_the_file_is_refused(name: str, text: str, config_file: ConfigFile) -> None:
    with pytest.raises(ConfigError, match=name):
        load(file=config_file(f"{name} = {text}"))


def test_unknown_key_in_the_file_is_named_with_those_there_are(config_file: ConfigFile) -> None:
    file = config_file('cachedir = "/x"\n')
    with pytest.raises(
        ConfigError, match=rf"{re.escape(str(file))}: there is no setting 'cachedir'.*cache_dir"
    ):
        load(file=file)


@pytest.mark.parametrize("text", ["hub = ", "[[[", "hub = 'a'\nhub = 'b'"])
def test_file_that_is_not_toml_is_named(text: str, config_file: ConfigFile) -> None:
    file = config_file(text)
    with pytest.raises(ConfigError, match=re.escape(str(file))):
        load(file=file)


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'hub = "https://\xe9.org"')
    for path in (tmp_path, tmp_path / "latin.toml"):
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            load(file=path)


def test_missing_file_is_no_error(tmp_path: Path) -> None:
    assert load(file=tmp_path / "none.toml") == load()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("500", 500), ("1k", 1000), ("1K", 1000), ("1KB", 1000), ("1KiB", 1024),
        ("20MB", 20_000_000),
        ("1.5GiB", 3 << 29), (" 2 TB ", 2 * 10**12), ("1T", 10**12), ("1b", 1),
    ],
)  # fmt: skip
def test_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "GB", "1 2", "1e3", "1PB", "0x10", ".5", "1,5GB", "nan", "inf"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


BUCKET = "gs://bucket/prefix"
DEFAULT_CACHE = str(Path(tempfile.gettempdir()) / "tfhub_modules")


@pytest.mark.parametrize(
    ("file", "environ", "flags", "cache_dir", "shared_cache"),
    [
        ("", {}, {}, DEFAULT_CACHE, ""),
        # A bucket in tensorflow_hub's variable is the shared cache, wherever the local one is named.
        ("", {"TFHUB_CACHE_DIR": BUCKET}, {}, DEFAULT_CACHE, BUCKET),
        ("", {"TFHUB_CACHE_DIR": f"{BUCKET}/"}, {}, DEFAULT_CACHE, BUCKET),
        ("", {"TFHUB_CACHE_DIR": BUCKET}, {"cache_dir": "/flag"}, "/flag", BUCKET),
        ('cache_dir = "/file"', {"TFHUB_CACHE_DIR": BUCKET}, {}, "/file", BUCKET),
        ('cache_dir = "/file"', {"TFHUB_CACHE_DIR": BUCKET}, {"cache_dir": "/flag"}, "/flag", BUCKET),
        ('shared_cache = "s3://file"', {"TFHUB_CACHE_DIR": "/env"}, {}, "/env", "s3://file"),
        # And so elsewhere: who writes it there means the same.
        (f'cache_dir = "{BUCKET}"', {}, {}, DEFAULT_CACHE, BUCKET),
        (f'cache_dir = "{BUCKET}"', {"TFHUB_CACHE_DIR": "/env"}, {}, "/env", BUCKET),
        ("", {}, {"cache_dir": "s3://flag"}, DEFAULT_CACHE, "s3://flag"),
        ("", {"TFHUB_CACHE_DIR": "/env"}, {"cache_dir": "s3://flag"}, "/env", "s3://flag"),
        # The one that is named as such goes first, and the flag before the variable.
        ("", {"TFHUB_CACHE_DIR": BUCKET}, {"shared_cache": "s3://flag"}, DEFAULT_CACHE, "s3://flag"),
        ("", {"TFHUB_CACHE_DIR": BUCKET, "HUBFS_SHARED_CACHE": "s3://env"}, {}, DEFAULT_CACHE, "s3://env"),
        ("", {"TFHUB_CACHE_DIR": BUCKET}, {"cache_dir": "s3://flag"}, DEFAULT_CACHE, "s3://flag"),
    ],
)  # fmt: skip
def test_bucket_as_cache_directory_is_the_shared_cache(
    file: str, environ: dict[str, str], flags: dict[str, str], cache_dir: str, shared_cache: str,
    config_file: ConfigFile,
) -> None:  # fmt: skip
    settings = load(environ, config_file(file), **flags)
    assert (settings.cache_dir, settings.shared_cache) == (cache_dir, shared_cache)


def test_bucket_is_never_the_local_cache() -> None:
    with pytest.raises(ConfigError, match="cache_dir: gs://bucket is a bucket") as caught:
        Settings(cache_dir="gs://bucket")
    assert "--shared-cache" in caught.value.hint


@pytest.mark.parametrize("value", ["https://bucket/x", "gs://Bucket", "hdfs://host/path"])
def test_other_url_as_cache_directory_is_refused(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({"TFHUB_CACHE_DIR": value})
    assert value in str(caught.value)
    assert "TFHUB_CACHE_DIR" in str(caught.value)


def test_slash_at_the_end_of_the_shared_cache_makes_no_difference() -> None:
    assert load(shared_cache="gs://bucket/a/").shared_cache == "gs://bucket/a"


def test_least_memory_is_enough() -> None:
    assert load(memory_limit="16MiB").memory_limit == 16 << 20
    with pytest.raises(ConfigError, match="memory_limit: 16777215 bytes are too little") as caught:
        load(memory_limit=(16 << 20) - 1)
    assert "16 MiB" in caught.value.hint


def test_what_is_not_kept_cannot_be_verified_as_a_whole() -> None:
    with pytest.raises(ConfigError, match=r"verified_only: .* cannot be checked") as caught:
        load({"HUBFS_VERIFIED_ONLY": "true"}, load_format="uncompressed")
    assert "HUBFS_VERIFIED_ONLY" in str(caught.value)
    assert "--load-format" in caught.value.hint
    for load_format in ("auto", "compressed"):
        assert load(verified_only=True, load_format=load_format).verified_only


def test_cache_directory_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(cache_dir="models").cache_dir == str(tmp_path / "models")
    assert load(cache_dir="~/models").cache_dir == str(Path("~/models").expanduser())


def test_trailing_slash_of_the_hub_makes_no_difference() -> None:
    assert load(hub="https://tfhub.dev/") == load(hub="https://tfhub.dev")


@pytest.mark.parametrize(
    ("directory", "temporary"),
    [("/tmp/x/y", True), ("/var/tmp/x", True), ("/dev/shm/x", True), ("/srv/x", False), ("/tmpfiles", False)],
)  # fmt: skip
def test_cache_below_a_temporary_directory_is_known_as_such(directory: str, temporary: bool) -> None:
    assert load(cache_dir=directory).cache_is_temporary is temporary


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().hub = "https://other.org"  # type: ignore[misc]


@pytest.mark.parametrize("name", FIELDS)
def test_flags_made_of_settings_give_the_same_settings(name: str) -> None:
    settings = load(**{name: VALUES[name][0]})
    assert load(**json.loads(json.dumps(settings.to_flags()))) == settings


_POSITIVE = st.floats(min_value=0.001, max_value=1e9)


@given(
    hosts=st.lists(st.from_regex(r"[a-z0-9]{1,10}(:[1-9][0-9]{0,3})?", fullmatch=True), max_size=3),
    timeout=_POSITIVE,
    retries=st.integers(1, 10**6),
    size=st.integers(1, 10**18),
    load_format=st.sampled_from(LoadFormat),
    offline=st.booleans(),
)
def test_flags_round_trip(
    hosts: list[str], timeout: float, retries: int, size: int, load_format: LoadFormat, offline: bool
) -> None:
    settings = Settings(
        allow_hosts=tuple(hosts), read_timeout=timeout, retries=retries, max_model_size=size,
        load_format=load_format, offline=offline,
    )  # fmt: skip
    assert load(**json.loads(json.dumps(settings.to_flags()))) == settings
