"""A process that imports TensorFlow, says `ready`, then loads what it is told to and says how long it took.

`{"how": "saved_model" | "hub", "handle": …}` comes as a line on standard input; the answer goes to standard
output as a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import tensorflow as tf
import tensorflow_hub as hub


def load(how: str, handle: str) -> dict[str, Any]:
    began = resolved = time.perf_counter()
    if how == "hub":
        path = hub.resolve(handle)
        resolved = time.perf_counter()
        model = hub.load(path)
    else:
        model = tf.saved_model.load(handle)
    ended = time.perf_counter()
    return {
        "seconds": ended - began,
        "resolving": resolved - began,
        "ends": [float(table[-1, -1]) for table in model.tables],
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints
    # What the first operation of a process costs is not a model's.
    float(tf.constant(1.0) + 1)
    print("ready", file=answers, flush=True)
    try:
        answer = load(**json.loads(sys.stdin.readline()))
    except Exception as error:  # noqa: BLE001 - told to whoever waits for the answer
        answer = {"error": repr(error)}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
