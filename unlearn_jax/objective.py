"""The function that is minimised: a weighted sum over examples, and a quadratic regulariser.

Training minimises, over examples i with weights w_i, element losses that sum to S_i over T_i elements,

    R = sum_i w_i (S_i / T_i) / sum_i w_i  + weight_decay / 2 |params|^2        reduction "per_example"
    R = sum_i w_i  S_i        / sum_i w_i T_i  + weight_decay / 2 |params|^2    reduction "per_token"

Both are `sum_i c_i S_i` with coefficients c_i that do not depend on the parameters. An `Objective` holds the stacked examples and
their coefficients. An edit changes examples and coefficients; gradients, curvature products and baselines use nothing else.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from unlearn_jax import tree
from unlearn_jax.arrays import Example, Params
from unlearn_jax.dataset import Dataset
from unlearn_jax.loss import CONSTANT, Loss, has_field, require_parts, sum_and_weight
from unlearn_jax.words import to_arrays, to_words

Reduction = Literal["per_example", "per_token"]
HOST = "pinned_host"  # the memory of the host that a device reads
DATA_AXES = ("data", "fsdp")  # examples are spread over those of these mesh axes that the mesh has
CHUNK = 1024  # examples whose weights are read at once
FORWARD = 1 / 3  # cost of a forward pass of an example, in example-gradients (forward and backward), the unit of cost


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """sum_i coefficient_i * sum_i(params) + weight_decay / 2 |params|^2, taken a micro-batch at a time.

    A pytree: its arrays are arguments of the jitted methods, and one compilation serves all objectives of a shape. Sums run
    in float32 or the parameters' dtype, whichever is wider.
    """

    loss: Callable
    examples: Example  # [micro-batches, micro_batch, ...]; fields that are offloaded are `Words`
    coefficients: jax.Array  # [micro-batches, micro_batch]; zero for padding
    weight_decay: jax.Array  # []
    count: int  # number of examples; those after it are padding
    mesh: Mesh | None = None
    offloaded: bool = False  # the examples are in the memory of the host; a micro-batch is copied when it is used

    @classmethod
    def of(
        cls,
        loss: Callable,
        examples: Example,
        coefficients: np.ndarray | jax.Array,
        *,
        weight_decay: float = 0.0,
        micro_batch: int | None = None,
        mesh: Mesh | None = None,
        offload: bool = False,
    ) -> "Objective":
        """The objective of examples and their coefficients.

        Args:
            loss: `loss(params, example)` -> a scalar or (sum, weight), or a `Loss`.
            examples: fields [n, ...], on the host or traced. Without a mesh they stay on the host: for repeated use
                move them with `on_device`.
            coefficients: [n].
            weight_decay: of the quadratic regulariser.
            micro_batch: examples that are computed at a time; None: all.
            mesh: spreads the examples over its axes `data` and `fsdp`.
            offload: keep the examples in the memory of the host, where a device has access to it (`pinned_host`).

        Raises:
            ValueError: fields of different lengths, no example, or a mesh without those axes.
        """
        count = len(coefficients)
        for path, x in jax.tree_util.tree_leaves_with_path(examples):
            if jnp.shape(x)[:1] != (count,):
                name = jax.tree_util.keystr(path)
                raise ValueError(f"the examples' field {name} has the shape {jnp.shape(x)}; there are {count} examples")
        if not count:
            raise ValueError("an objective needs at least one example")
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch must be positive, not {micro_batch}")
        micro_batch = min(micro_batch or count, count)
        if mesh is not None:
            mesh = automatic(mesh)
            micro_batch += -micro_batch % _shards(mesh)
        index = np.arange(count + -count % micro_batch)

        # Padding repeats examples, because a loss need not be differentiable at zeros.
        def stack(x):
            rows = x[index % count].reshape(-1, micro_batch, *x.shape[1:])
            rows = to_words(_canonical(rows), axes=2) if offload else rows
            return jax.tree.map(lambda part: _device_put(part, mesh, offload), rows)

        dtype = jax.dtypes.canonicalize_dtype(float)  # float64 where it is enabled
        # On the host, as the examples are.
        nothing: Any = np.zeros((len(index) // micro_batch, micro_batch), dtype)
        empty = cls(loss, jax.tree.map(stack, examples), nothing, nothing[0, 0], count, mesh, offload)
        return empty.weighted(coefficients, weight_decay)

    def weighted(self, coefficients: np.ndarray | jax.Array, weight_decay: float = 0.0) -> "Objective":
        """The same examples with other coefficients [count]; compiled programs are shared."""
        like = self.coefficients
        pad = np.pad if isinstance(coefficients, np.ndarray) else jnp.pad
        stacked = pad(coefficients.astype(like.dtype), (0, like.size - self.count)).reshape(like.shape)
        return dataclasses.replace(
            self, coefficients=_device_put(stacked, self.mesh), weight_decay=np.asarray(weight_decay, like.dtype)
        )

    def with_constants(self) -> "Objective":
        """The objective whose examples hold `Loss.constant`, which is the same for all parameters and is computed once, here."""
        if not isinstance(self.loss, Loss) or self.loss.constant is None:
            return self
        return dataclasses.replace(self, examples={**self.examples, CONSTANT: jax.block_until_ready(self._constants())})

    @property
    def example(self) -> Example:
        """The shapes and dtypes of an example."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), jax.eval_shape(to_arrays, self.examples)
        )

    @property
    def has_constants(self) -> bool:
        """Whether the examples hold `Loss.constant`."""
        return has_field(self.examples, CONSTANT)

    @jax.jit
    def _constants(self) -> Any:
        constant = require_parts(self.loss, "a constant part").constant
        assert constant is not None  # `with_constants` has looked
        return self.each(lambda part: jax.vmap(constant)(part.examples))

    @jax.jit
    def value(self, params: Params) -> jax.Array:
        """The objective [] at params."""
        data = self.accumulate(lambda part: part.data_value(params), jnp.zeros((), widest(params)))
        return data + self._regulariser(params)

    @jax.jit
    def gradient(self, params: Params) -> Params:
        """The gradient of the objective, a pytree like params, float32 or wider."""
        data = self.accumulate(lambda part: jax.grad(part.data_value)(params), zeros(params))
        return self._regularised(params, data)

    @jax.jit
    def value_and_gradient(self, params: Params) -> tuple[jax.Array, Params]:
        """(`value`, `gradient`) in one pass."""
        start = (jnp.zeros((), widest(params)), zeros(params))
        value, gradient = self.accumulate(lambda part: jax.value_and_grad(part.data_value)(params), start)
        return value + self._regulariser(params), self._regularised(params, gradient)

    @jax.jit
    def per_example(self, params: Params) -> jax.Array:
        """sum_i of every example, float [count]."""
        return self.whole(self.each(lambda part: part.sums(params)))

    @jax.jit
    def sums_and_gradient(self, params: Params) -> tuple[jax.Array, Params]:
        """sum_i of every example, float [count], and `gradient`, in one pass."""

        def add(total, arrays):
            part = self.part(arrays)
            sums, pull = jax.vjp(part.sums, params)
            (gradient,) = pull(part.coefficients.astype(sums.dtype))
            return jax.tree.map(lambda a, g: a + g.astype(a.dtype), total, gradient), sums

        gradient, sums = jax.lax.scan(add, zeros(params), (self.examples, self.coefficients))
        return self.whole(sums), self._regularised(params, gradient)

    @jax.jit
    def weights(self, params: Params) -> jax.Array:
        """T_i of every example, padding included, [micro-batches, micro_batch]."""
        weight = lambda example: sum_and_weight(self.loss, params, example)[1]
        return self.each(lambda part: jax.vmap(weight)(part.examples))

    def sums(self, params: Params) -> jax.Array:
        """sum_i of the examples of one micro-batch, [micro_batch]."""
        return jax.vmap(lambda example: sum_and_weight(self.loss, params, example)[0])(self.examples)

    def data_value(self, params: Params) -> jax.Array:
        """sum_i coefficient_i * sum_i of one micro-batch, [], without the regulariser."""
        return jnp.sum(self.coefficients * self.sums(params))

    def part(self, arrays: tuple[Example, jax.Array]) -> "Objective":
        """One micro-batch, spread over the mesh: examples [micro_batch, ...] and coefficients [micro_batch]."""
        if self.offloaded:
            arrays = jax.device_put(arrays[0], jax.memory.Space.Device), arrays[1]
        if self.mesh is not None:
            sharding = NamedSharding(self.mesh, PartitionSpec(_axes(self.mesh)))
            arrays = jax.lax.with_sharding_constraint(arrays, sharding)
        return dataclasses.replace(self, examples=to_arrays(arrays[0]), coefficients=arrays[1])

    def accumulate(self, function: Callable[["Objective"], Any], start: Any) -> Any:
        """`start` plus the sum of `function` over micro-batches, in the dtypes of `start`."""

        def add(total, arrays):
            return jax.tree.map(lambda a, x: a + x.astype(a.dtype), total, function(self.part(arrays))), None

        return jax.lax.scan(add, start, (self.examples, self.coefficients))[0]

    def each(self, function: Callable[["Objective"], Any]) -> Any:
        """The results of `function` for all micro-batches, stacked: [micro-batches, ...]."""
        return jax.lax.map(lambda arrays: function(self.part(arrays)), (self.examples, self.coefficients))

    def whole(self, x: jax.Array) -> jax.Array:
        """An array of each example, [micro-batches, micro_batch, ...] -> [count, ...], the same on all devices of the mesh."""
        x = x.reshape(-1, *x.shape[2:])[: self.count]
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec()))

    def _regulariser(self, params: Params) -> jax.Array:
        wide = widen(params)
        square = tree.vdot(wide, wide)
        return 0.5 * self.weight_decay.astype(square.dtype) * square

    def _regularised(self, params: Params, gradient: Params) -> Params:
        return jax.tree.map(lambda g, p: g + self.weight_decay.astype(g.dtype) * p.astype(g.dtype), gradient, params)

    def tree_flatten(self):
        """For JAX: functions in the loss are static, its arrays are not."""
        leaves, structure = jax.tree.flatten(self.loss)
        arrays = [None if callable(x) else x for x in leaves]
        functions = tuple(x if callable(x) else None for x in leaves)
        return (arrays, self.examples, self.coefficients, self.weight_decay), (
            functions,
            structure,
            self.count,
            self.mesh,
            self.offloaded,
        )

    @classmethod
    def tree_unflatten(cls, static, children):
        """For JAX."""
        functions, structure, count, mesh, offloaded = static
        arrays, examples, coefficients, weight_decay = children
        leaves = [x if function is None else function for x, function in zip(arrays, functions, strict=True)]
        return cls(structure.unflatten(leaves), examples, coefficients, weight_decay, count, mesh, offloaded)


