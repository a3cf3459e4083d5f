"""Checks of arguments that would otherwise fail silently, or with a message of JAX or Flax; each error names the remedy."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal  # pyright: ignore[reportPrivateImportUsage]

from unlearn_jax.arrays import Example, Params
from unlearn_jax.curvature import Curvature, product
from unlearn_jax.loss import sum_and_weight
from unlearn_jax.objective import Objective, zeros

RANDOM = ("random_bits", "random_gamma", "threefry2x32", "rng_bit_generator", "rng_uniform")
KERNELS = ("pallas_call", "dot_product_attention", "cudnn", "custom_call", "ffi_call", "callback")


def check_params(params: Params) -> None:
    """Raises ValueError or FloatingPointError unless the parameters are finite floating point arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(params)

    def name_of(path):
        return jax.tree_util.keystr(path) or "the array"

    if not leaves:
        raise ValueError("the adapter has no arrays")
    for path, leaf in leaves:
        dtype = getattr(leaf, "dtype", type(leaf).__name__)
        if not (hasattr(leaf, "dtype") and jnp.issubdtype(dtype, jnp.floating)):
            raise ValueError(f"{name_of(path)} of the adapter is {dtype}; it must be a floating point array")
    if not bool(all_finite(params)):
        bad = [name_of(path) for path, leaf in leaves if not bool(all_finite(leaf))]
        raise FloatingPointError(f"{', '.join(bad)} of the adapter is not finite")


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every number of a pytree is finite, bool []."""
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


@contextlib.contextmanager
def _flax_errors() -> Iterator[None]:
    """A context for a trace of the loss: turns Flax's error about a changed module into one that names the remedy."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "TraceContextError":  # of Flax, which is not needed here
            raise
        raise ValueError(
            "the loss changes a Flax module, as dropout that is left on counts its random numbers: call model.eval() first, and "
            f"keep other state out of the loss. Flax says: {error}"
        ) from error


def check_widened(loss: Callable, params: Params, wide: Params, example: Example) -> None:
    """Raises ValueError unless a loss that takes the adapter's own 16 bits takes float32, too."""
    with _flax_errors():  # the loss's own errors first
        jax.eval_shape(functools.partial(sum_and_weight, loss), params, example)
    try:
        jax.eval_shape(functools.partial(sum_and_weight, loss), wide, example)
    except Exception as error:
        dtypes = sorted({str(x.dtype) for x in jax.tree.leaves(params)})
        raise ValueError(
            f"an adapter of {', '.join(dtypes)} is edited in float32, which the loss does not take: cast its products, or "
            f"give the adapter in float32 and round it yourself. JAX says: {error}"
        ) from error


def check_loss(loss: Callable, params: Params, example: Example) -> None:
    """Raises ValueError unless the loss is a floating point number that is the same each time.

    Random numbers, as of dropout, would make a gradient before and one after the edit differ by noise. Those of Python and
    NumPy are drawn when the loss is traced: two traces are compared, operation by operation and number by number.
    """
    with _flax_errors():
        jaxpr = jax.make_jaxpr(functools.partial(sum_and_weight, loss))(params, example)
    total: Any = jaxpr.out_avals[0]
    if not jnp.issubdtype(total.dtype, jnp.floating):
        raise ValueError(f"the loss returns {total.dtype}, which has no gradient; it must be a floating point number")
    # A new function object, because JAX would return the first trace again for the same one.
    second_jaxpr = jax.make_jaxpr(lambda params, example: sum_and_weight(loss, params, example))(params, example)
    if not _same_program(jaxpr, second_jaxpr):
        raise ValueError(
            "the loss is another one each time it is called: it draws random numbers of Python or NumPy, or reads something "
            "that changes. Fix them to one realisation stored in the example"
        )
    random = sorted(set(primitives(jaxpr.jaxpr)) & set(RANDOM))
    if random:
        raise ValueError(
            f"the loss draws random numbers ({', '.join(random)} in its jaxpr): turn dropout off, and fix whatever else "
            f"is sampled to one realisation stored in the example"
        )


