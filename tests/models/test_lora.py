"""Adapters: zero at first, merged they compute the same, split off and combined nothing is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_qwen import relative

from pixel_jax.models import forward_hidden
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.lora import add_lora, combine, linears, merge_lora, split

TEXT = r"model\.layers\.\{\}\.(self_attn\.(q|k|v|o)_proj|mlp\..*)|lm_head"
TOKENS, VALID = jnp.arange(8)[None], jnp.ones((1, 8), bool)


def trained(model, key=1):
    """As if it had been trained: B is no longer zero."""
    adapter, rest = split(model, LoRAWeight)
    keys = jax.random.split(jax.random.key(key), len(adapter))
    moved = {n: x + 0.1 * jax.random.normal(k, x.shape) for k, (n, x) in zip(keys, adapter.items(), strict=True)}
    return combine(moved, rest)


@jax.jit
def logits(model):
    return model.logits(forward_hidden(model, TOKENS, VALID, None))


def test_fresh_adapter_changes_nothing_and_merged_one_is_the_same(model):
    fresh = add_lora(model, jax.random.key(0), rank=2, alpha=6, targets=TEXT)
    assert (logits(fresh) == logits(model)).all()
    moved = trained(fresh)
    assert relative(logits(moved), logits(model)) > 1e-2
    merged = merge_lora(moved)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    assert relative(logits(merged), logits(moved)) < 1e-5
    assert model.language_model.layers.self_attn.q_proj.lora_a is None  # the argument is left alone


def test_every_linear_of_the_vision_tower(model, rng):
    adapted = add_lora(model, jax.random.key(0), rank=3, alpha=3, targets=r"visual\..*")
    names = {name for name, linear in linears(adapted) if linear.lora_a is not None}
    block = {
        f"visual.blocks.{{}}.{part}"
        for part in ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert names == block | {"visual.merger.mlp.0", "visual.merger.mlp.2"}
    assert adapted.visual.blocks.attn.qkv.lora_a.shape == (3, 3, 32)
    assert adapted.visual.blocks.attn.qkv.lora_a.axes == ("layers", None, "vision_embed")
    assert adapted.visual.blocks.attn.qkv.lora_b.axes == ("layers", "vision_heads", None)
    moved = trained(adapted)
    pixels, hw = rng.standard_normal((1, 16, 1176), dtype=np.float32), jnp.array([[4, 4]])
    encode = jax.jit(lambda m: m.encode(pixels, hw))
    assert relative(encode(moved), encode(model)) > 1e-3
    assert relative(encode(merge_lora(moved)), encode(moved)) < 1e-5


def test_cached_steps_see_the_adapter(model):
    moved = trained(add_lora(model, jax.random.key(0), rank=2, alpha=4, targets=TEXT))
    positions = jnp.broadcast_to(jnp.arange(8), (3, 1, 8))

    @jax.jit
    def cached(model):
        return model.step(model.unstack(), model.embed(TOKENS), positions, VALID, model.empty_cache(1, 8))[0]

    full = jax.jit(lambda m: m.backbone(m.embed(TOKENS), positions, VALID))(moved)
    assert relative(cached(moved), full) < 1e-5


def test_gradient_of_the_adapter_alone(model):
    """One entry per adapter weight; at B = 0 the gradient of A vanishes, that of B does not; base in bfloat16, adapter not."""
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), model)
    adapted = add_lora(half, jax.random.key(0), rank=2, alpha=4, targets=r".*\.q_proj")
    adapter, rest = split(adapted, LoRAWeight)
    names = [f"model.layers.{{}}.self_attn.q_proj.lora_{x}" for x in "ab"]
    assert sorted(adapter) == names and all(x.dtype == jnp.float32 for x in adapter.values())
    gradient = jax.jit(jax.grad(lambda adapter, rest: jnp.sum(logits(combine(adapter, rest)) ** 2)))(adapter, rest)
    assert sorted(gradient) == names
    assert (gradient[names[0]] == 0).all() and (jnp.abs(gradient[names[1]]).max(axis=(1, 2)) > 0).all()


def test_split_and_combine_any_subset(model):
    chosen, rest = split(model, lambda path, weight: path.startswith("visual.") and weight.ndim == 2)
    assert chosen and all(path.startswith("visual.") for path in chosen)
    assert len(jax.tree.leaves(rest)) + len(chosen) == len(jax.tree.leaves(model))
    again = combine(chosen, rest)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True))
    with pytest.raises(ValueError, match="visual.* is missing from the weights"):
        combine({}, rest)
    with pytest.raises(ValueError, match="no weights .*nonsense"):
        combine({**chosen, "nonsense": jnp.zeros(1)}, rest)
    with pytest.raises(ValueError, match="model.norm.weight is in both"):
        combine({**chosen, "model.norm.weight": jnp.zeros(1)}, rest)


@pytest.mark.parametrize("arguments, message", [
    ({"targets": "q_proj"}, "'q_proj' match no linear layer"),
    ({"rank": 0}, "rank must be positive, got 0"),
])  # fmt: skip
def test_bad_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        add_lora(model, jax.random.key(0), **{"rank": 1, "alpha": 1, "targets": ".*", **arguments})


def test_second_adapter_is_an_error(model):
    adapted = add_lora(model, jax.random.key(0), rank=1, alpha=1, targets="lm_head")
    with pytest.raises(ValueError, match="lm_head has an adapter already"):
        add_lora(adapted, jax.random.key(0), rank=1, alpha=1, targets=".*")
