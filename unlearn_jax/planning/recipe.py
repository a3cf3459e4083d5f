"""The curvature product of an edit, built from shapes alone, for the planner of `pixel_jax`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pixel_jax.cli import UserError
from pixel_jax.models.model import Model
from pixel_jax.parallel.sharding import ROWS, shardings
from pixel_jax.planning.programs import Program, Recipe, abstract_model, array, sft_batch, sharded, vision_turns
from pixel_jax.training.batch import Batch
from unlearn_jax.curvature import product
from unlearn_jax.objective import HOST, Objective, automatic, zeros
from unlearn_jax.vision_language import adapter_loss
from unlearn_jax.words import Words, count_words

STEP = "unlearn"
LEARNED = 1024  # tokens of a row that carry loss, at most: an assumption about traces


@dataclasses.dataclass(frozen=True)
class EditRecipe(Recipe):
    """The recipe of an edit of an adapter that a config trains. It has one step, `STEP`."""

    examples: int | None = None  # in the host's memory (`ErasureConfig.offload`); None: one batch, on the devices

    @classmethod
    def of(cls, recipe: Recipe, examples: int | None = None) -> "EditRecipe":
        """Makes the recipe of an edit from that of the training.

        Raises:
            UserError: the config tunes no adapter, or there are no examples.
        """
        if examples is not None and examples < 1:
            raise UserError(f"--examples={examples} must be positive")
        for section in ("sft", "lora"):
            if getattr(recipe.config, section) is None:
                raise UserError(f"an edit is of an adapter that was tuned: the config has no {section}")
        return cls(**vars(recipe), examples=examples)

    @property
    def steps(self) -> tuple[str, ...]:
        """The only step."""
        return (STEP,)

    def rows(self, step: str) -> int:
        """The number of rows of a product: the examples, filled up to whole batches of the training."""
        batch = self.config.tuning.batch_size
        return batch if self.examples is None else self.examples + -self.examples % batch

    def micro_batches(self, step: str, mesh: Mesh) -> int:
        """The number of micro-batches of `together` rows of a shard, or of one. The config's is for training."""
        if self.configured:
            return dataclasses.replace(self, configured=False).micro_batches(step, mesh)
        return super().micro_batches(step, mesh)

    def sequences(self, step: str) -> tuple[int, ...]:
        """The only degree of sequence parallelism, 1: a product does not split the positions of a row."""
        return (1,)

    def build(self, step: str, mesh: Mesh) -> Program:
        """Builds the Gauss-Newton product on a mesh of present or described devices."""
        model = abstract_model(self)
        model = sharded(model, shardings(model, mesh))
        batch = jax.tree.map(lambda x: array(x.dtype, self.rows(step), *x.shape[1:]), sft_batch(self, packed=False))
        offload = self.examples is not None
        function, *arguments = gauss_newton(model, batch, mesh, self.micro_batches(step, mesh), offload)
        return Program(function, tuple(arguments), {"curvature": "ggn"}, vision_turns(self.network), mesh)


def gauss_newton(
    model: Model, batch: Batch, mesh: Mesh, micro_batches: int, offload: bool = False
) -> tuple[Callable[..., Any], Any, Any, Any]:
    """Returns the curvature product of an edit, and abstract arguments for it.

    Args:
        model: abstract arrays, with an adapter.
        batch: abstract arrays; every row is an example.
        mesh: spreads the rows.
        micro_batches: the number of micro-batches of the rows.
        offload: whether the rows are in the memory of the host.

    Returns:
        (`unlearn_jax.curvature.product`, objective, adapter, vector).

    Raises:
        UserError: the description of the devices has no memory of a host.
    """
    assert batch.visual is not None
    rows, length = batch.tokens.shape
    learned = min(LEARNED, length)
    spread = NamedSharding(mesh, PartitionSpec(None, ROWS))
    kept = spread.with_memory_kind(HOST) if offload else spread
    if offload and kept.memory_kind != HOST:
        kind = mesh.devices.flat[0].device_kind
        raise UserError(f"--examples: the description of {kind} has no memory of the host, in which they would be kept")

    def stacked(dtype, *shape, sharding=spread) -> Any:
        return jax.ShapeDtypeStruct((micro_batches, rows // micro_batches, *shape), dtype, sharding=sharding)

    def field(dtype, *shape) -> Any:
        if not offload:
            return stacked(dtype, *shape)
        words = count_words(shape, np.dtype(dtype))
        return Words(stacked(np.uint32, words, sharding=kept), shape, np.dtype(dtype))

    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    examples = {
        "tokens": field(jnp.int32, length),
        "valid": field(jnp.bool_, length),
        "places": field(jnp.int32, learned),
        "labels": field(jnp.int32, learned),
        "loss_mask": field(jnp.bool_, learned),
        "visual": {name: field(x.dtype, *x.shape[1:]) for name, x in batch.visual._asdict().items()},
    }
    loss, adapter = adapter_loss(model)
    coefficients = stacked(jnp.float32)
    objective = Objective(loss, examples, coefficients, scalar, rows, automatic(mesh), offload)

    def like(zero, x):
        return jax.ShapeDtypeStruct(zero.shape, zero.dtype, sharding=x.sharding)

    vector = jax.tree.map(like, jax.eval_shape(zeros, adapter), adapter)
    return product, objective, adapter, vector
