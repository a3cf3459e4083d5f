"""The program of an edit, from shapes alone, as the planner of `pixel_jax` compiles and counts it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pixel_jax.cli import UserError
from pixel_jax.models.qwen2_5_vl import Qwen2_5_VL
from pixel_jax.parallel.sharding import ROWS, shardings
from pixel_jax.planning.programs import Program, Recipe, abstract_model, sft_batch, sharded, vision_turns
from pixel_jax.training.batch import Batch
from unlearn_jax.curvature import product
from unlearn_jax.objective import Objective, automatic, zeros
from unlearn_jax.vision_language import adapter_loss

STEP = "unlearn"
LEARNED = 1024  # of a row's tokens, at most those that the assistant wrote: an assumption about traces


class EditRecipe(Recipe):
    """The recipe of an edit of the adapter that a config's tuning has trained. Its one step is `STEP`."""

    @classmethod
    def of(cls, recipe: Recipe) -> "EditRecipe":
        """The edit that goes with a training.

        Raises:
            UserError: the config tunes no adapter.
        """
        for section in ("sft", "lora"):
            if getattr(recipe.config, section) is None:
                raise UserError(f"an edit is of an adapter that was tuned: the config has no {section}")
        return cls(**vars(recipe))

    @property
    def steps(self) -> tuple[str, ...]:
        """The one step."""
        return (STEP,)

    def micro_batches(self, step: str, mesh: Mesh) -> int:
        """As many as leave every part of the mesh one row at a time; those of the config are of its training."""
        return Recipe(self.config, self.network, self.tables, self.dtype).micro_batches(step, mesh)

    def sequences(self, step: str) -> tuple[int, ...]:
        """One: a product does not split the positions of a row."""
        return (1,)

    def build(self, step: str, mesh: Mesh) -> Program:
        """The Gauss-Newton product on a mesh, imagined or not."""
        model = abstract_model(self)
        model = sharded(model, shardings(model, mesh))
        batch = sft_batch(self, packed=False)
        function, *arguments = gauss_newton(model, batch, mesh, self.micro_batches(step, mesh))
        return Program(function, tuple(arguments), {"curvature": "ggn"}, vision_turns(self.network), mesh)


def gauss_newton(
    model: Qwen2_5_VL, batch: Batch, mesh: Mesh, micro_batches: int
) -> tuple[Callable[..., Any], Any, Any, Any]:
    """The product that an edit spends its time in, and abstract arguments for it.

    Args:
        model: of abstract arrays, with an adapter.
        batch: of abstract arrays; every row is an example.
        mesh: over which the rows are spread.
        micro_batches: into how many the rows are divided.

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
