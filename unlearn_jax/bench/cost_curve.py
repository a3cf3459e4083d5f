"""The cost curve: how near an edit comes to a retrain as its budget of epochs grows.

The dataset has token sequences drawn from a small random network. An adapter is trained on it by L-BFGS until it converges, and
one per cent of the examples are removed. An epoch is as many gradients as there are examples.
"""

import pathlib

import jax
import numpy as np
from jax.tree_util import Partial

from pixel_jax.state_files import write_json
from pixel_jax.terminal import Waiting, say
from unlearn_jax.baselines import converge
from unlearn_jax.dataset import Dataset
from unlearn_jax.edits import Remove, apply
from unlearn_jax.erase import erase
from unlearn_jax.experiment import small_transformer
from unlearn_jax.loss import CrossEntropy, Loss
from unlearn_jax.metrics import tokens
from unlearn_jax.objective import dataset_objective

SHARE = 0.01
WEIGHT_DECAY = 1e-2
HEADS = 2
STEPS = 100  # of L-BFGS, at most


def cost_curve(path: str | pathlib.Path, quick: bool = False) -> dict:
    """Measures an edit at several budgets, and writes {"training_epochs", "rows", ...} to `path`.

    A row has the budget in epochs, the epochs that were spent, and the KL to the warm retrain.
    """
    count, budgets = (200, (4.0, 7.0)) if quick else (20_000, (3.0, 5.0, 7.0, 10.0, 15.0, 25.0))
    size = small_transformer.TransformerSize(32, 8, width=16, heads=HEADS, layers=1, rank=2)
    base = small_transformer.init_base(jax.random.key(0), size)
    loss = Loss(Partial(_logits, base), CrossEntropy(), mask=None)
    data = Dataset.of(_written(base, size, count))
    fresh = small_transformer.init_adapter(jax.random.key(2), size)
    objective = lambda data: dataset_objective(loss, fresh, data, weight_decay=WEIGHT_DECAY, micro_batch=500)
    with Waiting("training to convergence"):
        trained, norm = converge(objective(data), fresh, tolerance=1e-5, max_steps=STEPS)
    removed = np.arange(round(SHARE * count))
    edits = [Remove(removed)]
    after = apply(data, edits)
    with Waiting("a warm retrain"):
        warm, warm_norm = converge(objective(after), trained.adapter, tolerance=1e-5, max_steps=STEPS)
    sets = {"forget": data.select(removed).take(), "retain": after.select(np.arange(min(1000, len(after)))).take()}

    def kl(adapter):
        """KL to the warm retrain on each set."""
        return {
            f"kl_{name}": float(tokens.kl_to(loss, adapter, warm.adapter, examples, micro_batch=None).mean())
            for name, examples in sets.items()
        }

    rows = [{"budget": 0.0, "epochs": 0.0, **kl(trained.adapter)}]
    for budget in budgets:
        config = {"weight_decay": WEIGHT_DECAY, "micro_batch": 500, "epochs": budget}
        with Waiting(f"an edit of {budget:g} epochs"):
            erasure = erase(loss, trained.adapter, data, edits, config)
        spent = {"budget": budget, "epochs": erasure.report.epochs, "seconds": erasure.report.seconds}
        rows.append({**spent, **kl(erasure.adapter)})
        say("  ".join(f"{name} {value:.3g}" for name, value in rows[-1].items()))
    result = {
        "examples": count,
        "removed": len(removed),
        "training_epochs": trained.gradients / count,
        "retrain_epochs": warm.gradients / count,
        "gradients": [norm, warm_norm],
        "rows": rows,
    }
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    return result


def _logits(base, adapter, example):
    return small_transformer.forward(base, adapter, example["tokens"], HEADS)[0]


def _written(base, size, count):
    """Draws sequences from the network with a random adapter, which training has to find again."""
    key, first = jax.random.split(jax.random.key(1))
    teacher = jax.tree.map(
        lambda x: x + 0.5 * jax.random.normal(key, x.shape), small_transformer.init_adapter(key, size)
    )

    def write(key):
        start, *keys = jax.random.split(key, size.length + 1)
        text = jax.numpy.zeros(size.length + 1, int).at[0].set(jax.random.randint(start, (), 0, size.vocabulary))
        for position, key in enumerate(keys):
            logits = small_transformer.forward(base, teacher, text[:-1], HEADS)[0][position]
            text = text.at[position + 1].set(jax.random.categorical(key, logits))
        return text

    text = np.asarray(jax.jit(jax.vmap(write))(jax.random.split(first, count)), np.int32)
    return {"tokens": text[:, :-1], "labels": text[:, 1:]}