def check_differentiable(objective: Objective, params: Params, curvature: Curvature) -> None:
    """Raises ValueError unless the product with `curvature` can be formed.

    It is only traced, without its mesh; nothing is computed.
    """
    alone = dataclasses.replace(objective, mesh=None)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), alone)
    names = set(primitives(jax.make_jaxpr(objective.loss)(params, objective.example).jaxpr))
    try:
        # JAX has a rule for these, but no TPU or GPU compiles the result.
        if "pallas_call" in names and curvature != "empirical_fisher":
            raise TypeError("nothing, but the derivative of a Pallas kernel is no kernel that a TPU or GPU compiles")
        jax.eval_shape(functools.partial(product, curvature=curvature), shapes, params, zeros(params))
    except Exception as error:
        kernels = sorted(name for name in names if any(kernel in name for kernel in KERNELS))
        if "while" in names:
            kernels.append("while_loop (write it as a scan)")
        shown = f" ({', '.join(kernels)})" if kernels else ""
        first_order = (
            ""
            if curvature == "empirical_fisher"
            else ", or set curvature='empirical_fisher', which takes gradients only"
        )
        raise ValueError(
            f"the loss cannot be differentiated as curvature={curvature!r} needs it{shown}. Fused kernels (cuDNN, Pallas) "
            f"have no forward-mode derivative: set the model's attention to an implementation in plain JAX, "
            f"implementation='chunked' or 'dense' in pixel_jax, 'xla' in jax.nn.dot_product_attention{first_order}. "
            f"JAX says: {error}"
        ) from error


def check_gradient(gradient: Params, objective: Objective, params: Params, names: Sequence[Any]) -> None:
    """Raises FloatingPointError, which names the examples at fault, unless every number of `gradient` is finite."""
    if bool(all_finite(gradient)):
        return
    bad = [names[i] for i in np.flatnonzero(_not_finite(objective, params)).tolist()]
    shown = ", ".join(map(repr, bad[:8])) + (", ..." if len(bad) > 8 else "")
    raise FloatingPointError(
        f"the gradient of {len(bad)} of {objective.count} examples is not finite: {shown}"
        if bad
        else "the gradient of the objective is not finite although that of every example is: it overflows"
    )


def check_finite(sums: jax.Array, names: Sequence[Any]) -> None:
    """Raises FloatingPointError, which names the examples at fault, unless their losses [n] are finite."""
    bad = np.flatnonzero(~np.isfinite(np.asarray(sums)))
    if bad.size:
        shown = ", ".join(repr(names[i]) for i in bad[:8]) + (", ..." if bad.size > 8 else "")
        raise FloatingPointError(
            f"the loss of {bad.size} of {len(names)} examples is {np.asarray(sums)[bad[0]]}: {shown}. Its gradient may be "
            f"finite all the same: of a label outside of the vocabulary JAX makes nan and the gradient zero. Mask such "
            f"elements out, or leave the examples out of the dataset: no training has learned from them"
        )


@jax.jit
def _not_finite(objective: Objective, params: Params) -> jax.Array:
    """Whether the loss or the gradient of each example is not finite, bool [count]."""

    def finite(example):
        return all_finite(jax.value_and_grad(lambda params: sum_and_weight(objective.loss, params, example)[0])(params))

    return objective.whole(objective.each(lambda part: ~jax.vmap(finite)(part.examples)))


def _same_program(one: ClosedJaxpr, two: ClosedJaxpr) -> bool:
    """The same operations with the same constants."""
    first, second = list(_contents(one.jaxpr, one.consts)), list(_contents(two.jaxpr, two.consts))

    def same(x, y):
        if x is y or isinstance(x, str) or isinstance(y, str):
            return x is y or x == y
        return np.array_equal(x, y, equal_nan=_inexact(x))

    return len(first) == len(second) and all(map(same, first, second))


def _inexact(x: Any) -> bool:
    return np.issubdtype(np.asarray(x).dtype, np.inexact)


def _contents(jaxpr: Jaxpr, constants: Sequence[Any]) -> Iterator[Any]:
    """The names of the operations and the numbers that are written into the program."""
    yield from (x for x in constants if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jax.dtypes.extended))
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        yield from (x.val for x in equation.invars if isinstance(x, Literal))
        for inside in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inside):
                yield from _contents(
                    *((inside.jaxpr, inside.consts) if isinstance(inside, ClosedJaxpr) else (inside, ()))
                )


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, ClosedJaxpr | Jaxpr)


def primitives(jaxpr: Jaxpr) -> Iterator[str]:
    """The names of the operations of a jaxpr, those inside loops, branches, jitted and custom functions included."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inside in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inside):
                yield from primitives(inside.jaxpr if isinstance(inside, ClosedJaxpr) else inside)
