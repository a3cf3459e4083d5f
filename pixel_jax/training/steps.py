"""The three jitted steps: tuning, reinforcement learning, scoring. Built once by factories, then called with arrays only."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from pixel_jax.config import positive
from pixel_jax.models import forward_hidden
from pixel_jax.models.config import ModelConfig
from pixel_jax.models.layers import LoRAWeight, Remat
from pixel_jax.models.lora import without_lora
from pixel_jax.models.model import logits
from pixel_jax.parallel.sharding import (
    ROWS,
    SEQUENCE,
    constrain,
    copies,
    is_variable,
    row_shards,
    sequence_shards,
    shardings,
)
from pixel_jax.training.batch import Batch
from pixel_jax.training.footprint import bytes_of, micro_batches
from pixel_jax.training.losses import (
    Loss,
    PolicyLossConfig,
    policy_loss,
    predictions,
    sft_loss,
    token_logprobs,
    turn_temperature,
)
from pixel_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """How a step runs the model; none of it changes what is computed, up to rounding."""

    micro_batches: int | None = (
        None  # the batch's rows are taken in so many turns. None: as few as fit the device's memory
    )
    remat: Remat = True  # what the backward pass computes again: see `rematerialised`
    implementation: Literal["dense", "chunked", "kernel"] | None = None  # of attention; None: by size and platform
    logit_chunk: int = 256  # positions whose logits exist at once
    compute_dtype: Literal["float32", "bfloat16"] | None = None  # weights are cast to it in the step; None: as stored

    def __post_init__(self):
        positive(self, "micro_batches", "logit_chunk")

    def turns(self, network: ModelConfig, batch: Batch, mesh: Mesh | None, *, held: int) -> int:
        """In how many a step takes the rows of `batch`, where `held` bytes of state and gradients lie on all devices together."""
        if self.micro_batches is not None:
            return self.micro_batches
        devices = 1 if mesh is None else mesh.size
        return micro_batches(
            network,
            *batch.tokens.shape,
            batch.visual,
            mesh,
            held=(held + bytes_of(batch)) // devices,
            width=2 if self.compute_dtype == "bfloat16" else 4,
            remat=bool(self.remat),
            logit_chunk=self.logit_chunk,
        )


class StepReport(NamedTuple):
    """What a step says about itself."""

    metrics: dict[str, jax.Array]  # float32 []
    rows: jax.Array  # float32 [R], each row's loss; zero for padding


class NonFiniteError(FloatingPointError):
    """A loss, gradient, reward or log-probability is NaN or infinite."""


def check_rows(values, what: str) -> None:
    """Stop if any of `values` [rows, ...] is not finite, naming the rows."""
    values = np.asarray(values)
    bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
    if bad.size:
        shown = ", ".join(f"{i}: {values[i]}" for i in bad[:8]) + (", ..." if bad.size > 8 else "")
        raise NonFiniteError(f"{what} of {bad.size} of {len(values)} rows is not finite ({shown})")


def check_report(report: StepReport, step: int) -> dict[str, float]:
    """The metrics as floats. Waits for the step; a loss or gradient that is not finite stops with the rows at fault."""
    check_rows(report.rows, f"step {step}: the loss")
    metrics = {name: float(x) for name, x in jax.device_get(report.metrics).items()}
    for name in ("loss", "grad_norm"):
        if not np.isfinite(metrics[name]):
            raise NonFiniteError(f"step {step}: {name} is {metrics[name]} although every row's loss is finite")
    return metrics


def cast(model, dtype: str | None):
    """`model` with its base weights in `dtype`; adapters stay as they are."""
    if dtype is None:
        return model
    return jax.tree.map(
        lambda w: w if isinstance(w, LoRAWeight) else jax.tree.map(lambda x: x.astype(dtype), w),
        model,
        is_leaf=is_variable,
    )


def trajectory_logprobs(
    model,
    batch: Batch,
    config: ForwardConfig,
    *,
    temperature: float = 1.0,
    later_temperature: float | None = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every token given what came before it in its row, and the entropy there: float32 [R, L] each.

    Temperatures as in a rollout: the full distribution, scaled. Positions that nothing predicts (a row's first token,
    padding) hold arbitrary finite numbers.
    """
    model = cast(model, config.compute_dtype)
    hidden = forward_hidden(
        model,
        batch.tokens,
        batch.valid,
        batch.visual,
        remat=config.remat,
        implementation=config.implementation,
        segments=batch.segments,
        mesh=mesh,
    )
    predicted = predictions(batch.tokens, batch.valid)
    scale: jax.Array | float = temperature
    if later_temperature is not None:
        # A turn's first token is predicted at the last position of the observation before it: temperatures move with targets.
        loss_mask = turn_temperature(batch.loss_mask, temperature, later_temperature, batch.segments)
        scale = predictions(loss_mask, batch.valid).target
    logprobs, entropy = head_logprobs(model, hidden, predicted.target, scale, config.logit_chunk, mesh)
    return tuple(jnp.take_along_axis(x, predicted.source, axis=1) for x in (logprobs, entropy))


def head_logprobs(
    model, hidden: jax.Array, target: jax.Array, temperature: jax.Array | float, chunk: int, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
    """`token_logprobs` of the model's head. On a mesh every device takes chunks of the rows and positions that it has.

    The head is gathered once, and the devices' gradients are added up once: as a weight that all share, both would happen
    for every chunk.
    """

    def of_target(head, hidden, target, temperature=temperature):
        return token_logprobs(lambda x: logits(head, x), hidden, target, temperature=temperature, chunk=chunk)

    if mesh is None:
        return of_target(model.head, hidden, target)
    rows, length = target.shape
    parts = (row_shards(mesh), sequence_shards(mesh))

    def split(x):  # [R, L, ...] -> [row parts, sequence parts, R / row parts, L / sequence parts, ...]
        x = x.reshape(parts[0], rows // parts[0], parts[1], length // parts[1], *x.shape[2:])
        return jnp.swapaxes(x, 1, 2)

    arrays = (hidden, target) if jnp.ndim(temperature) == 0 else (hidden, target, temperature)
    pieces = constrain(jax.tree.map(split, arrays), mesh, ROWS, SEQUENCE)
    pieces = jax.vmap(jax.vmap(of_target))(copies(model.head, mesh, parts), *pieces)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2).reshape(rows, length), pieces)


