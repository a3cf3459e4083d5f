"""The curvature product of an edit, built from shapes alone, for the planner of `pixel_jax`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pixel_jax.cli import UserError
from pixel_jax.models.model import Model
from pixel_jax.parallel.sharding import ROWS, shardings
from pixel_jax.planning.programs import Program, Recipe, abstract_model, sft_batch, sharded, vision_turns
from pixel_jax.training.batch import Batch
from unlearn_jax.curvature import product
from unlearn_jax.objective import Objective, automatic, zeros
from unlearn_jax.vision_language import adapter_loss

STEP = "unlearn"
LEARNED = 1024  # tokens of a row that carry loss, at most: an assumption about traces


class EditRecipe(Recipe):
    """The recipe of an edit of an adapter that a config trains. It has one step, `STEP`."""

    @classmethod
    def of(cls, recipe: Recipe) -> "EditRecipe":
        """Makes the recipe of an edit from that of the training.

        Raises:
            UserError: the config tunes no adapter.
        """
        for section in ("sft", "lora"):
            if getattr(recipe.config, section) is None:
                raise UserError(f"an edit is of an adapter that was tuned: the config has no {section}")
        return cls(**vars(recipe))

    @property
    def steps(self) -> tuple[str, ...]:
        """The only step."""
        return (STEP,)

    def micro_batches(self, step: str, mesh: Mesh) -> int:
        """The number of micro-batches of `together` rows of a shard, or of one. The config's is for training."""
        return Recipe.micro_batches(dataclasses.replace(self, configured=False), step, mesh)

    def sequences(self, step: str) -> tuple[int, ...]:
        """The only degree of sequence parallelism, 1: a product does not split the positions of a row."""
        return (1,)

    def build(self, step: str, mesh: Mesh) -> Program:
        """Builds the Gauss-Newton product on a mesh of present or described devices."""
        model = abstract_model(self)
        model = sharded(model, shardings(model, mesh))
        batch = sft_batch(self, packed=False)
        function, *arguments = gauss_newton(model, batch, mesh, self.micro_batches(step, mesh))
        return Program(function, tuple(arguments), {"curvature": "ggn"}, vision_turns(self.network), mesh)


def gauss_newton(
    model: Model, batch: Batch, mesh: Mesh, micro_batches: int
) -> tuple[Callable[..., Any], Any, Any, Any]:
    """Returns the curvature product of an edit, and abstract arguments for it.

    Args:
        model: abstract arrays, with an adapter.
        batch: abstract arrays; every row is an example.
        mesh: spreads the rows.
        micro_batches: the number of micro-batches of the rows.

    Returns:
        (`unlearn_jax.curvature.product`, objective, adapter, vector).
    """
    assert batch.visual is not None
    rows, length = batch.tokens.shape
    learned = min(LEARNED, length)
    spread = NamedSharding(mesh, PartitionSpec(None, ROWS))

    def stacked(dtype, *shape) -> Any:
        return jax.ShapeDtypeStruct((micro_batches, rows // micro_batches, *shape), dtype, sharding=spread)

    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    examples = {
        "tokens": stacked(jnp.int32, length),
        "valid": stacked(jnp.bool_, length),
        "places": stacked(jnp.int32, learned),
        "labels": stacked(jnp.int32, learned),
        "loss_mask": stacked(jnp.bool_, learned),
        "visual": {name: stacked(x.dtype, *x.shape[1:]) for name, x in batch.visual._asdict().items()},
    }
    loss, adapter = adapter_loss(model)
    objective = Objective(loss, examples, stacked(jnp.float32), scalar, rows, automatic(mesh))

    def like(zero, x):
        return jax.ShapeDtypeStruct(zero.shape, zero.dtype, sharding=x.sharding)

    vector = jax.tree.map(like, jax.eval_shape(zeros, adapter), adapter)
    return product, objective, adapter, vector
