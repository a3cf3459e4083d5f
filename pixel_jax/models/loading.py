"""Loads weights from files to devices, shard by shard: the next shard is read while one is transferred.

Besides what the devices hold, the host has at most two shards in memory.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from pixel_jax.models.tensors import Tensor, is_finite
from pixel_jax.parallel.processes import waiting
from pixel_jax.terminal import bar

READERS = min(8, os.cpu_count() or 1)  # threads that read one shard
BLOCK = 2**20  # elements that are read, checked and converted together


@dataclass(frozen=True)
class Wanted:
    """A weight to load: its tensors in files, and its sharding."""

    shape: tuple[int, ...]
    sharding: Sharding
    tensors: Sequence[Tensor]  # one for each layer of a stacked weight; otherwise one

    @property
    def stacked(self) -> bool:
        """Whether the tensors are the weight's layers."""
        return len(self.shape) > len(self.tensors[0].shape)


@dataclass(frozen=True)
class Shard:
    """A part of a weight, and the local devices that have it."""

    weight: int
    index: tuple[slice, ...]
    devices: tuple[SingleDeviceSharding, ...]
    shape: tuple[int, ...]


def load_arrays(weights: Sequence[Wanted], dtype: np.dtype, label: str) -> list[jax.Array]:
    """Loads weights onto their devices. A process reads the shards of its own devices, each once.

    Args:
        weights: the weights, whose tensors have been checked for shape and type.
        dtype: of the arrays.
        label: what is being read, in words, for those who wait.

    Raises:
        FileError: a tensor holds NaN or infinity. The message names it.
    """
    shards = [shard for number, weight in enumerate(weights) for shard in _local_shards(number, weight)]
    pieces: list[list[jax.Array]] = [[] for _ in weights]
    sizes = [int(np.prod(shard.shape)) * dtype.itemsize for shard in shards]
    total = sum(sizes)
    with (
        ThreadPoolExecutor(1) as ahead,
        ThreadPoolExecutor(READERS) as readers,
        waiting(label) as wait,
    ):
        read = lambda shard: _read(weights[shard.weight], shard, dtype, readers)
        coming = ahead.submit(read, shards[0]) if shards else None  # a process may have no part of the mesh
        done = 0
        for shard, size, following in zip(shards, sizes, [*shards[1:], None], strict=True):
            assert coming is not None
            values = coming.result()
            coming = None if following is None else ahead.submit(read, following)
            pieces[shard.weight] += [jax.device_put(values, device) for device in shard.devices]
            jax.block_until_ready(pieces[shard.weight][-len(shard.devices) :])
            del values  # before the shard after the next is read
            done += size
            wait.at(f"{bar(done / max(total, 1))} {done / 1e9:.1f} of {total / 1e9:.1f} GB")
    return [
        jax.make_array_from_single_device_arrays(weight.shape, weight.sharding, arrays, dtype=dtype)
        for weight, arrays in zip(weights, pieces, strict=True)
    ]


def _local_shards(number: int, weight: Wanted) -> list[Shard]:
    """The shards of weight `number` that this process's devices have, each once."""
    devices: dict[tuple[tuple[int, int], ...], list[SingleDeviceSharding]] = {}
    for device, index in weight.sharding.addressable_devices_indices_map(weight.shape).items():
        ranges = [x.indices(size)[:2] for x, size in zip(index or (), weight.shape, strict=True)]
        devices.setdefault(tuple(ranges), []).append(SingleDeviceSharding(device))
    return [
        Shard(number, tuple(slice(*x) for x in ranges), tuple(holders), tuple(stop - start for start, stop in ranges))
        for ranges, holders in devices.items()
    ]


def _read(weight: Wanted, shard: Shard, dtype: np.dtype, readers: ThreadPoolExecutor) -> np.ndarray:
    """Reads a shard into the host's memory."""
    out = np.empty(shard.shape, dtype)
    if weight.stacked:
        layers = weight.tensors[shard.index[0]]
        jobs = [(tensor, shard.index[1:], out[i, ...]) for i, tensor in enumerate(layers)]
    else:
        jobs = [(weight.tensors[0], shard.index, out)]
    list(readers.map(lambda job: _copy(*job), jobs))
    return out


def _copy(tensor: Tensor, index: tuple[slice, ...], out: np.ndarray) -> None:
    """Copies and converts part of a tensor into `out`, block by block, so that no second copy of it is in memory."""
    values = tensor.values()[index]
    if not values.ndim:
        values, out = values.reshape(1), out.reshape(1)
    rows = max(1, BLOCK * len(values) // max(1, values.size))
    for start in range(0, len(values), rows):
        block = np.ascontiguousarray(values[start : start + rows])
        if not is_finite(block):
            raise tensor.error("holds NaN or infinity")
        out[start : start + rows] = block