def split_rows(batch: Batch, parts: int, mesh: Mesh | None) -> Batch:
    """[R, ...] -> [parts, R / parts, ...]; part m has the rows m, m + parts, ... so that every device has its share of each."""

    def split(x):
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    return constrain(jax.tree.map(split, batch), mesh, None, ROWS)


def join_rows(x: jax.Array) -> jax.Array:
    """The inverse of `split_rows`, for one array."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Around the tracing of a forward pass: where its activations lie (`parallel.sharding.keep_rows`)."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def loss_gradient(loss: Callable[..., Loss], state: TrainState, batch: Batch, mesh: Mesh | None) -> tuple[Loss, Any]:
    """`loss(model, batch)` and the gradient of its total by what is trained."""

    def total(trainable):
        value = loss(state._replace(trainable=trainable).model, batch)
        return value.total, value

    with on_mesh(mesh):
        (_, value), grads = jax.value_and_grad(total, has_aux=True)(state.trainable)
    if mesh is not None:  # each device keeps its part of the sum, and never has the whole
        grads = jax.lax.with_sharding_constraint(grads, shardings(grads, mesh))
    return value, grads


def summed_gradient(
    loss: Callable[..., Loss], state: TrainState, batch: Batch, mesh: Mesh | None, turns: int
) -> tuple[Loss, Any]:
    """`loss_gradient`, of so many micro-batches one after the other, their totals summed."""
    if turns == 1:
        return loss_gradient(loss, state, batch, mesh)
    gradient = lambda part: loss_gradient(loss, state, part, mesh)
    parts = split_rows(batch, turns, mesh)

    def accumulate(carry, part):
        value, grads = gradient(part)
        sums = (value.total, value.denominator, value.sums, grads)
        return jax.tree.map(jnp.add, carry, sums), value.rows

    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        (shapes[0].total, shapes[0].denominator, shapes[0].sums, shapes[1]),
    )
    (total, denominator, sums, grads), rows = jax.lax.scan(accumulate, zeros, parts)
    return Loss(total, denominator, join_rows(rows), sums), grads


def make_step(
    loss: Callable[..., Loss],
    optimizer: optax.GradientTransformation,
    config: ForwardConfig,
    mesh: Mesh | None,
    name: str,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepReport]]:
    """One update from `loss(model, batch)`, whose totals are summed over micro-batches before they are divided.

    The state is donated.
    """

    def step(state: TrainState, batch: Batch):
        rows = batch.tokens.shape[0]
        # Besides the state there are gradients, their sum over the turns, and the weights in the type that is computed in.
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
        if mesh is not None:  # what comes out lies as what went in: no second compilation, no drifting layout
            new = jax.lax.with_sharding_constraint(new, shardings(new, mesh))
        tokens = jnp.maximum(value.sums["tokens"], 1.0)
        metrics = {key: x / tokens for key, x in value.sums.items() if key != "tokens"}
        metrics |= {
            "loss": value.total * scale,
            "grad_norm": optax.tree.norm(grads),
            "tokens": value.sums["tokens"],
        }
        rows = jnp.where(batch.weight > 0, value.rows, 0.0)
        return new, StepReport(metrics, constrain(rows, mesh))  # whole on every device: any process can look at it

    step.__name__ = name
    return jax.jit(step, donate_argnums=0)


def make_sft_step(
    config: ForwardConfig,
    optimizer: optax.GradientTransformation,
    *,
    normalizer: Literal["row", "token"] = "row",
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepReport]]:
    """(state, batch) -> (state, report): one step of supervised tuning on the chosen tokens. `advantage` is not read."""

    def loss(model, batch: Batch) -> Loss:
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
    """(state, batch) -> (state, report): one clipped policy-gradient step; temperatures are those of the rollout.

    With `loss_config.kl` the model has adapters, and the policy stays near what it is without them: the reference's
    log-probabilities come from the same base weights, a forward pass more.
    """
    temperatures = {"temperature": temperature, "later_temperature": later_temperature}

    def loss(model, batch: Batch) -> Loss:
        logprobs, entropy = trajectory_logprobs(model, batch, config, mesh=mesh, **temperatures)
        reference = None
        if loss_config.kl:
            reference, _ = jax.lax.stop_gradient(
                trajectory_logprobs(without_lora(model), batch, config, mesh=mesh, **temperatures)
            )
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
    """(model, batch) -> log-probabilities and entropies of the chosen tokens, float32 [R, L], zero elsewhere."""

    def score_step(model, batch: Batch):
        def score(part: Batch):
            with on_mesh(mesh):
                both = trajectory_logprobs(
                    model, part, config, temperature=temperature, later_temperature=later_temperature, mesh=mesh
                )
            return tuple(jnp.where(part.loss_mask, x, 0.0) for x in both)

        batch = constrain(batch, mesh, ROWS)
        turns = config.turns(model.config, batch, mesh, held=bytes_of(model))
        if turns == 1:
            return constrain(score(batch), mesh, ROWS)
        both = jax.lax.map(score, split_rows(batch, turns, mesh))
        return tuple(constrain(join_rows(x), mesh, ROWS) for x in both)

    return jax.jit(score_step)
