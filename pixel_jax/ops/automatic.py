"""Pixels on meshes whose axes are Explicit, the default of `jax.make_mesh`."""

from collections.abc import Callable

import jax


def on_automatic_axes(function: Callable, *arrays):
    """`function(*arrays)`, in which the compiler divides work over mesh axes that are Explicit outside.

    There the type of every intermediate value names its sharding, which gathers and reshapes of divided arrays cannot
    infer. The result of one call is not divided; that of a `vmap` is as the mapped axis was.
    """
    mesh = next((mesh for x in arrays if (mesh := jax.typeof(x).sharding.mesh).explicit_axes), None)
    if mesh is None:
        return function(*arrays)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.sharding.auto_axes(function, out_sharding=whole)(*arrays)
