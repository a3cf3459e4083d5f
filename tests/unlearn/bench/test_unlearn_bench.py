"""`unlearn-jax bench`: the alternatives agree, and the record says what was measured."""

import json

import jax
import numpy as np
import pytest

from pixel_jax.bench.report import run_cases
from unlearn_jax.bench.cases import CASES, Inputs, _dense, _flat, product
from unlearn_jax.bench.cost_curve import cost_curve
from unlearn_jax.curvature import hvp
from unlearn_jax.experiment import small_transformer


@pytest.mark.torch
def test_the_twin_is_the_same_model():
    import torch

    from unlearn_jax.bench import libraries

    problem = Inputs.of(small_transformer.TransformerSize(11, 6, width=8, heads=4, rank=2), batch=3)
    model = libraries.Twin(problem.base, problem.adapter, heads=4)
    ours = jax.vmap(lambda tokens: small_transformer.forward(problem.base, problem.adapter, tokens, 4)[0])
    logits = model(torch.tensor(problem.batch["tokens"], dtype=torch.int64))
    np.testing.assert_allclose(logits.detach(), ours(problem.batch["tokens"]), rtol=2e-4, atol=2e-5)
    back = libraries.from_torch(libraries.to_torch(problem.vector))
    jax.tree.map(np.testing.assert_array_equal, back, jax.tree.map(np.asarray, problem.vector))
    parameters = [tuple(x.shape) for x in model.adapter()]
    assert parameters == [tuple(x.shape) for x in libraries.to_torch(problem.adapter)]
    flat = libraries.flatten(libraries.to_torch(problem.vector))
    assert all(
        torch.equal(x, y)
        for x, y in zip(
            libraries.unflatten(flat, parameters_of(model)), libraries.to_torch(problem.vector), strict=True
        )
    )


def parameters_of(model):
    return [x.detach() for x in model.adapter()]


@pytest.mark.torch
def test_products_of_all_that_is_installed_agree():
    """`check` compares them; a product that differs is refused."""
    work = product(True)
    outputs = {name: prepare()() for name, prepare in work.alternatives.items()}
    work.check(outputs)
    assert {"hvp", "torch, double backward", "torch.func, jvp of grad"} <= outputs.keys()
    with pytest.raises(ValueError, match="'hvp' and 'torch, double backward' differ"):
        work.check({**outputs, "torch, double backward": outputs["torch, one gradient"]})


@pytest.mark.slow
def test_solves_are_held_against_the_dense_answer(tmp_path):
    record = run_cases("unlearn_jax.bench.cases", ["solve"], True, tmp_path / "bench.json")
    details = record["cases"]["solve"]["details"]
    for name in ("cg, hessian", "cg, ggn"):
        assert float(details[name].split()[1]) < 0.02
    assert 0 < float(details["ekfac"].split()[1]) < 2
    assert json.loads((tmp_path / "bench.json").read_text()) == record
    assert [case.name for case in CASES] == ["product", "reused", "solve"]


def test_dense_matrices_are_symmetric():
    problem = Inputs.of(small_transformer.TransformerSize(7, 4, width=8, heads=4, layers=1, rank=1), batch=2)
    make = hvp(problem.loss, problem.adapter, problem.batch)
    A = _dense(make, problem.vector)
    np.testing.assert_allclose(A @ _flat(problem.vector), _flat(make(problem.vector)), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_cost_curve(tmp_path):
    found = cost_curve(tmp_path / "curve.json", quick=True)
    assert json.loads((tmp_path / "curve.json").read_text()) == found
    before, *rows = found["rows"]
    assert 1 < rows[0]["epochs"] < rows[1]["epochs"] < found["training_epochs"]
    assert all(row["epochs"] <= row["budget"] for row in rows)
    assert all(row["kl_forget"] < before["kl_forget"] for row in rows)
