"""Runs several processes as one computation: they start, exchange arrays, and end together.

Every process runs the same program. `JAX_NUM_PROCESSES` in the environment says that there are several: a number, beside
`JAX_COORDINATOR_ADDRESS` and `JAX_PROCESS_ID` (as `launch/processes.sh` sets them), or `auto`, where JAX asks the cluster
(Slurm, Open MPI, TPU pods, GKE).
"""

import contextlib
import contextvars
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pixel_jax import terminal
from pixel_jax.arrays import Scalar

COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HEARTBEAT = 60  # seconds without a sign of life after which a process counts as dead, and the others end
LOST = 43  # exit code of a process that ends because a step that all processes take part in has failed


def initialize(environment: Mapping[str, str] = os.environ, *, heartbeat: int = HEARTBEAT) -> None:
    """Joins the other processes, if the environment says that there are any. Call it before JAX starts."""
    count = environment.get(COUNT, "1")
    if count != "auto" and int(count) < 2:
        return
    # `training.preemption` handles SIGTERM. JAX's own service would have all processes agree on one of the step numbers that it
    # was asked about; but Orbax asks it, too, about other numbers.
    jax.config.update("jax_enable_preemption_service", False)
    where = {} if count == "auto" else address(environment)
    jax.distributed.initialize(**where, heartbeat_timeout_seconds=heartbeat)
    if jax.default_backend() == "cpu":
        # XLA's CPU runtime keeps the order of a program's collectives only if it has compiled the program itself. In a program
        # read from a cache, processes can wait for different collectives.
        jax.config.update("jax_enable_compilation_cache", False)


def address(environment: Mapping[str, str]) -> dict:
    """Reads the arguments of `jax.distributed.initialize` from the environment.

    Raises:
      ValueError: a variable is missing.
    """
    missing = [name for name in (COORDINATOR, INDEX) if name not in environment]
    if missing:
        raise ValueError(f"{COUNT} is set without {' and '.join(missing)}: launch/processes.sh sets all three")
    return {
        "coordinator_address": environment[COORDINATOR],
        "num_processes": int(environment[COUNT]),
        "process_id": int(environment[INDEX]),
    }


