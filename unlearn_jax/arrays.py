"""The types that signatures name: arrays on the device and on the host, scalars, and pytrees of them."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array  # on a device, or traced
HostArray: TypeAlias = np.ndarray
AnyArray: TypeAlias = jax.Array | np.ndarray
Scalar: TypeAlias = float | jax.Array | np.ndarray  # a number, or an array []
Key: TypeAlias = jax.Array  # of `jax.random`

# Pytrees, whose structure no type can tell.
Params: TypeAlias = Any  # floating point arrays: the adapter, and vectors of the same structure
Stack: TypeAlias = Any  # like Params, each leaf [k, ...]: k vectors
Example: TypeAlias = Any  # arrays, usually a dictionary; a batch of them has a leading axis

Product: TypeAlias = Callable[[Params], Params]  # v -> A v, or v -> A^-1 v
BatchProduct: TypeAlias = Callable[[Params, Any], Params]  # (v, k) -> A_k v, of the mini-batch number k
LossFunction: TypeAlias = Callable[[Params, Example], Any]  # -> a scalar, or (sum, weight)
