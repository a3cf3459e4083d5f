"""The three jitted steps: SFT, RL and scoring. Factories make them; they take only arrays."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from pixel_jax.arrays import AnyArray
from pixel_jax.config import positive
from pixel_jax.models import forward_hidden
from pixel_jax.models.config import ModelConfig
from pixel_jax.models.inputs import Visual
from pixel_jax.models.layers import Remat
from pixel_jax.models.lora import without_lora
from pixel_jax.models.model import logits
from pixel_jax.parallel.sharding import (
    ROWS,
    SEQUENCE,
    constrain,
    copies,
    row_shards,
    sequence_shards,
    shardings,
)
from pixel_jax.training.batch import Batch
from pixel_jax.training.cost import bytes_of, micro_batches
from pixel_jax.training.losses import (
    LossSum,
    Normalizer,
    PolicyLossConfig,
    policy_loss,
    predictions,
    sft_loss,
    token_logprobs,
    turn_temperature,
)
from pixel_jax.training.state import TrainState, cast


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """How a step runs the model. The settings change the results only by rounding."""

    # The number of micro-batches of a batch. None: the smallest with which the step fits the device's memory.
    micro_batches: int | None = None
    remat: Remat = True  # what is recomputed in the backward pass: see `rematerialised`
    implementation: Literal["dense", "chunked", "kernel"] | None = None  # of attention; None: by size and platform
    logit_chunk: int = 256  # positions whose logits exist at once
    compute_dtype: Literal["float32", "bfloat16"] | None = None  # weights are cast to it in the step; None: as they are

    def __post_init__(self):
        positive(self, "micro_batches", "logit_chunk")

    def turns(self, network: ModelConfig, batch: Batch[Visual], mesh: Mesh | None, *, held: int) -> int:
        """The number of micro-batches of `batch`; `held` bytes of all devices together are used already."""
        if self.micro_batches is not None:
            return self.micro_batches
        devices = 1 if mesh is None else mesh.size
        return micro_batches(
            network,
            batch.tokens.shape[0],
            batch.tokens.shape[1],
            batch.visual,
            mesh,
            held=(held + bytes_of(batch)) // devices,
            width=2 if self.compute_dtype == "bfloat16" else 4,
            remat=bool(self.remat),
            logit_chunk=self.logit_chunk,
        )


class StepReport(NamedTuple):
    """The metrics of a step, and the loss of each row."""

    metrics: dict[str, jax.Array]  # float32 []
    rows: jax.Array  # float32 [R], each row's loss; zero for padding


class NonFiniteError(FloatingPointError):
    """A loss, gradient, reward or log-probability is NaN or infinite."""


def check_rows(values: AnyArray, what: str) -> None:
    """Checks that all `values` [rows, ...] are finite; raises NonFiniteError, which names the rows, if some are not."""
    values = np.asarray(values)
    bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
    if bad.size:
        shown = ", ".join(f"{i}: {values[i]}" for i in bad[:8]) + (", ..." if bad.size > 8 else "")
        raise NonFiniteError(f"{what} of {bad.size} of {len(values)} rows is not finite ({shown})")


def check_report(report: StepReport, step: int) -> dict[str, float]:
    """Waits for the step, and returns its metrics as floats.

    Raises:
        NonFiniteError: a loss or gradient is not finite. The message names the rows at fault.
    """
    check_rows(report.rows, f"step {step}: the loss")
    metrics = {name: float(x) for name, x in jax.device_get(report.metrics).items()}
    for name in ("loss", "grad_norm"):
        if not np.isfinite(metrics[name]):
            raise NonFiniteError(f"step {step}: {name} is {metrics[name]} although every row's loss is finite")
    return metrics


def trajectory_logprobs(
    model,
    batch: Batch,
    config: ForwardConfig,
    *,
    temperature: float = 1.0,
    later_temperature: float | None = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the log-probability of every token given those before it in its row, and the entropy: float32 [R, L] each.

    They are those of the full distribution, scaled by the temperatures of a rollout. Positions that are not predicted (a row's
    first token, padding) hold arbitrary finite numbers.
    """
    model = cast(model, config.compute_dtype)
    hidden = forward_hidden(
        model,
        jnp.asarray(batch.tokens),
        jnp.asarray(batch.valid),
        batch.visual,
        remat=config.remat,
        implementation=config.implementation,
        segments=None if batch.segments is None else jnp.asarray(batch.segments),
        mesh=mesh,
    )
    predicted = predictions(batch.tokens, batch.valid)
    scale: jax.Array | float = temperature
    if later_temperature is not None:
        # A turn's first token is predicted at the last position of the observation before it: temperatures shift like targets.
        temperatures = turn_temperature(batch.loss_mask, temperature, later_temperature, batch.segments)
        scale = predictions(temperatures, batch.valid).target
    logprobs, entropy = head_logprobs(model, hidden, predicted.target, scale, config.logit_chunk, mesh)
    at_token = functools.partial(jnp.take_along_axis, indices=predicted.source, axis=1)
    return at_token(logprobs), at_token(entropy)


