"""Operations on pixels under meshes whose axes are Explicit, the default of `jax.make_mesh`."""

from collections.abc import Callable
from typing import TypeVar, cast

import jax

from pixel_jax.arrays import AnyArray

T = TypeVar("T")


def on_automatic_axes(function: Callable[..., T], *arrays: AnyArray) -> T:
    """Returns `function(*arrays)`, in which the compiler divides work over mesh axes that are Explicit outside.

    Under Explicit axes the type of every intermediate value names its sharding, which cannot be inferred for gathers and
    reshapes of divided arrays. The result of one call is replicated; that of a `vmap` is divided as the mapped axis was.
    """
    mesh = next((mesh for x in arrays if (mesh := jax.typeof(x).sharding.mesh).explicit_axes), None)
    if mesh is None:
        return function(*arrays)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    # `auto_axes` is typed as a decorator, too, which returns a function.
    return cast(T, jax.sharding.auto_axes(function, out_sharding=whole)(*arrays))
