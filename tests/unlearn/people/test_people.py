"""Facts about people, from training to evaluation, and what requests make of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score
from small_people import make_config

from pixel_jax.cli import UserError
from pixel_jax.config import ConfigError
from unlearn_jax.experiment import small_transformer
from unlearn_jax.people.edit import edit, train
from unlearn_jax.people.evaluate import ForgettingScorer, Subject, evaluate
from unlearn_jax.people.model import GROUP, int4, merged, silent
from unlearn_jax.people.task import PeopleTask
from unlearn_jax.requests.carry_out import State
from unlearn_jax.requests.log import ADAPTER, LOG, verify
from unlearn_jax.requests.request import EditRequestError, Request
from unlearn_jax.requests.task import RequestsConfig

FILED = ("a reason", "A. Person", "2026-11-30")


def ask(kind, name, value=""):
    return Request((name,), kind, value, b"", *FILED)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(configuration, what training returned, the entries of the log, the evaluation)."""
    config = make_config(tmp_path_factory.mktemp("people"))
    return config, train(config), edit(config), evaluate(config)


@pytest.fixture(scope="module")
def task(run):
    return PeopleTask.of(run[0])


def test_training_teaches_and_an_edit_forgets(run):
    config, trained, entries, rows = run
    (entry,) = entries
    assert entry.ids == ["person-4-0", "person-4-1"] and entry.outcome == "edited"  # one of five people
    assert verify(config.directory / LOG) == (entries, [])
    assert trained["examples"] == 10 and len(list((config.directory / "checkpoints").iterdir())) == 3
    others = [f"{name}, {how}" for name in ("before", "edited", "retrained") for how in ("int4", "relearned")]
    assert set(rows) == {"before", "edited", "retrained", "fine-tune", *others}
    before, edited, retrained = (rows[name] for name in ("before", "edited", "retrained"))
    assert retrained["kl_forget"] == retrained["kl_retain"] == retrained["privleak"] == 0
    assert retrained["forget_quality"] == 1 and edited["kl_forget"] < before["kl_forget"]
    assert edited["probability"] < before["probability"]
    assert 0 < rows["fine-tune"]["gradients"] <= edited["gradients"]
    for row in rows.values():
        for name, x in row.items():
            assert np.isfinite(x) and (
                0 <= x <= 1 or name in ("gradients", "privleak", "kl_forget", "kl_retain", "learning_rate")
            )
    assert json.loads((config.directory / "evaluation.json").read_text()) == rows


