"""The array types that signatures name. Shapes stand beside them as `dtype [axes]`, as in `int32 [B, T]`; `...` is any axes."""

from typing import Any, TypeAlias

import jax
import numpy as np

AnyArray: TypeAlias = jax.Array | np.ndarray  # on a device, traced, or on the host
Scalar: TypeAlias = float | jax.Array | np.ndarray  # a number, or an array of no axes
Key: TypeAlias = jax.Array  # of `jax.random`
Params: TypeAlias = Any  # a pytree of arrays, whose structure no type can tell
