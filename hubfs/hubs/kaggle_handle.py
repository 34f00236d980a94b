"""Kaggle's handles: one meaning, many spellings (PROTOCOLS §3). Pure: no request is sent."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hubfs.errors import RefusedError

#: As Kaggle's own pages and kagglehub spell them.
_FRAMEWORKS = {
    name.lower(): name
    for name in (
        "tensorFlow1", "tensorFlow2", "tfLite", "tfJs", "pyTorch", "jax", "flax", "pax", "maxText", "keras",
        "gemmaCpp", "ggml", "gguf", "coral", "scikitLearn", "mxnet", "onnx", "transformers", "tensorRtLlm",
        "triton", "vllm", "api", "other",
    )
}  # fmt: skip

_BEGINNING = re.compile(
    r"(?:kaggle:/{1,2}|https?:/{1,2}(?:www\.)?kaggle\.com/+(?:api/v1/+)?models(?:/+|$))", re.IGNORECASE
)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
_NUMBER = re.compile(r"[1-9][0-9]{0,9}")


@dataclass(frozen=True)
class KaggleModel:
    """A variation of a model at Kaggle, and perhaps its version.

    Attributes:
        framework: in the one spelling that hubfs uses: Kaggle takes any case.
        version: from 1; `None` is the latest.
    """

    owner: str
    model: str
    framework: str
    variation: str
    version: int | None = None

    @property
    def handle(self) -> str:
        """The one canonical handle. It is also the address of the page that people look at."""
        return f"https://www.kaggle.com/models/{self}"

    def __str__(self) -> str:
        """As kagglehub names it: `owner/model/framework/variation/version`."""
        name = f"{self.owner}/{self.model}/{self.framework}/{self.variation}"
        return name if self.version is None else f"{name}/{self.version}"


def is_kaggle(handle: str) -> bool:
    """Whether a handle is Kaggle's to resolve, be it well formed or not."""
    return _BEGINNING.match(handle) is not None


def parse(handle: str) -> KaggleModel:
    """What a handle in any of its forms means.

    These are `kaggle:/<owner>/<model>/<framework>/<variation>[/<version>]`, the same after
    `https://www.kaggle.com/models/` (or without `www.`, or after `/api/v1/models/`), and there also
    `<owner>/<model>/frameworks/<framework>/variations/<variation>[/versions/<version>]`. A query, a fragment,
    a slash and `/download` at the end make no difference.

    Raises:
        RefusedError: it is not one of these.
    """
    model, inner = split(re.split(r"[?#]", handle, maxsplit=1)[0])
    if inner not in ("", "download"):
        raise _not_a_model(handle)
    return model


def split(path: str) -> tuple[KaggleModel, str]:
    """The model that a path begins with, and the path below it. `//` may be folded to `/`.

    Raises:
        RefusedError: there is no model in it.
    """
    beginning = _BEGINNING.match(path)
    parts = [part for part in path[beginning.end() :].split("/") if part] if beginning else []
    if parts[2:3] == ["frameworks"]:
        names, rest = [*parts[:2], *parts[3:4], *parts[5:6]], parts[6:]
        if parts[4:5] != ["variations"]:
            raise _not_a_model(path)
        if rest[:1] == ["versions"] and _NUMBER.fullmatch("".join(rest[1:2])):
            rest = rest[1:]
    else:
        names, rest = parts[:4], parts[4:]
    if len(names) < 4 or not all(_NAME.fullmatch(name) for name in names):
        raise _not_a_model(path)
    version = int(rest.pop(0)) if rest and _NUMBER.fullmatch(rest[0]) else None
    owner, model, framework, variation = names
    # Frameworks that are not known yet may come.
    framework = _FRAMEWORKS.get(re.sub("[-_]", "", framework.lower()), framework.lower())
    return KaggleModel(owner, model, framework, variation, version), "/".join(rest)


def _not_a_model(handle: str) -> RefusedError:
    return RefusedError(
        f"{handle[:300]}: this is not a model at Kaggle",
        hint="give https://www.kaggle.com/models/<owner>/<model>/<framework>/<variation>/<version>",
    )
