"""Dense symmetric systems dressed as products on a nested pytree of mixed shapes, and solvers under jit."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from unlearn_jax.solvers import Solver

SHAPES = {"attention": {"a": (3, 2), "b": (2, 3)}, "layers": [(4,), ()]}
SIZE = 17


STATIC = {"steps", "rank"}


def jitted(solver):
    """A function under jit, or the `solve` of a solver (of a preconditioner `build`), which is then called with its fields, too.

    Products of dense matrices are arguments like any other, so tests share programs.
    """
    if isinstance(solver, type):
        return lambda *arguments, **options: run(
            solver, "solve" if issubclass(solver, Solver) else "build", arguments, options
        )
    parameters = inspect.signature(solver).parameters
    return jax.jit(solver, static_argnames=[name for name in STATIC if name in parameters])


def run(kind, method, arguments, options):
    """`method` of a solver with those of the options that are its fields, called with the others."""
    fields = {field.name for field in dataclasses.fields(kind)} - {"preconditioner"}
    made = kind(**{name: options[name] for name in fields & options.keys()})
    return _call(made, method, *arguments, **{name: x for name, x in options.items() if name not in fields})


_call = jax.jit(
    lambda made, method, *arguments, **options: getattr(made, method)(*arguments, **options), static_argnums=(0, 1)
)


def pack(vector, dtype=None):
    """A flat vector [17] as the pytree; a stack of them [k, 17] as a stack. NumPy stays NumPy."""
    vector = vector if dtype is None else np.asarray(vector, dtype)
    numpy = np if isinstance(vector, np.ndarray) else jnp
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda s: isinstance(s, tuple))
    ends = np.cumsum([int(np.prod(shape)) for shape in leaves])
    parts = numpy.split(vector, ends[:-1], axis=-1)
    return jax.tree.unflatten(structure, [x.reshape(vector.shape[:-1] + s) for x, s in zip(parts, leaves, strict=True)])


def flat(tree):
    """A pytree as a NumPy float64 vector, in the order of `pack`."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def symmetric(eigenvalues, seed=0):
    """A dense symmetric matrix with these eigenvalues, float64."""
    Q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))
    return (Q * np.asarray(eigenvalues, float)) @ Q.T


def vector(seed=1, size=SIZE):
    return np.random.default_rng(seed).normal(size=size)


def products(A, dtype=None):
    """v -> A v on the pytree, a callable pytree itself."""
    return jax.tree_util.Partial(multiply, np.asarray(A, dtype))


def multiply(A, v):
    return pack(A @ ravel_pytree(v)[0])


def error(got, wanted):
    """Relative error of a pytree, or a flat vector, against a flat vector."""
    got = got if isinstance(got, np.ndarray) else flat(got)
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
