"""Reads a model directory and says how much anonymous memory that took: python loading_worker.py DIRECTORY DEVICES."""

import json
import pathlib
import re
import sys
import threading

import jax
import numpy as np

from pixel_jax import from_pretrained
from pixel_jax.parallel.mesh import make_mesh, use_cores


def anonymous() -> int:
    """Bytes."""
    return int(re.search(r"RssAnon:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024


def main() -> None:
    directory, devices = sys.argv[1], int(sys.argv[2])
    use_cores(devices)
    mesh = make_mesh({"data": 1, "fsdp": devices // 2, "tensor": 2}) if devices > 1 else None
    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.zeros(8)))
    before, peak, stop = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model, _ = from_pretrained(directory, mesh=mesh)
    after = anonymous()
    stop.set()
    watcher.join()
    shards = [shard.data.nbytes for x in jax.tree.leaves(model) for shard in x.addressable_shards]
    found = {"rise": peak - before, "left": after - before, "weights": sum(shards), "largest": max(shards)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
