"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on any linear layer, stacked or not, of decoder or vision tower.

An adapter is part of the model's tree: `lora_a` and `lora_b` beside their `weight`, in float32 whatever the weight's type is.
Training, sharding and curvature take it as a dictionary of arrays with `split`, and put it back with `combine`:

    adapter, rest = split(model, LoRAWeight)
    gradient = jax.grad(lambda adapter, rest, batch: loss(combine(adapter, rest), batch))(adapter, rest, batch)
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from pixel_jax.models.checkpoint import named_weights
from pixel_jax.models.layers import Linear, LoRAWeight, Weight
from pixel_jax.models.model import Model
from pixel_jax.parallel.sharding import is_variable, value_of

M = TypeVar("M", bound=Model | nnx.Module)
Tree = TypeVar("Tree")
Filter = type | Callable[[str, nnx.Variable], bool]


def add_lora(model: M, key: jax.Array, *, rank: int, alpha: float, targets: str) -> M:
    r"""Returns the model with fresh adapters: A uniform as in PEFT, B zero, so that its outputs do not change.

    targets: regular expression that must match the whole Hugging Face path of a linear layer, in which `{}` stands for the
             number of a stacked layer: model.layers.{}.self_attn.q_proj, visual.blocks.{}.attn.qkv, lm_head. For example
             r".*\.(q_proj|v_proj)", or r"model\.layers\..*" for every linear layer of the decoder.
    Scale alpha / rank. Raises if nothing matches or if a target has an adapter already.
    """
    if rank < 1:
        raise ValueError(f"rank must be positive, got {rank}")
    model = copied(model)
    chosen = [(path, linear) for path, linear in linears(model) if re.fullmatch(targets, path)]
    if not chosen:
        raise ValueError(f"targets {targets!r} match no linear layer; there are {[path for path, _ in linears(model)]}")
    for number, (path, linear) in enumerate(chosen):
        if linear.lora_a is not None:
            raise ValueError(f"{path} has an adapter already")
        *layers, out_dim, in_dim = linear.weight.shape
        *layer_axis, out_axis, in_axis = linear.weight.axes
        bound = 1 / math.sqrt(in_dim)  # Kaiming uniform with a = sqrt(5)
        shape = (*layers, rank, in_dim)
        a = jax.random.uniform(jax.random.fold_in(key, number), shape, jnp.float32, -bound, bound)
        linear.lora_a = LoRAWeight(a, axes=(*layer_axis, None, in_axis))
        linear.lora_b = LoRAWeight(jnp.zeros((*layers, out_dim, rank)), axes=(*layer_axis, out_axis, None))
        linear.lora_scale = alpha / rank
    return model


def merge_lora(model: M, dtype=None) -> M:
    """Returns the model without adapters: each weight W becomes W + scale * B A, added in float32.

    dtype: of the weights that had an adapter. None: it is kept, and a small change may be lost in rounding.
    """
    model = copied(model)
    for _, linear in linears(model):
        if linear.lora_a is None:
            continue
        linear.weight = _changed(linear, 1, dtype)
        linear.lora_a, linear.lora_b, linear.lora_scale = None, None, 0.0
    return model


def _changed(linear: Linear, sign: int, dtype) -> Weight:
    """Computes W + sign * scale * B A, added in float32."""
    assert linear.lora_a is not None and linear.lora_b is not None
    weight = linear.weight[...]
    change = linear.lora_scale * jnp.einsum("...or,...ri->...oi", linear.lora_b[...], linear.lora_a[...])
    changed = (weight.astype(change.dtype) + sign * change).astype(dtype or weight.dtype)
    return Weight(changed, axes=linear.weight.axes)


def unmerge_lora(model: M) -> M:
    """Returns the model with W - scale * B A for each weight, in float32, which undoes `merge_lora`; the adapters are kept.

    From a run's merged model with the run's adapters it makes the run's unmerged model, up to rounding.
    """
    model = copied(model)
    for _, linear in linears(model):
        if linear.lora_a is not None:
            linear.weight = _changed(linear, -1, None)
    return model


def without_lora(model: M) -> M:
    """Returns the model without its adapters, with the same base weights (not a copy). Raises if it has no adapters."""
    model, had_adapters = copied(model), False
    for _, linear in linears(model):
        had_adapters |= linear.lora_a is not None
        linear.lora_a, linear.lora_b, linear.lora_scale = None, None, 0.0
    if not had_adapters:
        raise ValueError("the model has no adapters to switch off")
    return model


def linears(model: Model | nnx.Module) -> Iterator[tuple[str, Linear]]:
    """Yields (Hugging Face path, layer) of every linear layer; stacked ones have `{}` for the layer number."""
    for path, key, weight in named_weights(model):
        owner: Any = model
        for entry in path[:-1]:
            owner = getattr(owner, entry.name) if hasattr(entry, "name") else owner[entry.key]
        if isinstance(owner, Linear) and weight is owner.weight:
            yield key.removesuffix(".weight"), owner


def split(model: M, wanted: Filter) -> tuple[dict[str, jax.Array], M]:
    """Returns (the selected weights by Hugging Face path, the model without them), both pytrees.

    wanted: a class of weights, or a function of (path, weight)
    """
    select = wanted if not isinstance(wanted, type) else lambda _, weight: isinstance(weight, wanted)
    selected, rest = {}, []
    for _, key, weight in named_weights(model):
        if select(key, weight):
            selected[key] = value_of(weight)
            weight = weight.replace(None)
        rest.append(weight)
    if not selected:
        raise ValueError(f"no weight is selected by {wanted}")
    return selected, jax.tree.unflatten(jax.tree.structure(model, is_leaf=is_variable), rest)


def combine(selected: dict[str, jax.Array], rest: M) -> M:
    """Puts together the model that `split` has divided."""
    selected, whole = dict(selected), []
    for _, key, weight in named_weights(rest):
        empty = not jax.tree.leaves(weight)
        if empty != (key in selected):
            raise ValueError(f"{key} is {'missing from' if empty else 'in both'} the weights to combine")
        whole.append(weight.replace(selected.pop(key)) if empty else weight)
    if selected:
        raise ValueError(f"the model has no weights {sorted(selected)}")
    return jax.tree.unflatten(jax.tree.structure(rest, is_leaf=is_variable), whole)


def copied(model: Tree) -> Tree:
    """Copies modules and variables, so that they can be changed, but not their arrays."""
    return jax.tree.map(lambda x: x, model)
