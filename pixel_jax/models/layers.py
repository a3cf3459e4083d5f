"""The building blocks of all networks, and the declaration of weights.

A weight is declared once, by `Weight(value, axes=...)` inside the module that owns it: its value carries shape and dtype, its
place in the module tree is its Hugging Face key, and `axes` names each dimension for sharding. Linear weights keep the Hugging
Face layout [out, in]. Layers that repeat are one module whose weights have a leading `layers` axis (`stack`).
"""

import functools
from collections.abc import Callable
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from pixel_jax.models import cpu_forms, int8
from pixel_jax.parallel.sharding import is_variable

M = TypeVar("M", bound=nnx.Module)
INIT_STD = 0.02  # initializer_range of the released configurations


class Weight(nnx.Param):
    """A base weight. Metadata `axes`: one logical name (or None: never sharded) for each dimension."""


class LoRAWeight(nnx.Param):
    """A weight of a low-rank adapter; metadata as in `Weight`."""


def normal(key: jax.Array, shape: tuple[int, ...], axes: tuple, dtype) -> Weight:
    """Returns a weight drawn from a normal distribution, the released initialisation."""
    return Weight((INIT_STD * jax.random.normal(key, shape, jnp.float32)).astype(dtype), axes=axes)


Remat = bool | Literal["dots"]


def rematerialised(block: Callable, remat: Remat) -> Callable:
    """Returns `block`, rematerialised in the backward pass.

    The forward pass keeps all intermediate values (False), only the arguments (True), or the results of products with weights
    ("dots"), so that recomputation is cheap.
    """
    if not remat:
        return block
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(block, policy=dots if remat == "dots" else None)


class Linear(nnx.Module):
    """y = x W^T + b, with W [out, in]; with an adapter y += scale * (x A^T) B^T, computed in float32.

    axes: logical names of (out, in).
    """

    def __init__(self, key: jax.Array, in_dim: int, out_dim: int, axes: tuple, *, bias: bool, dtype):
        self.weight = normal(key, (out_dim, in_dim), axes, dtype)
        self.bias = nnx.data(Weight(jnp.zeros((out_dim,), dtype), axes=axes[:1]) if bias else None)
        self.scale: Weight | None = nnx.data(None)  # of a weight of eight bits (`int8`), float32 [out]
        self.lora_a: LoRAWeight | None = nnx.data(None)  # LoRAWeight [rank, in]
        self.lora_b: LoRAWeight | None = nnx.data(None)  # LoRAWeight [out, rank]
        self.lora_scale = 0.0

    def __call__(self, x: jax.Array, dtype=None) -> jax.Array:
        """[..., in] -> [..., out]; dtype: of the result, that of x if None."""
        if self.scale is None:
            y = cpu_forms.product(x, self.weight[...], dtype)
        else:
            y = int8.product(x, int8.Int8(self.weight[...], self.scale[...]), dtype)
        if self.bias is not None:
            y = y + self.bias[...]
        if self.lora_a is not None and self.lora_b is not None:
            low = jnp.einsum("...i,ri->...r", x.astype(self.lora_a.dtype), self.lora_a[...])
            y = y + (self.lora_scale * jnp.einsum("...r,or->...o", low, self.lora_b[...])).astype(y.dtype)
        return y


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last dimension; statistics in float32 (or wider, if the input is)."""

    def __init__(self, dim: int, axes: tuple, *, eps: float, dtype):
        self.weight = Weight(jnp.ones((dim,), dtype), axes=axes)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x` [..., dim]."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * wide.astype(x.dtype)


class CentredRMSNorm(RMSNorm):
    """A root-mean-square norm that scales by 1 + weight; computed in float32 (or wider, if the input is)."""

    def __init__(self, dim: int, axes: tuple, *, eps: float, dtype):
        super().__init__(dim, axes, eps=eps, dtype=dtype)
        self.weight = Weight(jnp.zeros((dim,), dtype), axes=axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x` [..., dim]."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * (1 + self.weight[...].astype(wide.dtype))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm over the last dimension; statistics and scaling in float32 (or wider, if the input is)."""

    def __init__(self, dim: int, axes: tuple, *, eps: float, dtype):
        self.weight = Weight(jnp.ones((dim,), dtype), axes=axes)
        self.bias = Weight(jnp.zeros((dim,), dtype), axes=axes)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x` [..., dim]."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * self.weight[...] + self.bias[...]).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}  # by their names in `config.json`


class MLP(nnx.Module):
    """second(activation(first(x))), both with biases.

    names: of the two layers, as the family's files call them.
    """

    def __init__(
        self, key: jax.Array, dim: int, hidden: int, axes: tuple, *, activation: str, names: tuple[str, str], dtype
    ):
        first, second = jax.random.split(key)
        setattr(self, names[0], Linear(first, dim, hidden, axes, bias=True, dtype=dtype))
        setattr(self, names[1], Linear(second, hidden, dim, axes[::-1], bias=True, dtype=dtype))
        self.names, self.activation = names, activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., dim] -> [..., dim]."""
        first, second = (getattr(self, name) for name in self.names)
        return second(ACTIVATIONS[self.activation](first(x)))


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x)), as in SwiGLU."""

    def __init__(self, key: jax.Array, dim: int, hidden: int, axes: tuple, *, bias: bool, dtype):
        keys = jax.random.split(key, 3)
        self.gate_proj = Linear(keys[0], dim, hidden, axes, bias=bias, dtype=dtype)
        self.up_proj = Linear(keys[1], dim, hidden, axes, bias=bias, dtype=dtype)
        self.down_proj = Linear(keys[2], hidden, dim, axes[::-1], bias=bias, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., dim] -> [..., dim]."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def stack(make: Callable[[jax.Array], M], key: jax.Array, num_layers: int) -> M:
    """Makes `num_layers` modules as one module whose weights have a leading axis `layers`. make: key -> module."""
    module = jax.vmap(make)(jax.random.split(key, num_layers))
    for weight in jax.tree.leaves(module, is_leaf=is_variable):
        weight.set_metadata(axes=("layers", *weight.axes))
    return module


def unstack(module: M, num_layers: int) -> tuple[M, ...]:
    """Returns the layers of a stacked module one by one, for an unrolled loop."""

    def take(i):
        layer = jax.tree.map(lambda w: w[i], module)
        for weight in jax.tree.leaves(layer, is_leaf=is_variable):
            weight.set_metadata(axes=weight.axes[1:])
        return layer

    return tuple(take(i) for i in range(num_layers))