def is_main_process() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, in the main process only."""
    if is_main_process():
        terminal.say(text)


def waiting(what: str) -> terminal.Waiting:
    """Says what the program is doing during the block if that takes a while (`terminal.Waiting`), in the main process only."""
    return terminal.Waiting(what, shown=is_main_process())


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Ends all processes of a program when one of them raises an error in this context.

    The process that fails says why and exits at once, without waiting for the others at JAX's shutdown barrier. The others find
    the connection broken and exit with the code `LOST`; where no collective fails, they miss its heartbeat, and JAX
    aborts them (exit code 134).
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        here = f"process {jax.process_index()} of {jax.process_count()}"
        # A failure while arrays are gathered on the host is raised as a ValueError with the same text.
        lost = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
        # Where a device's memory is full, no process has died, and the next start would fail in the same way.
        if lost and "RESOURCE_EXHAUSTED" not in str(error):
            code = LOST
            reason = "a step that all processes take part in has failed, most likely because one of them died"
        else:
            reason, code = f"{type(error).__name__}: {error}", 1
        message = f"{here} ends: {reason}. Start all of them again: the run goes on from its newest checkpoint."
        try:
            traceback.print_exc()
            terminal.say(message, sys.stderr)
        finally:  # also where standard error is closed
            os._exit(code)


GROUP: contextvars.ContextVar[tuple[Any, ...] | None] = contextvars.ContextVar("GROUP", default=None)


@contextlib.contextmanager
def among(mesh: Mesh | None) -> Iterator[None]:
    """In this context and thread, exchanges are among the processes of `mesh` alone, by its devices.

    So each of two groups of devices can exchange arrays of its own while the other computes. This process must be one of them.
    """
    token = GROUP.set(None if mesh is None else _one_each(mesh.devices.flat))
    try:
        yield
    finally:
        GROUP.reset(token)


def _one_each(devices: Iterable[Any]) -> tuple[Any, ...]:
    """The first device of each process, in the order of processes."""
    first: dict[int, Any] = {}
    for device in devices:
        first.setdefault(device.process_index, device)
    return tuple(first[process] for process in sorted(first))


def _group() -> tuple[Any, ...]:
    """A device of each process that exchanges arrays (`among`)."""
    return GROUP.get() or _one_each(jax.devices())


def members() -> list[int]:
    """The processes that exchange arrays: all, or those of `among`."""
    return [device.process_index for device in _group()]


def barrier(name: str, seconds: int = 24 * 3600) -> None:
    """Waits until every process (`members`) has reached the barrier of this name.

    A collective would give up on a process that is half a minute behind (gloo); this waits for `seconds`. The heartbeat tells
    that a process has died, and ends the others.
    """
    from orbax.checkpoint import multihost  # slow to import

    if len(group := members()) > 1:
        those = None if len(group) == jax.process_count() else set(group)
        multihost.get_barrier_sync_fn(processes=those)(key=name, timeout_ms=1000 * seconds)


def all_gather(x: Scalar) -> np.ndarray:
    """Gathers the host array (or number) `x` of every process, on every process: [members, ...]. Shapes must agree."""
    own = np.asarray(x)
    return own[None] if len(members()) == 1 else _on_all(own, _same)


def gather_bytes(parcel: bytes) -> list[bytes]:
    """Gathers the bytes of every process, on every process, in the order of `members`. All of them call it."""
    sizes = all_gather(np.asarray(len(parcel), np.int32))
    # Padded to a power of two, to share compiled programs.
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: len(parcel)] = np.frombuffer(parcel, np.uint8)
    return [row[:size].tobytes() for row, size in zip(all_gather(padded), sizes, strict=True)]


def broadcast(x: np.ndarray, source: int) -> np.ndarray:
    """Returns the host array of the process `source` on every process, to the bit. All processes call it, with one shape."""
    if len(members()) == 1:
        return x
    words = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    words = words if source == jax.process_index() else np.zeros_like(words)
    received = _on_all(words, _total)
    return received.view(x.dtype).reshape(x.shape)


def all_to_all(parcels: Sequence[bytes]) -> list[bytes]:
    """Sends `parcels[p]` to process p, and returns what each process p sent to this one, in order. All processes call it.

    It is one all-to-all over one device a process, of parcels padded to a power of two to share compiled programs. Only
    `members` send and receive.

    Raises:
      ValueError: there is not one parcel for each process.
    """
    if len(parcels) != jax.process_count():
        raise ValueError(f"{len(parcels)} parcels for {jax.process_count()} processes")
    group, devices = members(), _group()
    count, here = len(group), group.index(jax.process_index())
    if count == 1:
        return list(parcels)
    sizes = all_gather(np.array([len(parcels[p]) for p in group], np.int32))
    width = 1 << int(sizes.max()).bit_length()
    padded = np.zeros((1, count, width), np.uint8)
    for i, p in enumerate(group):
        padded[0, i, : len(parcels[p])] = np.frombuffer(parcels[p], np.uint8)
    mesh = Mesh(np.array(devices), ("process",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("process"))
    sent = jax.make_array_from_process_local_data(sharding, padded, (count, count, width))
    received = np.asarray(_transpose(sent, sharding).addressable_data(0))[0]
    arrived = [b""] * jax.process_count()
    for i, p in enumerate(group):
        arrived[p] = received[i, : sizes[i, here]].tobytes()
    return arrived


def _on_all(own: np.ndarray, compute: Callable[[jax.Array], jax.Array]) -> np.ndarray:
    """Computes `compute` of the arrays of all processes, [members, ...], and returns it on each."""
    own = own.astype(jax.dtypes.canonicalize_dtype(own.dtype))
    devices = _group()
    mesh = Mesh(np.array(devices), ("process",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("process"))
    with jax.set_mesh(mesh):
        sent = jax.make_array_from_process_local_data(split, own[None], (len(devices), *own.shape))
        result = jax.jit(compute, out_shardings=NamedSharding(mesh, PartitionSpec()))(sent)
    return np.asarray(result.addressable_data(0))


def _same(x: jax.Array) -> jax.Array:
    return x


def _total(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=0, dtype=x.dtype)


@functools.partial(jax.jit, static_argnums=1)
def _transpose(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.swapaxes(x, 0, 1), sharding)