def head_logprobs(
    model, hidden: jax.Array, target: jax.Array, temperature: jax.Array | float, chunk: int, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
    """Computes `token_logprobs` of the model's head. On a mesh every device computes chunks of its own rows and positions.

    The head is copied to every device once, and the devices' gradients are added once. With a shared weight XLA would do both
    for every chunk.
    """

    def of_target(head, hidden, target, temperature=temperature):
        return token_logprobs(lambda x: logits(head, x), hidden, target, temperature=temperature, chunk=chunk)

    if mesh is None:
        return of_target(model.head, hidden, target)
    rows, length = target.shape
    shards = (row_shards(mesh), sequence_shards(mesh))

    def split(x):  # [R, L, ...] -> [row shards, sequence shards, R / row shards, L / sequence shards, ...]
        x = x.reshape(shards[0], rows // shards[0], shards[1], length // shards[1], *x.shape[2:])
        return jnp.swapaxes(x, 1, 2)

    arrays = (hidden, target) if jnp.ndim(temperature) == 0 else (hidden, target, temperature)
    pieces = constrain(jax.tree.map(split, arrays), mesh, ROWS, SEQUENCE)
    pieces = jax.vmap(jax.vmap(of_target))(copies(model.head, mesh, shards), *pieces)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2).reshape(rows, length), pieces)


def split_rows(batch: Batch, parts: int, mesh: Mesh | None) -> Batch:
    """Splits [R, ...] into [parts, R / parts, ...]. Part m has the rows m, m + parts, ..., so that all devices have some."""

    def split(x):
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    return constrain(jax.tree.map(split, batch), mesh, None, ROWS)


def join_rows(x: jax.Array) -> jax.Array:
    """Inverts `split_rows`, for one array."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """A context for tracing a forward pass, which sets the mesh of activations (`parallel.sharding.keep_rows`)."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def loss_gradient(
    loss: Callable[..., LossSum], state: TrainState, batch: Batch, mesh: Mesh | None
) -> tuple[LossSum, Any]:
    """Computes `loss(model, batch)`, and the gradient of its total by the trained weights."""

    def total(trainable):
        value = loss(state._replace(trainable=trainable).model, batch)
        return value.total, value

    with on_mesh(mesh):
        (_, value), grads = jax.value_and_grad(total, has_aux=True)(state.trainable)
    if mesh is not None:  # each device has only its shard of the sum
        grads = jax.lax.with_sharding_constraint(grads, shardings(grads, mesh))
    return value, grads


def summed_gradient(
    loss: Callable[..., LossSum], state: TrainState, batch: Batch, mesh: Mesh | None, turns: int
) -> tuple[LossSum, Any]:
    """Computes `loss_gradient` of `turns` micro-batches one after the other, and sums the results."""
    if turns == 1:
        return loss_gradient(loss, state, batch, mesh)
    parts = split_rows(batch, turns, mesh)

    def gradient(micro_batch: Batch) -> tuple[LossSum, Any]:
        return loss_gradient(loss, state, micro_batch, mesh)

    def accumulate(carry, micro_batch: Batch):
        value, grads = gradient(micro_batch)
        sums = (value.total, value.denominator, value.sums, grads)
        return jax.tree.map(jnp.add, carry, sums), value.rows

    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        (shapes[0].total, shapes[0].denominator, shapes[0].sums, shapes[1]),
    )
    (total, denominator, sums, grads), rows = jax.lax.scan(accumulate, zeros, parts)
    return LossSum(total, denominator, join_rows(rows), sums), grads