def element_counts(loss: Callable, params: Params, dataset: Dataset) -> np.ndarray:
    """T_i of every example, float64 [n]; an example without an element that counts is an error."""
    counts = [np.zeros(0)]
    for start in range(0, len(dataset), CHUNK):
        chunk = np.arange(start, min(start + CHUNK, len(dataset)))
        counts.append(_weights(loss, params, dataset.take(chunk)))
    counts = np.concatenate(counts)
    if dataset.normalizers:
        rows = dataset.rows.tolist()
        counts = np.array([dataset.normalizers.get(row, count) for row, count in zip(rows, counts, strict=True)])
    bad = np.flatnonzero(~(np.isfinite(counts) & (counts > 0)))
    if bad.size:
        name = dataset.ids[bad[0]].item()
        raise ValueError(f"example {name!r} has the weight {counts[bad[0]]}: nothing of it counts; Remove takes it out")
    return counts


def normalizer(loss: Callable, params: Params, dataset: Dataset, reduction: Reduction) -> float:
    """The divisor of the sum over examples: sum_i w_i, or sum_i w_i T_i per token."""
    if reduction == "per_example":
        return float(dataset.weights.sum())
    return float((dataset.weights * element_counts(loss, params, dataset)).sum())


def coefficients(
    loss: Callable, params: Params, dataset: Dataset, reduction: Reduction, total: float | None = None
) -> np.ndarray:
    """c_i of every example, float64 [n]. `total`: the `normalizer`, where it is not the dataset's own."""
    total = normalizer(loss, params, dataset, reduction) if total is None else total
    shares = dataset.weights / total
    return shares / element_counts(loss, params, dataset) if reduction == "per_example" else shares


