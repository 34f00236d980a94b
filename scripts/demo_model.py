"""Make a small text embedding as a SavedModel: a vocabulary (an asset) and a vector a word (a variable).

The directory to make is the only argument.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import tensorflow as tf

WORDS = ("a", "handle", "is", "path", "model", "hub", "mount", "and", "read")
DIMENSIONS = 4


class TextEmbedding(tf.Module):
    """Sentences to vectors: the mean of their words' vectors, zero for words that are not known."""

    def __init__(self, vocabulary: Path) -> None:
        super().__init__()
        file = tf.lookup.TextFileInitializer(
            str(vocabulary), tf.string, tf.lookup.TextFileIndex.WHOLE_LINE,
            tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER,
        )  # fmt: skip
        self.table = tf.lookup.StaticHashTable(file, default_value=len(WORDS))
        vectors = tf.random.stateless_uniform((len(WORDS), DIMENSIONS), seed=(1, 2), minval=-1, maxval=1)
        self.vectors = tf.Variable(tf.concat([vectors, tf.zeros((1, DIMENSIONS))], axis=0), name="vectors")

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "sentences")])
    def __call__(self, sentences: tf.Tensor) -> tf.Tensor:
        words = tf.strings.split(tf.strings.lower(sentences))
        return tf.reduce_mean(tf.gather(self.vectors, self.table.lookup(words)), axis=1)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        vocabulary = Path(temporary) / "words.txt"
        vocabulary.write_text("\n".join(WORDS) + "\n")
        tf.saved_model.save(TextEmbedding(vocabulary), sys.argv[1])


if __name__ == "__main__":
    main()
