"""`python -m scripts.bench.build_saved_model KIND BYTES DIRECTORY`: make a SavedModel with big variables."""

from __future__ import annotations

import sys

import numpy
import tensorflow as tf

from scripts.bench.models import payload

#: Bytes of one variable of `large`; 15 of them are the 1007 MB model.
_EACH = 64 << 20


def build(kind: str, size: int, directory: str) -> None:
    each = min(_EACH, size // 4) if kind == "large" else size
    module = tf.Module()
    module.tables = [tf.Variable(_table(kind, each, seed)) for seed in range(round(size / each))]
    module.lookup = tf.function(
        lambda ids: tf.gather(module.tables[0], ids),
        input_signature=[tf.TensorSpec([None], tf.int32)],
    )
    tf.saved_model.save(module, directory)


def _table(kind: str, size: int, seed: int) -> numpy.ndarray:
    """Rows of 128 floats, as an embedding has them."""
    size -= size % 512
    return numpy.frombuffer(b"".join(payload(kind, size, seed)), numpy.float32).reshape(-1, 128)


if __name__ == "__main__":
    build(sys.argv[1], int(sys.argv[2]), sys.argv[3])
