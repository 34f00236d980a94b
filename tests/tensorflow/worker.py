"""A process that has TensorFlow and tensorflow_hub imported and does what the tests tell it to.

It reads a JSON line (`{"do": function, "with": {arguments}}`) from standard input, and answers with one:
`{"result": …}` or `{"error": exception's name, "message": …}`. What libraries print goes to standard error.
`tests/tensorflow/conftest.py` has the other end.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_hub as hub
import tf_keras
from absl import logging

SENTENCES = ["mount the hub", "a handle is a path", "nothing known"]
_WORDS = ("a", "handle", "is", "path", "model", "hub", "mount", "the")


class TextEmbedding(tf.Module):
    """Variables, a vocabulary as an asset, and a signature."""

    def __init__(self, vocabulary: Path) -> None:
        super().__init__()
        file = tf.lookup.TextFileInitializer(
            str(vocabulary), tf.string, tf.lookup.TextFileIndex.WHOLE_LINE,
            tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER,
        )  # fmt: skip
        self.table = tf.lookup.StaticHashTable(file, default_value=len(_WORDS))
        self.vectors = tf.Variable(tf.random.stateless_normal((len(_WORDS) + 1, 8), seed=(1, 2)))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def __call__(self, sentences: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(tf.gather(self.vectors, self.table.lookup(tf.strings.split(sentences))), axis=1)


class Big(tf.Module):
    """Variables that do not compress, 100 MB in ten tensors."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        shape = (megabytes // 10 * 250, 1000)
        self.parts = [tf.Variable(tf.random.stateless_normal(shape, seed=(3, i))) for i in range(10)]

    @tf.function(input_signature=[])
    def digests(self) -> tf.Tensor:
        return tf.stack([tf.reduce_sum(tf.bitcast(part, tf.int32)) for part in self.parts])


def save_models(directory: str) -> None:
    """`embed`, `keras` and `big` below a directory; `module`, one of TensorFlow 1, too."""
    root = Path(directory)
    vocabulary = root / "words.txt"
    vocabulary.write_text("\n".join(_WORDS) + "\n")
    tf.saved_model.save(TextEmbedding(vocabulary), str(root / "embed"))
    tf_keras.utils.set_random_seed(4)
    layers = [tf_keras.layers.Dense(16, "relu", input_shape=(6,)), tf_keras.layers.Dense(3)]
    tf_keras.Sequential(layers).save(root / "keras", save_format="tf")
    big = Big(100)
    tf.saved_model.save(big, str(root / "big"), signatures=big.digests.get_concrete_function())
    _save_module(root / "module")


def _save_module(directory: Path) -> None:
    """Doubles numbers; what tensorflow_hub made of a hub.Module as long as it had those."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.compat.v1.placeholder(tf.float32, [None])
        factor = tf.compat.v1.get_variable("factor", initializer=2.0)
        signature = tf.compat.v1.saved_model.predict_signature_def({"default": x}, {"default": x * factor})
        session.run(tf.compat.v1.global_variables_initializer())
        builder = tf.compat.v1.saved_model.Builder(str(directory))
        builder.add_meta_graph_and_variables(session, [], {"default": signature})
        builder.save()
    # ModuleDef { format: FORMAT_V3 }
    (directory / "tfhub_module.pb").write_bytes(b"\x08\x03")


def embed(path: str, how: str = "tf.saved_model.load", cache: str | None = None) -> list[Any]:
    """What the model `embed` at a path or URL gives for the sentences, called directly and by signature."""
    with _cache(cache):
        model = _loader(how)(path)
    called = model(tf.constant(SENTENCES))
    signed = model.signatures["serving_default"](tf.constant(SENTENCES))
    return [called.numpy().tolist(), next(iter(signed.values())).numpy().tolist()]


def embed_layer(path: str) -> list[Any]:
    """The same with hub.KerasLayer in a Keras model."""
    layer = hub.KerasLayer(path, input_shape=[], dtype=tf.string)
    return [tf_keras.Sequential([layer])(tf.constant(SENTENCES)).numpy().tolist()]


def keras(path: str) -> list[Any]:
    """The model `keras` as a layer that can be trained: its output, before and after one step of training."""
    layer = hub.KerasLayer(path, trainable=True, input_shape=(6,))
    model = tf_keras.Sequential([layer])
    x = tf.reshape(tf.range(12, dtype=tf.float32), (2, 6))
    before = model(x).numpy().tolist()
    model.compile("sgd", "mse")
    model.train_on_batch(x, tf.ones((2, 3)))
    return [len(layer.trainable_weights), before, model(x).numpy().tolist()]


def big(path: str, how: str = "tf.saved_model.load") -> list[Any]:
    """Checksums of the model `big`, from its own function and from the bytes of its variables."""
    model = _loader(how)(path)
    digests = model.digests().numpy().tolist()
    whole = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in model.parts))
    return [digests, whole.hexdigest()]


def module(path: str) -> list[float]:
    """The model `module`, a hub module of TensorFlow 1, loaded as TensorFlow 2 loads it."""
    model = hub.load(path)
    found: list[float] = model.signatures["default"](tf.constant([1.5, 4.0]))["default"].numpy().tolist()
    return found


def resolve(handle: str, cache: str) -> str:
    """hub.resolve with TFHUB_CACHE_DIR set to `cache`."""
    with _cache(cache):
        return str(hub.resolve(handle))


def resolve_as_configured(handle: str) -> str:
    """hub.resolve with the environment that the process was started with."""
    return str(hub.resolve(handle))


def ping() -> int:
    return os.getpid()


def _loader(how: str) -> Any:
    return {"tf.saved_model.load": tf.saved_model.load, "hub.load": hub.load}[how]


@contextlib.contextmanager
def _cache(directory: str | None) -> Iterator[None]:
    before = os.environ.get("TFHUB_CACHE_DIR")
    if directory is not None:
        os.environ["TFHUB_CACHE_DIR"] = directory
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TFHUB_CACHE_DIR", None)
        else:
            os.environ["TFHUB_CACHE_DIR"] = before


def main() -> None:
    # Libraries that print must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    logging.set_verbosity(logging.INFO)  # "already being downloaded", which a test waits for
    tf.config.threading.set_inter_op_parallelism_threads(2)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"result": globals()[order["do"]](**order["with"])}
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        tf_keras.backend.clear_session()
        gc.collect()
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