def dataset_objective(
    loss: Callable,
    params: Params,
    dataset: Dataset,
    *,
    reduction: Reduction = "per_example",
    weight_decay: float = 0.0,
    micro_batch: int | None = None,
    mesh: Mesh | None = None,
) -> Objective:
    """R of a whole dataset. Of `params` only the shapes are used."""
    weights = coefficients(loss, params, dataset, reduction)
    options = {"weight_decay": weight_decay, "micro_batch": micro_batch, "mesh": mesh}
    return on_device(Objective.of(loss, dataset.take(), weights, **options))


def on_device(objective: Objective) -> Objective:
    """The objective on the default device; one on a mesh is returned as it is.

    Offloaded examples are put into the memory of the host that this device reads.
    """
    if objective.mesh is not None:
        return objective
    if not objective.offloaded:
        return jax.device_put(objective)
    host = SingleDeviceSharding(jax.local_devices()[0], memory_kind=HOST)
    examples = jax.device_put(objective.examples, host)
    return dataclasses.replace(jax.device_put(dataclasses.replace(objective, examples=())), examples=examples)


def _weights(loss: Callable, params: Params, examples: Example) -> np.ndarray:
    """The weights [k] of examples [k, ...]."""
    count = len(jax.tree.leaves(examples)[0])
    example = jax.tree.map(lambda x: x[0], examples)
    if isinstance(loss, Loss):
        mask = loss.element_mask(examples)
        if mask is None:
            return np.full(count, float(jax.eval_shape(loss.element_losses, params, example).size))
        return np.asarray(mask, np.float64).reshape(count, -1).sum(axis=1)
    if not isinstance(jax.eval_shape(loss, params, example), tuple):
        return np.ones(count)
    objective = Objective.of(loss, examples, np.ones(count))
    return np.asarray(objective.weights(params), np.float64).reshape(-1)


