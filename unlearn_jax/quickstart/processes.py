"""One process or several, one device or several: `launch/processes.sh` says so in the environment, `--devices` on the line."""

import os

import jax
from jax.sharding import Mesh

from pixel_jax.parallel import make_mesh
from pixel_jax.parallel.mesh import use_cores
from pixel_jax.parallel.processes import COUNT, join


def start(devices: int | None = None) -> Mesh | None:
    """Joins the processes there are and returns a mesh of `devices` devices, whose axis `data` has them all; None for one.

    Called before JAX has started. On a CPU the devices are made for the purpose; None takes those that there are.
    """
    if devices is not None:
        processes = int(os.environ.get(COUNT, 1))
        if devices % processes:
            raise ValueError(f"{devices} devices cannot be spread over {processes} processes evenly")
        use_cores(devices // processes)
    join()
    found = jax.devices()
    count = devices or len(found)
    if count > len(found):
        raise ValueError(f"{count} devices were asked for, there are {len(found)}")
    return make_mesh({"data": count}, found[:count]) if count > 1 else None
