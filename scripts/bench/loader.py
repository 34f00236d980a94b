"""Imports TensorFlow, says `ready`, and then loads what it is told to, each in a process of its own.

An order is a line of JSON on standard input: the arguments of `load`. How long it took goes to standard
output as a line of JSON. The processes are forked from this one, which has TensorFlow imported but never runs
an operation: importing takes longer than many loads.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
import tensorflow_hub as hub


def load(how: str, handle: str, cache: str, environment: Mapping[str, str]) -> dict[str, Any]:
    os.environ.update(environment, TFHUB_CACHE_DIR=cache)
    # What the first operation of a process costs is not a model's.
    float(tf.constant(1.0) + 1)
    began = resolved = time.perf_counter()
    if how == "saved_model":
        model = tf.saved_model.load(handle)
    else:
        path = hub.resolve(handle)
        resolved = time.perf_counter()
        model = hub.load(path) if how == "hub" else None
    ended = time.perf_counter()
    return {
        "seconds": ended - began,
        "resolving": resolved - began,
        "ends": [float(table[-1, -1]) for table in model.tables] if model else [],
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                answer = load(**json.loads(line))
            except Exception as error:  # noqa: BLE001 - told to whoever waits for the answer
                answer = {"error": repr(error)}
            print(json.dumps(answer), file=answers, flush=True)
            os._exit(0)
        if status := os.waitpid(child, 0)[1]:
            print(json.dumps({"error": f"the process ended with status {status}"}), file=answers, flush=True)


if __name__ == "__main__":
    main()
