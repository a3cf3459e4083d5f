"""Several processes as one computation: who is there, what each holds, and how they end together.

Every process runs the same program. `JAX_NUM_PROCESSES` in the environment says that there are others: a number beside
`JAX_COORDINATOR_ADDRESS` and `JAX_PROCESS_ID` (as `launch/processes.sh` sets them), or `auto`, where JAX asks the cluster
(Slurm, Open MPI, TPU pods, GKE).
"""

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pixel_jax import terminal

COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HEARTBEAT = 60  # seconds of silence after which a process counts as dead and the others end
LOST = 43  # exit code of a process that ends because a step that all take part in has failed


def initialize(environment: Mapping[str, str] = os.environ, *, heartbeat: int = HEARTBEAT) -> None:
    """Joins the processes that the environment speaks of, if it does. Called before JAX has started."""
    count = environment.get(COUNT, "1")
    if count != "auto" and int(count) < 2:
        return
    # SIGTERM is left to `training.preemption`. JAX's service takes it for all and agrees on a number to stop at, of those that
    # it was asked about; but it is asked by Orbax, too, with other numbers.
    jax.config.update("jax_enable_preemption_service", False)
    where = {} if count == "auto" else address(environment)
    jax.distributed.initialize(**where, heartbeat_timeout_seconds=heartbeat)
    if jax.default_backend() == "cpu":
        # XLA's CPU runtime keeps the collectives of a program in their order only if it has compiled the program itself:
        # in one read from a cache each is ordered after itself alone, and processes then wait for different ones.
        jax.config.update("jax_enable_compilation_cache", False)


def address(environment: Mapping[str, str]) -> dict:
    """The arguments of `jax.distributed.initialize`."""
    missing = [name for name in (COORDINATOR, INDEX) if name not in environment]
    if missing:
        raise ValueError(f"{COUNT} is set without {' and '.join(missing)}: launch/processes.sh sets all three")
    return {
        "coordinator_address": environment[COORDINATOR],
        "num_processes": int(environment[COUNT]),
        "process_id": int(environment[INDEX]),
    }


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, in the first process alone."""
    if is_main_process():
        terminal.say(text)


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Around a program of several processes: an error in one ends all of them.

    The one that fails says why and leaves at once, without waiting for the others at JAX's shutdown barrier. These find
    the connection broken and leave with the code `LOST`; where no collective can tell, they miss its heartbeat, and JAX
    aborts them (134).
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        here = f"process {jax.process_index()} of {jax.process_count()}"
        # What fails while arrays are gathered on the host comes as a ValueError with the same text.
        lost = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
        if lost and "RESOURCE_EXHAUSTED" not in str(
            error
        ):  # a device's memory is full: the same again at the next start
            reason, code = (
                "a step that all processes take part in has failed, most likely because one of them died",
                LOST,
            )
        else:
            reason, code = f"{type(error).__name__}: {error}", 1
        message = f"{here} ends: {reason}. Start all of them again: the run goes on from its newest checkpoint."
        try:
            traceback.print_exc()
            terminal.say(message, sys.stderr)
        finally:  # also when nobody reads standard error any more
            os._exit(code)


def barrier(place: str, seconds: int = 24 * 3600) -> None:
    """Waits until every process has come to the `place`, however far apart they are: a collective gives up on one that is
    half a minute behind (gloo). One that died is noticed by its heartbeat, and ends the others.
    """
    from orbax.checkpoint import multihost  # slow to import

    multihost.get_barrier_sync_fn()(key=place, timeout_ms=1000 * seconds)


def all_gather(x) -> np.ndarray:
    """[processes, ...]: the host array (or number) `x` of every process, on every process. Shapes must agree."""
    if jax.process_count() == 1:
        return np.asarray(x)[None]
    return np.asarray(multihost_utils.process_allgather(np.asarray(x), tiled=False))


def all_to_all(parcels: Sequence[bytes]) -> list[bytes]:
    """`parcels[p]` goes to process p; what process p had for this one comes back in place p. All processes call it.

    One all-to-all over one device a process, of parcels padded to a power of two (to share compiled programs).
    """
    count, here = jax.process_count(), jax.process_index()
    if len(parcels) != count:
        raise ValueError(f"{len(parcels)} parcels for {count} processes")
    if count == 1:
        return list(parcels)
    sizes = all_gather(np.array([len(x) for x in parcels], np.int32))
    width = 1 << int(sizes.max()).bit_length()
    padded = np.zeros((1, count, width), np.uint8)
    for p, parcel in enumerate(parcels):
        padded[0, p, : len(parcel)] = np.frombuffer(parcel, np.uint8)
    devices = [next(d for d in jax.devices() if d.process_index == p) for p in range(count)]
    mesh = Mesh(np.array(devices), ("process",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("process"))
    sent = jax.make_array_from_process_local_data(sharding, padded, (count, count, width))
    got = np.asarray(_transpose(sent, sharding).addressable_data(0))[0]
    return [got[p, : sizes[p, here]].tobytes() for p in range(count)]


@functools.partial(jax.jit, static_argnums=1)
def _transpose(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.swapaxes(x, 0, 1), sharding)