def make_step(
    loss: Callable[..., LossSum],
    optimizer: optax.GradientTransformation,
    config: ForwardConfig,
    mesh: Mesh | None,
    name: str,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepReport]]:
    """Makes a jitted update from `loss(model, batch)`, whose totals are summed over micro-batches before they are divided.

    The update donates the state.
    """

    def step(state: TrainState, batch: Batch):
        rows = batch.tokens.shape[0]
        # Besides the state there are the gradients, their sum over micro-batches, and the weights in the compute dtype.
        turns = config.turns(state.model.config, batch, mesh, held=bytes_of(state) + 3 * bytes_of(state.trainable))
        if rows % turns:
            raise ValueError(f"{rows} rows cannot be split into {turns} micro-batches")
        batch = constrain(batch, mesh, ROWS)
        value, grads = summed_gradient(loss, state, batch, mesh, turns)
        # A batch of nothing but padding has gradient zero, not NaN.
        scale = 1.0 / jnp.where(value.denominator > 0, value.denominator, 1.0)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        new = TrainState(optax.apply_updates(state.trainable, updates), state.rest, opt_state, state.step + 1)
        if mesh is not None:  # the outputs have the sharding of the inputs, so that the step is compiled once
            new = jax.lax.with_sharding_constraint(new, shardings(new, mesh))
        tokens = jnp.maximum(value.sums["tokens"], 1.0)
        metrics = {key: x / tokens for key, x in value.sums.items() if key != "tokens"}
        metrics |= {
            "loss": value.total * scale,
            "grad_norm": optax.tree.norm(grads),
            "tokens": value.sums["tokens"],
        }
        rows = jnp.where(batch.weight > 0, value.rows, 0.0)
        return new, StepReport(metrics, constrain(rows, mesh))  # replicated, so that any process can read the rows

    step.__name__ = name
    return jax.jit(step, donate_argnums=0)


def make_sft_step(
    config: ForwardConfig,
    optimizer: optax.GradientTransformation,
    *,
    normalizer: Normalizer = "row",
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepReport]]:
    """Makes (state, batch) -> (state, report): a step of SFT on the tokens of the loss mask. `advantage` is ignored."""

    def loss(model, batch: Batch) -> LossSum:
        logprobs, entropy = trajectory_logprobs(model, batch, config, mesh=mesh)
        return sft_loss(
            logprobs, entropy, batch.loss_mask, batch.weight, normalizer=normalizer, segments=batch.segments
        )

    return make_step(loss, optimizer, config, mesh, "sft_step")


def make_rl_step(
    config: ForwardConfig,
    loss_config: PolicyLossConfig,
    optimizer: optax.GradientTransformation,
    *,
    temperature: float = 1.0,
    later_temperature: float | None = None,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepReport]]:
    """Makes (state, batch) -> (state, report): a clipped policy-gradient step. Temperatures are those of the rollout.

    With `loss_config.kl` the reference is the model without its adapters, which takes one more forward pass over the same base
    weights.
    """
    logprobs_of = functools.partial(
        trajectory_logprobs, config=config, temperature=temperature, later_temperature=later_temperature, mesh=mesh
    )

    def loss(model, batch: Batch) -> LossSum:
        logprobs, entropy = logprobs_of(model, batch)
        reference = None
        if loss_config.kl:
            reference, _ = jax.lax.stop_gradient(logprobs_of(without_lora(model), batch))
        return policy_loss(
            logprobs,
            entropy,
            batch.old_logprobs,
            batch.logprobs,
            batch.advantage,
            batch.loss_mask,
            batch.weight,
            loss_config,
            reference_logprobs=reference,
            segments=batch.segments,
        )

    return make_step(loss, optimizer, config, mesh, "rl_step")


def make_score_step(
    config: ForwardConfig, *, temperature: float = 1.0, later_temperature: float | None = None, mesh: Mesh | None = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Makes (model, batch) -> log-probabilities and entropies of the tokens in the loss mask, float32 [R, L], zero elsewhere."""

    def score_step(model, batch: Batch):
        def score(micro_batch: Batch):
            with on_mesh(mesh):
                both = trajectory_logprobs(
                    model, micro_batch, config, temperature=temperature, later_temperature=later_temperature, mesh=mesh
                )
            return tuple(jnp.where(micro_batch.loss_mask, x, 0.0) for x in both)

        batch = constrain(batch, mesh, ROWS)
        turns = config.turns(model.config, batch, mesh, held=bytes_of(model))
        if turns == 1:
            return constrain(score(batch), mesh, ROWS)
        both = jax.lax.map(score, split_rows(batch, turns, mesh))
        return tuple(constrain(join_rows(x), mesh, ROWS) for x in both)

    return jax.jit(score_step)
