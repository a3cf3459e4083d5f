"""One of several processes that read a model together: python several_loading_worker.py DIRECTORY OUT.

Each reads what its devices hold, computes logits, takes part in saving the model to OUT/model, and reads that again. What it
found is in OUT/found-N.json and OUT/logits-N.npy, N its number.
"""

import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import pixel_jax
from pixel_jax.models import loading
from pixel_jax.models.model import forward_hidden
from pixel_jax.parallel import make_mesh
from pixel_jax.parallel.processes import initialize

TOKENS = np.arange(2 * 12).reshape(2, 12) % 50 + 3


def held(model) -> int:
    """Bytes of the different parts of weights that this process's devices hold."""
    parts = {
        (number, str(shard.index)): shard.data.nbytes
        for number, x in enumerate(jax.tree.leaves(model))
        for shard in x.addressable_shards
    }
    return sum(parts.values())


def counted(read: list[int]):
    """As `loading._copy`, which alone reads what a file is mapped to; adds up the bytes."""
    copy = loading._copy

    def count(tensor, index, out):
        part = [len(range(*x.indices(size))) for x, size in zip(index, tensor.shape, strict=True)]
        read.append(math.prod(part) * tensor.values().itemsize)
        copy(tensor, index, out)

    return count


def main() -> None:
    directory, out = map(pathlib.Path, sys.argv[1:])
    initialize()
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2})
    read: list[int] = []
    loading._copy = counted(read)
    model, _ = pixel_jax.from_pretrained(directory, mesh=mesh)
    found = {"read": sum(read), "held": held(model), "whole": sum(x.nbytes for x in jax.tree.leaves(model))}
    found["devices"] = len({device for x in jax.tree.leaves(model) for device in x.sharding.device_set})

    @jax.jit
    def logits(model):
        tokens = jnp.asarray(TOKENS, jnp.int32)
        hidden = forward_hidden(model, tokens, tokens > 0, None)
        return jax.lax.with_sharding_constraint(model.logits(hidden), NamedSharding(mesh, PartitionSpec()))

    with jax.set_mesh(mesh):
        first = np.asarray(logits(model))
    pixel_jax.save_pretrained(model, None, out / "model")
    again, _ = pixel_jax.from_pretrained(out / "model", mesh=mesh)
    with jax.set_mesh(mesh):
        found["same"] = bool((np.asarray(logits(again)) == first).all())
    (out / f"found-{jax.process_index()}.json").write_text(json.dumps(found))
    np.save(out / f"logits-{jax.process_index()}.npy", first)


if __name__ == "__main__":
    main()
