"""Kaggle's handles: one meaning, many spellings (PROTOCOLS §3). Pure: no request is sent."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import dropwhile

from hubfs.errors import RefusedError
from hubfs.places import (
    Address,
    Alias,
    InModel,
    Namespace,
    Place,
    can_be_in_handle,
    can_be_object,
    is_litter,
    is_probed,
)

#: Names of Kaggle's server. The first is the one in handles.
HOSTS = (Address("https", "www.kaggle.com", 443), Address("https", "kaggle.com", 443))
MODELS = ("models",)
#: Where Kaggle's API has the same paths as its pages.
API_MODELS = ("api", "v1", "models")

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
    r"(?i:kaggle:)/{1,2}|(?i:https?:/{1,2}(?:www\.)?kaggle\.com)/+(?:api/v1/+)?models(?:/+|$)"
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
    path = re.split(r"[?#]", handle, maxsplit=1)[0]
    beginning = _BEGINNING.match(path)
    names = tuple(part for part in path[beginning.end() :].split("/") if part) if beginning else ()
    found = _variation(names, handle)
    if found is None:
        raise _not_a_model(handle)
    model, rest = found
    version, inner, _ = _version(rest)
    if inner:
        raise _not_a_model(handle)
    return dataclasses.replace(model, version=version)


def canonical(names: tuple[str, ...]) -> tuple[str, ...]:
    """A path at Kaggle's host, without the API's way to it. What is below `models` is left as it is."""
    return MODELS + names[len(API_MODELS) :] if names[: len(API_MODELS)] == API_MODELS else names


def place(names: tuple[str, ...], shown: Callable[[tuple[str, ...]], tuple[str, ...]]) -> Place:
    """What a path at Kaggle's host means.

    Args:
        names: the path, in any form that `parse` knows.
        shown: gives the mount path of a path at this host.

    Raises:
        RefusedError: it cannot be a model.
    """
    if names == API_MODELS:
        return Alias("../../models")
    names = canonical(names)
    if names[:1] != MODELS:
        if names != API_MODELS[: len(names)]:
            raise _not_a_model("/".join(("https://www.kaggle.com", *names)))
        return Namespace(shown(names), None)
    handle = "/".join(("https://www.kaggle.com", *names))
    found = _variation(names[1:], handle)
    if found is None:
        framework = _framework(names[-1])
        if len(names) == 4 and names[3] not in ("frameworks", framework):
            return Alias(framework)
        return Namespace(shown(names), None)
    model, rest = found
    if names[3] == "frameworks" and not rest:
        return Alias(f"../../../{model.framework}/{model.variation}")
    return _below_variation(model, rest, shown)


def _below_variation(
    model: KaggleModel, rest: tuple[str, ...], shown: Callable[[tuple[str, ...]], tuple[str, ...]]
) -> Place:
    version, inner, at_itself = _version(rest)
    if at_itself:
        return Alias(".")
    if version is not None:
        return InModel(dataclasses.replace(model, version=version).handle, "/".join(inner))
    if not inner:
        return Namespace(shown((*MODELS, *str(model).split("/"))), model.handle)
    # Below the four names there can only be the latest version's files, whatever they are called.
    probed = inner[0].isdecimal() or is_probed(inner[0])
    if probed or any(is_litter(name) or not can_be_object(name) for name in inner):
        raise RefusedError(f"{model.handle}: {'/'.join(inner)!r} is not looked for in the latest version")
    return InModel(model.handle, "/".join(inner))


def _variation(names: tuple[str, ...], handle: str) -> tuple[KaggleModel, tuple[str, ...]] | None:
    """The variation that the names after `models` begin with, and what follows; `None` if they end before.

    Raises:
        RefusedError: a name cannot be one of Kaggle's.
    """
    long = names[2:3] == ("frameworks",)
    size = 6 if long else 4
    fit = all(_NAME.fullmatch(name) and can_be_in_handle(name) for name in names[:size])
    # The word has one spelling, and there is no framework of that name.
    misspelt = "frameworks" in map(str.lower, names[3:4] if long else names[2:3])
    if not fit or misspelt or (long and names[4:5] not in ((), ("variations",))):
        raise _not_a_model(handle)
    if len(names) < size:
        return None
    framework, variation = (names[3], names[5]) if long else (names[2], names[3])
    return KaggleModel(names[0], names[1], _framework(framework), variation), names[size:]


def _framework(name: str) -> str:
    """A framework in its one spelling. Ones that are not known yet may come."""
    return _FRAMEWORKS.get(re.sub("[-_]", "", name.lower()), name.lower())


def _version(rest: tuple[str, ...]) -> tuple[int | None, tuple[str, ...], bool]:
    """The version below a variation, if there is one, and the path below it.

    The third value says that the last name is one of the words of a URL, which lead nowhere by themselves.
    """
    version, inner = None, tuple(dropwhile(("versions", "download").__contains__, rest))
    if inner and _NUMBER.fullmatch(inner[0]):
        version, rest = int(inner[0]), inner[1:]
        inner = tuple(dropwhile("download".__eq__, rest))
    return version, inner, bool(rest) and not inner


def _not_a_model(handle: str) -> RefusedError:
    return RefusedError(
        f"{handle[:300]}: this is not a model at Kaggle",
        hint="give https://www.kaggle.com/models/<owner>/<model>/<framework>/<variation>/<version>",
    )
