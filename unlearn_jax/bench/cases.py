"""The cases of `unlearn-jax bench`: Hessian-vector products, products with a stored linearisation, and damped solves.

All use one language model with low-rank adapters (`experiment.small_transformer`) in float32; torch has the same weights
(`libraries.Twin`).
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from pixel_jax.bench.timing import Aim, Case, Run, Workload
from unlearn_jax.arrays import Params
from unlearn_jax.bench import MOST_STEPS, RTOL
from unlearn_jax.curvature import ggnvp, hvp, mean_objective, per_example_gradients, sample_labels
from unlearn_jax.experiment import small_transformer
from unlearn_jax.loss import CrossEntropy, Loss
from unlearn_jax.solvers import cg, ekfac

HEADS = 4
TOLERANCE = 2e-3  # float32 products of another order of sums, relative


class Inputs(NamedTuple):
    """A base model, an adapter with nonzero factors, a batch and a vector."""

    size: small_transformer.TransformerSize
    base: dict[str, jax.Array]
    adapter: Params
    batch: dict[str, np.ndarray]  # tokens, labels int32 [B, T]
    vector: Params
    loss: Loss

    @classmethod
    def of(cls, size: small_transformer.TransformerSize, batch: int) -> "Inputs":
        """Draws the inputs; the same size gives the same numbers."""
        rng = np.random.default_rng(0)
        base = small_transformer.init_base(jax.random.key(0), size)
        fresh = small_transformer.init_adapter(jax.random.key(1), size)
        draw = lambda x: jnp.asarray(0.3 * size.width**-0.5 * rng.normal(size=x.shape), x.dtype)
        tokens, labels = rng.integers(0, size.vocabulary, (2, batch, size.length)).astype(np.int32)
        loss = Loss(Partial(_logits, base), CrossEntropy(), mask=None)
        adapter = jax.tree.map(lambda x: x + draw(x), fresh)
        return cls(
            size, base, adapter, {"tokens": tokens, "labels": labels}, jax.tree.map(lambda x: draw(x), fresh), loss
        )

    def describe(self) -> str:
        """The size in words."""
        count = sum(x.size for x in jax.tree.leaves(self.adapter))
        return (
            f"{self.size.layers} layers of width {self.size.width}, vocabulary {self.size.vocabulary}, "
            f"{len(self.batch['tokens'])} x {self.size.length} tokens, adapters of {count} numbers"
        )


def _logits(base, adapter, example):
    return small_transformer.forward(base, adapter, example["tokens"], HEADS)[0]


def _product_problem(quick: bool) -> Inputs:
    if quick:
        return Inputs.of(small_transformer.TransformerSize(64, 16, width=32, heads=HEADS, rank=2), batch=4)
    return Inputs.of(small_transformer.TransformerSize(2048, 128, width=256, heads=HEADS, layers=4, rank=8), batch=8)


def product(quick: bool) -> Workload:
    """Products at new parameters every time, so that nothing can be stored between them."""
    problem = _product_problem(quick)
    alternatives = {
        "hvp": lambda: Partial(hvp(problem.loss, problem.adapter, problem.batch), problem.vector),
        "one gradient": lambda: _gradient(problem),
    }
    aims = [Aim("one gradient", 1 / 2.1)]
    if _installed("torch"):
        alternatives |= {
            "torch, double backward": lambda: _torch(problem).double_backward,
            "torch.func, jvp of grad": lambda: _torch(problem).forward_over_reverse,
            "torch, one gradient": lambda: _torch(problem).gradient,
        }
        aims += [Aim("torch, double backward", 1.3), Aim("torch.func, jvp of grad", 1.6)]
        if _installed("dattri"):
            for mode in ("rev-rev", "rev-fwd"):
                alternatives[f"dattri, {mode}"] = functools.partial(_torch_run, problem, "dattri", mode)
        if _installed("pydvl"):
            alternatives["pyDVL, HessianOperator"] = lambda: _torch(problem).pydvl
    return Workload(
        shapes=problem.describe(),
        alternatives=alternatives,
        check=_equal,
        aims=tuple(aims),
        memory=tuple(
            name for name in ("hvp", "torch, double backward", "torch.func, jvp of grad") if name in alternatives
        ),
        details=_missing(),
    )


def reused(quick: bool) -> Workload:
    """Products with other vectors at the same parameters, where everything that does not depend on the vector is stored."""
    problem = _product_problem(quick)
    alternatives: dict[str, Callable[[], Run]] = {
        "hvp, linearize": lambda: Partial(
            hvp(problem.loss, problem.adapter, problem.batch, linearize=True), problem.vector
        ),
        "one gradient": lambda: _gradient(problem),
    }
    aims = [Aim("one gradient", 1 / 2.1)]
    if _installed("torch"):
        alternatives["torch, retained graph"] = lambda: _torch(problem).retained()
        aims.append(Aim("torch, retained graph", 1.3))
        if _installed("dattri"):
            alternatives["dattri, hvp_at_x"] = lambda: _torch(problem).dattri_at_x()
        if _installed("pydvl"):
            alternatives["pyDVL, precomputed gradient"] = lambda: _torch(problem).pydvl_precomputed()
    return Workload(
        shapes=problem.describe(),
        alternatives=alternatives,
        check=_equal,
        aims=tuple(aims),
        memory=tuple(name for name in ("hvp, linearize", "torch, retained graph") if name in alternatives),
        details=_missing(),
    )


def solve(quick: bool) -> Workload:
    """Solves of (curvature + damping) x = b; each x is compared with the dense solution with the same curvature matrix."""
    rank, length, batch = (1, 8, 4) if quick else (2, 16, 32)
    problem = Inputs.of(small_transformer.TransformerSize(48, length, width=32, heads=HEADS, rank=rank), batch)
    b, unravel = ravel_pytree(problem.vector)
    dense = {
        "hessian": _dense(hvp(problem.loss, problem.adapter, problem.batch), problem.vector),
        "ggn": _dense(ggnvp(problem.loss, problem.adapter, problem.batch), problem.vector),
    }
    values = np.linalg.eigvalsh(dense["hessian"])
    damping = float(1e-2 * values[-1] + 2 * max(-values[0], 0))
    answers = {
        kind: np.linalg.solve(A + damping * np.eye(len(A)), np.asarray(b, np.float64)) for kind, A in dense.items()
    }
    details = {"damping": f"{damping:.3g}", **_missing()}
    kinds = {"cg, hessian": "hessian", "cg, ggn": "ggn", "ekfac": "ggn"}
    alternatives = {
        "cg, hessian": lambda: _cg(problem, hvp, damping),
        "cg, ggn": lambda: _cg(problem, ggnvp, damping),
        "ekfac": lambda: _ekfac(problem, damping),
    }
    if _installed("torch"):
        if _installed("dattri"):
            alternatives["dattri, ihvp_cg"] = lambda: _torch(problem).dattri_cg(damping)
            alternatives["dattri, ihvp_explicit"] = lambda: _torch(problem).dattri_explicit(damping)
            kinds |= {"dattri, ihvp_cg": "hessian", "dattri, ihvp_explicit": "hessian"}
        if _installed("pydvl"):
            alternatives["pyDVL, CgOperator"] = lambda: _torch(problem).pydvl_cg(damping)
            kinds["pyDVL, CgOperator"] = "hessian"
        if _installed("kronfluence"):
            alternatives["kronfluence, ekfac"] = lambda: _torch(problem).kronfluence(damping)
            kinds["kronfluence, ekfac"] = "ggn"

    def check(outputs: Mapping[str, Any]) -> None:
        for name, x in outputs.items():
            answer = answers[kinds[name]]
            error = np.linalg.norm(_flat(x) - answer) / np.linalg.norm(answer)
            details[name] = f"is {error:.2g} from the dense answer ({kinds[name]})"
            if name.startswith("cg") and not error < 10 * RTOL * (1 + values[-1] / damping):
                raise ValueError(f"{name}: its solution is {error:.2g} from the dense answer")

    return Workload(shapes=problem.describe(), alternatives=alternatives, check=check, details=details)


CASES = (Case("product", product), Case("reused", reused), Case("solve", solve))


def _gradient(problem: Inputs) -> Run:
    objective = mean_objective(problem.loss, problem.adapter, problem.batch)
    return lambda: objective.gradient(problem.adapter)


def _cg(problem: Inputs, make: Callable, damping: float) -> Run:
    product = make(problem.loss, problem.adapter, problem.batch)
    solver = cg(rtol=RTOL, max_steps=MOST_STEPS)
    run = jax.jit(lambda b: solver.solve(product, b, damping=damping)[0])
    return lambda: run(problem.vector)


def _ekfac(problem: Inputs, damping: float) -> Run:
    """EK-FAC with labels drawn from the model; the factors are computed anew every time."""
    objective = mean_objective(problem.loss, problem.adapter, problem.batch)

    @jax.jit
    def run(objective, b):
        drawn = sample_labels(objective, problem.adapter, jax.random.key(0))
        weights = drawn.whole(drawn.coefficients)
        return ekfac().build(per_example_gradients(drawn, problem.adapter), damping=damping, weights=weights)(b)

    return lambda: run(objective, problem.vector)


def _torch(problem: Inputs):
    from unlearn_jax.bench.libraries import Torch

    return Torch(problem.base, problem.adapter, HEADS, problem.batch, problem.vector)


def _torch_run(problem: Inputs, name: str, *arguments) -> Run:
    return functools.partial(getattr(_torch(problem), name), *arguments)


def _dense(product: Callable, like: Params) -> np.ndarray:
    flat, unravel = ravel_pytree(like)
    rows = jax.lax.map(lambda v: ravel_pytree(product(unravel(v)))[0], jnp.eye(flat.size))
    rows = np.asarray(rows, np.float64)
    return (rows + rows.T) / 2


def _flat(output: Any) -> np.ndarray:
    if isinstance(output, list):
        from unlearn_jax.bench.libraries import from_torch

        output = from_torch(output)
    return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in jax.tree.leaves(output)])


def _equal(outputs: Mapping[str, Any]) -> None:
    products = {name: _flat(x) for name, x in outputs.items() if "one gradient" not in name}
    first, *others = products
    for name in others:
        error = np.linalg.norm(products[name] - products[first]) / np.linalg.norm(products[first])
        if not error < TOLERANCE:
            raise ValueError(f"the products of {first!r} and {name!r} differ by {error:.2g}")


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _missing() -> dict[str, str]:
    names = [name for name in ("torch", "kronfluence", "dattri", "pydvl") if not _installed(name)]
    return {"not installed:": ", ".join(names)} if names else {}
