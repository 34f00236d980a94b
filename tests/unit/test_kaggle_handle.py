"""The many spellings of Kaggle's handles."""

from __future__ import annotations

import pytest

from hubfs.errors import RefusedError
from hubfs.kaggle_handle import is_kaggle, parse

HANDLE = "google/demo/tensorFlow2/small"
URL = f"https://www.kaggle.com/models/{HANDLE}"


@pytest.mark.parametrize(
    "handle",
    [
        URL + "/3",
        "https://kaggle.com/models/google/demo/tensorFlow2/small/3",
        "http://www.kaggle.com/models/google/demo/tensorFlow2/small/3/",
        "HTTPS://WWW.Kaggle.com/models/google/demo/TENSORFLOW2/small/3",
        "https://www.kaggle.com/models/google/demo/TensorFlow2/small/3/download",
        "https://www.kaggle.com/models/google/demo/tensor_flow_2/small/3?tf-hub-format=compressed",
        "https://www.kaggle.com/models/google/demo/frameworks/TensorFlow2/variations/small/versions/3",
        "https://www.kaggle.com/models/google/demo/frameworks/tensorflow2/variations/small/versions/3/download#x",
        "https://www.kaggle.com/api/v1/models/google/demo/tensorFlow2/small/3/download",
        "https:/www.kaggle.com/models/google/demo/tensorFlow2/small/3",
        "kaggle:/google/demo/tensorFlow2/small/3",
        "kaggle://google/demo/Tensorflow2/small/3",
    ],
)
def test_all_spellings_are_one_handle(handle: str) -> None:
    assert is_kaggle(handle)
    assert parse(handle).handle == URL + "/3"
    assert parse(parse(handle).handle) == parse(handle)


@pytest.mark.parametrize(
    ("handle", "name"),
    [
        ("kaggle:/google/demo/tensorFlow2/small", HANDLE),
        (URL, HANDLE),
        (f"{URL}/download", HANDLE),
        ("https://kaggle.com/models/o/m/frameworks/PyTorch/variations/v-1.5_x", "o/m/pyTorch/v-1.5_x"),
        ("kaggle:/o/m/gemmacpp/2", "o/m/gemmaCpp/2"),
        ("kaggle:/o/m/gemmacpp/2/4", "o/m/gemmaCpp/2/4"),
        ("kaggle:/o/m/frameworks/jax/variations/versions/versions/7", "o/m/jax/versions/7"),
        ("kaggle:/o/m/NewOne/v/1", "o/m/newone/v/1"),
        ("kaggle:/o/m/jax/v/versions/7", "o/m/jax/v/7"),
    ],
)
def test_handle_means(handle: str, name: str) -> None:
    assert str(parse(handle)) == name


@pytest.mark.parametrize(
    "handle",
    [
        "https://www.kaggle.com/models",
        "https://www.kaggle.com/models/google/demo",
        "https://www.kaggle.com/models/google/demo/frameworks/TensorFlow2",
        "https://www.kaggle.com/models/google/demo/tensorFlow2/small/1/saved_model.pb",
        "https://www.kaggle.com/models/google/demo/tensorFlow2/small/0",
        "https://www.kaggle.com/models/google/demo/tensorFlow2/small/latest",
        "kaggle:/../../tensorFlow2/small/1",
        "kaggle:/google/de%2Fmo/tensorFlow2/small/1",
        "kaggle:/google/demo/tensorFlow2/sm all/1",
        "kaggle:/google/demo/tensorFlow2/__pycache__/1",
        "kaggle:/google/demo/Frameworks/jax/v/1",
        "kaggle:/google/demo/frameworks/jax/versions/v/1",
        "https://tfhub.dev/google/demo/1",
    ],
)
def test_what_is_not_a_model_is_refused(handle: str) -> None:
    with pytest.raises(RefusedError, match="not a model at Kaggle"):
        parse(handle)


@pytest.mark.parametrize(
    "handle",
    [
        "https://www.kaggle.com.example.org/models/a/b/c/d/1",
        "https://www.kaggle.com@example.org/models/a/b/c/d/1",
        "https://evil.kaggle.com/models/a/b/c/d/1",
        "https://www.kaggle.com/datasets/a/b",
        "https://www.kaggle.com/modelsx/a/b/c/d/1",
        "google/demo/1",
    ],
)
def test_other_services_are_not_kaggle(handle: str) -> None:
    assert not is_kaggle(handle)
