"""How far a model's outputs have moved, measured by its own criterion."""

import dataclasses

import jax
import jax.numpy as jnp

from unlearn_jax.loss import Example, Loss, Params


def divergence(loss: Loss, reference: Params, params: Params, example: Example) -> tuple[jax.Array, jax.Array]:
    """(sum, weight) over the elements of D(z, z_ref) = l(z) - l(z_ref) - <dl/dz (z_ref), z - z_ref>.

    The Bregman divergence of the criterion. For cross-entropy it is KL(p_ref || p), for half the squared error half the
    squared distance; its Hessian in z at z_ref is that of the criterion, so its Hessian in the parameters is Gauss-Newton's.
    """
    z = loss.z(params, example)
    fixed = jax.lax.stop_gradient(loss.z(reference, example))
    moved = jax.tree.map(jnp.subtract, z, fixed)
    value, slope = jax.jvp(lambda z: loss.criterion(z, example), (fixed,), (moved,))
    bregman = lambda z, example: loss.criterion(z, example) - value - slope
    return dataclasses.replace(loss, criterion=bregman).reduce(z, example)