def automatic(mesh: Mesh) -> Mesh:
    """The mesh with axes of type Auto: with Explicit, JAX's default, every gather in a loss would have to name its sharding."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def on_mesh(arrays: Any, mesh: Mesh | None) -> Any:
    """A pytree with all arrays on the mesh; those that are not on it yet are copied to all of its devices."""
    if mesh is None:
        return arrays
    replicated = NamedSharding(automatic(mesh), PartitionSpec())

    def put(x):
        if callable(x):
            return x
        sharding = x.sharding if isinstance(x, jax.Array) else None
        if not isinstance(sharding, NamedSharding) or sharding.device_set != replicated.device_set:
            return jax.device_put(x, replicated)
        assert isinstance(sharding.mesh, Mesh)  # an array's is not abstract
        return jax.device_put(x, NamedSharding(automatic(sharding.mesh), sharding.spec))

    return jax.tree.map(put, arrays)


def widest(params: Params) -> jnp.dtype:
    """The dtype of sums over examples."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(params))


def widen(params: Params) -> Params:
    """params, each leaf float32 or wider."""
    return jax.tree.map(lambda p: jnp.asarray(p, jnp.promote_types(p.dtype, jnp.float32)), params)


def zeros(params: Params) -> Params:
    """Zeros like params, each leaf float32 or wider."""
    return tree.zeros_like(widen(params))


def _axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in DATA_AXES if axis in mesh.shape)


def _shards(mesh: Mesh) -> int:
    if not _axes(mesh):
        raise ValueError(f"examples are spread over the mesh axes {DATA_AXES}; the mesh has {tuple(mesh.shape)}")
    return math.prod(mesh.shape[axis] for axis in _axes(mesh))


def _device_put(x: np.ndarray | jax.Array, mesh: Mesh | None, offload: bool = False) -> np.ndarray | jax.Array:
    """[micro-batches, micro_batch, ...], sharded over the mesh by example; unchanged without a mesh."""
    if isinstance(x, Tracer) or (mesh is None and isinstance(x, jax.Array)):
        return x
    x = _canonical(x)
    if mesh is None:
        return x
    sharding = NamedSharding(mesh, PartitionSpec(None, _axes(mesh)), memory_kind=HOST if offload else None)
    # With several processes each has read all examples and takes those of its own devices.
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _canonical(x: Any) -> np.ndarray:
    """An array on the host, in the dtype in which JAX computes with it."""
    return np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))