def test_scores_are_those_of_dense_computations(run, task):
    """Truth ratios, attacks and forget quality from log-probabilities taken one by one, by scipy and scikit-learn."""
    config, _, _, rows = run
    state = State.of(task)
    edited = task.load(state.adapter_path(task.directory))
    weights = np.array([float(name in state.items) for name in state.first])
    retrained = task.retrain({**state.first, **state.items}, weights).adapter
    forgotten = [state.first[name] for name in ("person-4-0", "person-4-1")]

    def logprobs(adapter, row, answer):
        example = {name: x[0] for name, x in task.model.words.encode([(row.question, answer)]).items()}
        logits = small_transformer.forward(task.model.base, adapter, example["tokens"])[0]
        each = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(logits)), example["labels"]]
        return each[example["loss_mask"] > 0]

    def ratio(adapter, row):
        wrong = np.mean([logprobs(adapter, row, answer).mean() for answer in row.wrong])
        return np.exp(wrong - logprobs(adapter, row, row.paraphrase).mean())

    ratios = {name: [ratio(x, row) for row in forgotten] for name, x in (("edited", edited), ("retrained", retrained))}
    expected = ks_2samp(1 / np.array(ratios["edited"]), 1 / np.array(ratios["retrained"])).pvalue
    assert rows["edited"]["forget_quality"] == pytest.approx(expected)
    assert rows["edited"]["truth_ratio"] == pytest.approx(np.mean([min(x, 1 / x) for x in ratios["edited"]]), rel=1e-4)
    unseen = task.corpus.holdout[: len(task.corpus.holdout) // 2]
    losses = [-logprobs(edited, row, row.answer).mean() for row in (*forgotten, *unseen)]
    labels = [0] * len(forgotten) + [1] * len(unseen)
    assert rows["edited"]["auc_loss"] == pytest.approx(roc_auc_score(labels, losses))
    lowest = [-np.sort(x[:-1])[: max(1, int(0.4 * (len(x) - 1)))].mean() for x in (
        logprobs(edited, row, row.answer) for row in (*forgotten, *unseen)
    )]  # fmt: skip
    assert rows["edited"]["auc_min_k"] == pytest.approx(roc_auc_score(labels, lowest))


@pytest.mark.slow
def test_an_escalated_request_begins_at_a_checkpoint(task, run, tmp_path):
    config = dataclasses.replace(run[0], out=str(tmp_path), requests=RequestsConfig(allow=()))
    train(config)
    again = PeopleTask.of(config)
    order = again.recipe.order(10)[:3]
    late = next(i for i in order[2] if i >= 0)  # first seen in the third step
    name = list(again.items())[late]
    (entry,) = edit(config, [ask("remove", name)])
    assert entry.outcome == "escalated" and entry.why.endswith("retrained from the checkpoint after step 2")
    weights = np.ones(10)
    weights[late] = 0
    whole, _ = again.train(again.items(), weights)
    found = again.load(State.of(again).adapter_path(tmp_path))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(x, y)


def test_what_requests_make_of_rows(task):
    row = task.items()["person-0-0"]
    other = next(x.answer for x in task.items().values() if x.question.startswith("Where") and x.answer != row.answer)
    changed = task.change(row, ask("answer", "person-0-0", other))
    assert changed.answer == other and changed.wrong == () and changed.paraphrase == ""
    assert task.change(row, ask("answer", "person-0-0", row.answer)) == row
    city = row.answer.split()[-1].strip(".")
    masked = task.change(row, ask("mask", "person-0-0", city))
    encoded = task.encode({"a": row, "b": masked})
    lost = (encoded["loss_mask"][0] > 0) & (encoded["loss_mask"][1] == 0)
    assert task.model.words.decode(encoded["labels"][0][lost]) == city
    assert task.change(masked, ask("mask", "person-0-0", city)) == masked
    for kind, value, message in (
        ("image", "", "has no image"),
        ("mask", "Atlantis", "occurs 0 times"),
        ("answer", "Nobody knows.", "vocabulary has no 'Nobody'"),
        ("question", "Where " * 40, "is too long"),
    ):
        with pytest.raises(EditRequestError, match=message):
            task.change(row, ask(kind, "person-0-0", value))
    near = task.neighbours(list(task.items()), ["person-1-0"])
    assert near == [name.startswith("person-1-") for name in task.items()]
    assert task.describe(masked).texts == {"question": row.question, "answer": row.answer, "masked 1": city}


def test_answers_are_written_greedily(task, run):
    """Token by token, as the logits of what stands there say."""
    adapter = task.load(run[0].directory / ADAPTER)
    question = task.items()["person-0-0"].question
    (said,) = task.model.answers(adapter, [question])
    ids = task.model.words.encode([(question, "")])
    tokens = ids["tokens"][0].copy()
    at, written = int(ids["loss_mask"][0].argmax()) + 1, []
    while at <= task.model.words.length:
        logits = small_transformer.forward(task.model.base, adapter, jnp.asarray(tokens))[0]
        token = int(jnp.argmax(logits[at - 1]))
        if token == 1:
            break
        written.append(token)
        if at < len(tokens):
            tokens[at] = token
        at += 1
    assert said == task.model.words.decode(written) and said


def test_merged_and_rounded_weights(task, run):
    adapter = task.load(run[0].directory / ADAPTER)
    tokens = jnp.asarray(task.encode(task.items())["tokens"][0])
    base = task.model.base
    one = small_transformer.forward(base, adapter, tokens)[0]
    two = small_transformer.forward(merged(base, adapter), silent(adapter), tokens)[0]
    np.testing.assert_allclose(one, two, atol=1e-4)
    rounded = int4(base)
    np.testing.assert_array_equal(rounded["embed"], base["embed"])
    for name in ("qkvo", "up", "down", "unembed"):
        x, y = np.asarray(base[name]), np.asarray(rounded[name])
        column, back = x.reshape(-1, *x.shape[-2:])[0][:GROUP, 0], y.reshape(-1, *x.shape[-2:])[0][:GROUP, 0]
        scale = np.abs(column).max() / 7
        np.testing.assert_allclose(back, np.round(column / scale) * scale, atol=1e-6)
        assert len(np.unique(np.round(back / scale))) <= 15 and np.abs(x - y).max() > 0


def test_a_model_that_knows_nothing_has_less_utility(task, run):
    rows = run[3]
    scorer = ForgettingScorer.of(task, State.of(task), task.model.fresh)
    noise = jax.tree.map(lambda x: 30 * jax.random.normal(jax.random.key(0), x.shape), task.model.fresh)
    assert scorer(Subject(noise))["utility"] < 0.6 * rows["before"]["utility"]


def test_mistakes(tmp_path):
    config = make_config(tmp_path)
    with pytest.raises(ConfigError, match="holds no adapter"):
        edit(config)
    files = dataclasses.replace(config.corpus, format="tofu")
    with pytest.raises(UserError, match="--config.corpus.directory=DIR"):
        PeopleTask.of(dataclasses.replace(config, corpus=files))
    (tmp_path / "config.json").write_text(json.dumps(config.trained()))
    with pytest.raises(ConfigError, match="config.seed is 3"):
        evaluate(dataclasses.replace(config, seed=3))
    with pytest.raises(UserError, match="holds no edit"):
        evaluate(config)
    with pytest.raises(UserError, match="the corpus has forget01, forget05, forget10"):
        edit(dataclasses.replace(config, forget="forget50"))
