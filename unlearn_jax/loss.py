"""The loss of an example: a sum over its elements (tokens, answers), and the number of elements.

Any callable `loss(params, example)` that returns a scalar or `(sum, weight)` is a loss; a scalar counts as one element. The
weight may depend on the example, never on the parameters.

`Loss` keeps the network's outputs and the criterion on them separate. Gauss-Newton products, sampled Fisher products and edits
of single elements need both:

    loss = Loss(lambda params, example: model(params, example["tokens"]), CrossEntropy("labels"))

Large arrays that are not edited (the base model) should be arguments. A closure would compile them into the program.
`jax.tree_util.Partial(function, base)` is a callable that carries them as a pytree, here as everywhere in JAX:

    loss = Loss(Partial(lambda base, params, example: model(base, params, example["tokens"]), base), CrossEntropy())
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from unlearn_jax.arrays import Example, Params

MASK = "loss_mask"
CONSTANT = "constant"  # the field with what `Loss.constant` returns, where it has been computed already


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """The criterion -log softmax(logits)[label], in float32 or wider. A label below zero must be masked out."""

    labels: str = "labels"  # the field with the integer labels, [...]

    def __call__(self, logits: jax.Array, example: Example) -> jax.Array:
        """The loss [...] of logits [..., classes]."""
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        labels = jnp.maximum(example[self.labels], 0)[..., None]
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, labels, axis=-1)[..., 0]

    def sample(self, key: jax.Array, logits: jax.Array, example: Example) -> Example:
        """The example with labels drawn from softmax(logits), each element on its own."""
        labels = jax.random.categorical(key, logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
        return {**example, self.labels: labels.astype(jnp.asarray(example[self.labels]).dtype)}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SquaredError:
    """The criterion of half the squared error, summed over the last axis of vector-valued targets: -log of a unit Gaussian."""

    targets: str = "targets"  # the field with the targets, [elements] or [elements, dim]; a scalar is one element

    def __call__(self, outputs: jax.Array, example: Example) -> jax.Array:
        """The loss [elements] of outputs like the targets."""
        error = outputs - example[self.targets]
        half = 0.5 * jnp.square(error.astype(jnp.promote_types(error.dtype, jnp.float32)))
        return half if half.ndim < 2 else half.reshape(half.shape[0], -1).sum(axis=-1)

    def sample(self, key: jax.Array, outputs: jax.Array, example: Example) -> Example:
        """The example with targets drawn from a unit Gaussian around the outputs."""
        return {**example, self.targets: outputs + jax.random.normal(key, outputs.shape, outputs.dtype)}


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Loss:
    """`criterion(outputs(params, example), example)`, summed over the elements that the mask counts.

    outputs:   (params, example) -> z, a pytree of arrays with a leading axis of elements (or scalars: one element)
    criterion: (z, example) -> the loss of each element, from its own outputs alone. It may have `sample(key, z, example)`,
               which draws labels from the model and returns the example with them (see `CrossEntropy`)
    mask:      the field that weights the elements. Examples without the default field count every element once, as all do
               with None
    constant:  `constant(example)`, what does not depend on the parameters, such as the hidden states below the lowest adapted
               layer. `erase` computes it once for every example and keeps it in memory beside them; the outputs are then
               `outputs(params, example, constant)`:

        Loss(lambda params, example, hidden: upper(params, hidden), CrossEntropy(), constant=lower)
    """

    outputs: Callable[..., Any]
    criterion: Callable[[Any, Example], jax.Array]
    mask: str | None = MASK
    constant: Callable[[Example], Any] | None = None

    def __call__(self, params: Params, example: Example) -> tuple[jax.Array, jax.Array]:
        """(sum, weight) of an example, both []."""
        return self.reduce(self.z(params, example), example)

    def z(self, params: Params, example: Example) -> Any:
        """The outputs, from the constant part where the example has it."""
        if self.constant is None:
            return self.outputs(params, example)
        constant = example[CONSTANT] if has_field(example, CONSTANT) else self.constant(example)
        return self.outputs(params, example, constant)

    def element_losses(self, params: Params, example: Example) -> jax.Array:
        """The loss of each element, [elements]; the mask is not applied."""
        return self.criterion(self.z(params, example), example)

    def reduce(self, z: Any, example: Example) -> tuple[jax.Array, jax.Array]:
        """(sum, weight) of an example from its outputs."""
        losses = self.criterion(z, example)
        mask = self.element_mask(example)
        if mask is None:
            return losses.sum(), jnp.asarray(float(losses.size))
        if mask.shape != losses.shape:
            raise ValueError(f"{self.mask!r} has shape {mask.shape}, the element losses have {losses.shape}")
        return (mask * losses).sum(), mask.sum()

    def element_mask(self, example: Example) -> jax.Array | None:
        """The mask of an example or of a batch, float; None where every element counts."""
        if self.mask is None or (self.mask == MASK and not has_field(example, MASK)):
            self._check_labels(example)
            return None
        if not has_field(example, self.mask):
            known = f" has only {', '.join(sorted(example))}" if isinstance(example, Mapping) else " is no dictionary"
            raise ValueError(f"the loss is masked by the field {self.mask!r}; the example{known}")
        self._check_labels(example, example[self.mask])
        return jnp.asarray(example[self.mask]).astype(jnp.result_type(float))

    def _check_labels(self, example: Example, mask: Any = None) -> None:
        """Raises ValueError for a negative label that counts, which would be taken for class 0.

        Traced values are unknown and pass. They are checked all the same, because before anything is solved the number of
        elements of every example is computed on the host.
        """
        field = getattr(self.criterion, "labels", None)
        labels = example[field] if has_field(example, field) else 0
        if any(isinstance(x, Tracer) for x in (labels, mask)):
            return
        if mask is not None and np.shape(mask) != np.shape(labels):
            return  # `reduce` reports it
        counted = np.asarray(labels) if mask is None else np.where(np.asarray(mask) != 0, labels, 0)
        if counted.size and counted.min() < 0:
            raise ValueError(
                f"the label {counted.min()} in {field!r} counts as a class: mask it out, as by a field {self.mask or MASK!r} "
                f"with {field} >= 0 (and name the field as mask of the Loss, unless it is {MASK!r})"
            )

    def tree_flatten(self):
        """For JAX: the mask's name is static."""
        return (self.outputs, self.criterion, self.constant), self.mask

    @classmethod
    def tree_unflatten(cls, mask, children):
        """For JAX."""
        outputs, criterion, constant = children
        return cls(outputs, criterion, mask, constant)


def has_field(example: Example, name: str | None) -> bool:
    """Whether the example is a dictionary with a field of that name."""
    return isinstance(example, Mapping) and name in example


def sum_and_weight(loss: Callable, params: Params, example: Example) -> tuple[jax.Array, jax.Array]:
    """(sum, weight) of one example under any loss."""
    value = loss(params, example)
    total, weight = value if isinstance(value, tuple) else (value, 1.0)
    if jnp.ndim(total) or jnp.ndim(weight):
        raise ValueError(
            f"loss(params, example) is a scalar or (sum, weight); it returned shapes {jnp.shape(total)} and "
            f"{jnp.shape(weight)}"
        )
    return jnp.asarray(total), jnp.asarray(weight)


def require_parts(loss: Callable, wanted: str) -> Loss:
    """`loss`, which must be a `Loss` for what is `wanted`."""
    if not isinstance(loss, Loss):
        raise ValueError(
            f"{wanted} needs the outputs and the criterion apart: write the loss as unlearn_jax.Loss(outputs, criterion); "
            f"with a plain callable curvature can be 'hessian' or 'empirical_fisher'"
        )
    return loss
