"""What a plan counts of an adapter's file that is put on base weights, for every family; nothing is computed."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from tiny_families import VALUES, parameters, values

from pixel_jax.models import LanguageModel, config_from_hf
from pixel_jax.models.checkpoint import named_weights
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.lora import add_lora, merge_lora
from pixel_jax.models.peft import save_adapter
from pixel_jax.parallel.mesh import make_mesh
from pixel_jax.planning.programs import abstract_model, abstract_state, bytes_per_device
from tests.planning.small_recipe import recipe

TARGETS = r"model\.layers\..*\.(q_proj|v_proj|in_proj_qkv|up_proj)"
RANK = 3


def count(model, adapters):
    """The weights of a model that are of adapters, or that are not."""
    return sum(math.prod(x.shape) for _, _, x in named_weights(model) if isinstance(x, LoRAWeight) == adapters)


@pytest.mark.parametrize("name", parameters(VALUES))
def test_rank_and_targets_of_the_file_are_counted(name, tmp_path):
    network, key = config_from_hf(values(name)), jax.random.key(0)
    base = jax.eval_shape(functools.partial(LanguageModel, network), key)
    adapted = jax.eval_shape(lambda: add_lora(LanguageModel(network, key), key, rank=RANK, alpha=6.0, targets=TARGETS))
    save_adapter(jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype), adapted), tmp_path)
    small = recipe()
    tuned = dataclasses.replace(small.config.tuning, trainable=".*lora_")
    config = dataclasses.replace(small.config, adapter=str(tmp_path), sft=tuned).for_model(network)
    planned = dataclasses.replace(small, network=network, config=config)
    model, weights = abstract_model(planned), count(adapted, True)
    assert weights > 0 and count(model, True) == weights and count(model, False) == count(base, False)
    state = abstract_state(planned, tuned, 10, make_mesh({}, jax.devices()[:1]))
    assert bytes_per_device(state.trainable) == 4 * weights
    moments = bytes_per_device(state.opt_state)
    assert 8 * weights <= moments < 8 * weights + 64  # two for each weight, and the steps
    assert bytes_per_device(state.rest) == 4 * count(base, False)
    merged = jax.eval_shape(merge_lora, model)
    assert count(merged, True) == 0 and count(merged, False) == count(base, False)
