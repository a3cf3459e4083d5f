"""Memory that answering, tuning and learning take, by formula, beside what a device has."""

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from pixel_jax.bench.checklist import Checklist, Kind, UsableExamples, phases_of, size_text
from pixel_jax.parallel import make_mesh
from pixel_jax.parallel.memory import device_memory
from pixel_jax.parallel.sharding import sequence_shards, shardings
from pixel_jax.planning.programs import (
    Recipe,
    abstract_model,
    abstract_state,
    bytes_per_device,
    policy,
    resident,
    sharded,
)
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.limits import read_limits
from pixel_jax.training.cost import fixed_bytes, row_bytes
from pixel_jax.training.state import TrainState
from pixel_jax.training.steps import ForwardConfig


def memory_lines(checks: Checklist, recipe: Recipe, mesh: Mesh, rows: UsableExamples | None) -> dict[Kind, bool] | None:
    """Adds lines about the memory of answering and of each phase, by formula; returns which fit, None if no weights do."""
    available, config, network = device_memory(), recipe.config, recipe.network
    model = abstract_model(recipe)
    weights = bytes_per_device(sharded(model, shardings(model, mesh)))
    limits = read_limits(config.model) or RolloutConfig()
    cache = network.text.cache_bytes(limits.max_tokens, jnp.dtype(recipe.dtype).itemsize)
    text = f"to answer: weights {size_text(weights)}, a row of {limits.max_tokens} tokens {size_text(cache)}"
    text += f", of {size_text(available)}"
    remedy = "split the weights over more devices (config.mesh), or take a smaller model, or one in bfloat16"
    shorter = "lower max_tokens in the model's rollout.json, or split the weights over more devices (config.mesh)"
    checks.add("memory", text, remedy if weights > available else shorter * (weights + cache > available))
    checks.details["memory"] = needs = dict[str, Any](device=available, weights=weights, row=cache, phases={})
    if weights > available:
        return None
    fits: dict[Kind, bool] = {}
    kinds: list[Kind] = phases_of(config) if rows is None else [rows.kind]
    for kind in kinds:
        with checks.item("memory"):
            parts = tuning_bytes(recipe, mesh, rows) if kind == "sft" else learning_bytes(recipe, mesh, rows)
            needs["phases"][kind] = parts
            fits[kind] = sum(parts.values()) <= available
            text = f"{kind}: " + ", ".join(f"{name} {size_text(n)}" for name, n in parts.items())
            text += f": {size_text(sum(parts.values()))} of {size_text(available)}"
            less = "" if config.adapts else "train adapters (config.lora; --config=pixel/own_data:lora), or "
            remedy = (
                f"{less}split the weights over more devices (config.mesh), or take smaller pictures and shorter rows"
            )
            status = "ok" if fits[kind] else "note" if rows is None else "wrong"
            checks.add("memory", text, "" if fits[kind] else remedy, status=status)
    return fits


def tuning_bytes(recipe: Recipe, mesh: Mesh, rows: UsableExamples | None) -> dict[str, int]:
    """Computes the bytes of a device that an update of tuning takes, with one row at a time on each shard."""
    phase = recipe.config.tuning
    state = abstract_state(recipe, phase, phase.steps or 1, mesh)
    parts = _of_update(recipe, state, phase.forward)
    if rows is not None:
        parts["the longest row"] = max(
            _row(recipe, mesh, x.tokens, (x.slices, x.patches), phase.forward) for x in rows.shapes
        )
    return parts


def learning_bytes(recipe: Recipe, mesh: Mesh, rows: UsableExamples | None) -> dict[str, int]:
    """Computes the bytes that a rollout or an update takes, whichever is more, with one prompt or row on each shard."""
    phase, text = recipe.config.learning, recipe.network.text
    limits = phase.rollout
    rolled = make_mesh(recipe.config.rollout_mesh) if recipe.config.rollout_mesh else mesh
    state = abstract_state(recipe, phase, phase.iterations * phase.updates, mesh)
    width = jnp.dtype(phase.forward.compute_dtype or recipe.dtype).itemsize
    prompt = max((x.tokens for x in rows.shapes), default=0) if rows is not None else 0
    fixed = resident(recipe, "rollout", mesh, rolled) + bytes_per_device(policy(recipe, rolled))
    cached = limits.group_size * text.cache_bytes(limits.max_response, width) + text.cache_bytes(prompt, width)
    rollout_parts = {
        "state and weights of a rollout": fixed,
        f"caches of a prompt's {limits.group_size} rows": cached,
    }
    update_parts = _of_update(recipe, state, phase.forward)
    if rows is not None:
        patches = max(limits.max_pixels, limits.crop_max_pixels) // limits.patch_size**2
        update_parts["the longest row"] = max(
            _row(recipe, mesh, x.tokens + limits.max_response, (x.slices + limits.max_calls, patches), phase.forward)
            for x in rows.shapes
        )
    return max(rollout_parts, update_parts, key=lambda parts: sum(parts.values()))


def _of_update(recipe: Recipe, state: TrainState, forward: ForwardConfig) -> dict[str, int]:
    """Computes what an update takes besides its rows, as `pixel_jax.training.steps.make_step` counts it."""
    trained = bytes_per_device(state.trainable)
    return {
        "weights and optimizer": bytes_per_device(state),
        "gradients": 3 * trained,
        "logits": fixed_bytes(recipe.network, forward.logit_chunk),
    }


def _row(recipe: Recipe, mesh: Mesh, tokens: int, shown: tuple[int, int], forward: ForwardConfig) -> int:
    width = 2 if forward.compute_dtype == "bfloat16" else 4
    own = tokens // sequence_shards(mesh)
    return row_bytes(recipe.network, own, shown, width=width, remat=bool(forward.remat))
