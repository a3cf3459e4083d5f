"""The peak speed of the machine, measured in the same run: figures are given as shares of it."""

import dataclasses
import os
import platform
import time

import jax
import jax.numpy as jnp

from pixel_jax.bench.timing import finished


@dataclasses.dataclass(frozen=True)
class MachineSpeed:
    """The peak rates of a machine."""

    device: str
    devices: int
    cores: int
    matmul: float  # FLOP/s, float32 products of square matrices
    matmul_bf16: float  # FLOP/s
    read: float  # bytes/s, reading a matrix from memory once
    versions: dict[str, str]


def count_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure_machine(quick: bool) -> MachineSpeed:
    """Measures this machine."""
    side = 256 if quick else 2048 if jax.default_backend() == "cpu" else 8192
    rows = 1024 if quick else 2**14 if jax.default_backend() == "cpu" else 2**17
    device = jax.devices()[0]
    return MachineSpeed(
        device=device.device_kind if device.platform != "cpu" else f"{platform.machine()} CPU, no accelerator",
        devices=jax.device_count(),
        cores=count_cores(),
        matmul=_matmul(side, jnp.float32),
        matmul_bf16=_matmul(side, jnp.bfloat16),
        read=_read(rows, 2**13),
        versions={name: _version(name) for name in ("jax", "flax", "torch", "transformers", "Pillow", "trl")},
    )


def best_seconds(run, times: int = 7) -> float:
    """The shortest time of several runs, after one that is not counted."""
    finished(run())
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        finished(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _matmul(side: int, dtype) -> float:
    x = jnp.ones((side, side), dtype)
    product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
    return 2 * side**3 / best_seconds(lambda: product(x))


def _read(rows: int, columns: int) -> float:
    """The better of a matrix-vector product and a sum, over a matrix far larger than the caches."""
    matrix, vector = jnp.ones((rows, columns)), jnp.ones(columns)
    product, total = jax.jit(jnp.dot), jax.jit(jnp.sum)
    return matrix.nbytes / min(best_seconds(lambda: product(matrix, vector)), best_seconds(lambda: total(matrix)))


def _version(name: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
