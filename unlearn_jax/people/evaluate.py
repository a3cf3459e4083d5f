"""`unlearn-jax eval` on facts about people: the edited adapter beside the retrained one, by the metrics of TOFU and MUSE.

The retrained adapter is the exact replay of the training on the examples as the requests leave them. Every adapter is scored as
it is. The trained, edited and retrained adapters are scored twice more: merged into the base model with weights rounded to 4
bits, and after some steps of training on facts that were neither learned nor forgotten.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from pixel_jax.cli import UserError
from pixel_jax.files import read_json
from pixel_jax.parallel.processes import is_main_process, say, waiting
from pixel_jax.state_files import write_json
from unlearn_jax import baselines
from unlearn_jax.arrays import Params
from unlearn_jax.baselines import Trained, Training
from unlearn_jax.loss import Loss
from unlearn_jax.metrics import answers, membership, text, tokens
from unlearn_jax.people.config import PeopleConfig
from unlearn_jax.people.corpus import QuestionRow
from unlearn_jax.people.model import int4, merged, silent
from unlearn_jax.people.task import PeopleTask
from unlearn_jax.requests.carry_out import State
from unlearn_jax.requests.log import ADAPTER, LOG, REPORT, folder
from unlearn_jax.requests.measure import table
from unlearn_jax.requests.replay import TrainingRecipe, beginning, train
from unlearn_jax.requests.state import Change
from unlearn_jax.requests.task import check_trained

EVALUATION = "evaluation.json"
DESCENTS: Mapping[str, Callable[..., Trained]] = {
    "fine-tune": baselines.retrain,
    "gradient ascent": baselines.gradient_ascent,
    "GradDiff": baselines.grad_diff,
    "NPO": baselines.npo,
    "SimNPO": baselines.simnpo,
}


class Subject(NamedTuple):
    """An adapter and the base model on which it is scored."""

    adapter: Params
    base: dict[str, jax.Array] | None = None  # None: the task's base model


@dataclasses.dataclass(frozen=True, eq=False)
class ForgettingScorer:
    """Scores adapters on forgotten rows, kept rows, rows that the base model knows, and unseen rows."""

    task: PeopleTask
    forgotten: Sequence[QuestionRow]  # removed rows, and the old form of changed ones
    kept: Sequence[QuestionRow]
    unseen: Sequence[QuestionRow]
    retrained: Params

    @classmethod
    def of(cls, task: PeopleTask, state: State, retrained: Params) -> "ForgettingScorer":
        """Makes a scorer of a run after its requests, with at most `config.evaluation.rows` rows of each set."""
        change = Change.of(state.first, state.items, task.encode, "answer")
        names = np.array(list(state.first))
        most, corpus = task.config.evaluation.rows, task.corpus
        pick = lambda index: [corpus.train[name] for name in names[index][:most]]
        unseen = corpus.holdout[: len(corpus.holdout) // 2][:most]
        return cls(task, pick(change.forgotten), pick(change.kept), unseen, retrained)

    def __call__(self, subject: Subject) -> dict[str, float]:
        """Computes all metrics of an adapter, see docs/unlearning.md."""
        metrics = {**self._forgetting(subject), **self._utility(subject), **self._membership(subject)}
        for name, rows in self.task.corpus.probes.items():
            metrics[f"ROUGE-L F, {name}"] = float(np.mean([x.fmeasure for x in self._rouge(subject, rows)]))
        for name, rows in (("kl_forget", self.forgotten), ("kl_retain", self.kept)):
            metrics[name] = self._divergence(subject, rows)
        return metrics

    def truth_ratios(self, subject: Subject, rows: Sequence[QuestionRow]) -> np.ndarray:
        """Truth ratios of the rows that have a paraphrase and wrong answers, float [n]."""
        rows = [row for row in rows if row.paraphrase and row.wrong]
        if not rows:
            return np.zeros(0)
        right = self._nll(subject, [(row.question, row.paraphrase) for row in rows])
        return np.array(
            [answers.truth_ratio(r, w).item() for r, w in zip(right, self._wrong(subject, rows), strict=True)]
        )

    def _wrong(self, subject: Subject, rows: Sequence[QuestionRow]) -> list[np.ndarray]:
        """Losses of the wrong answers of each row."""
        losses = self._nll(subject, [(row.question, answer) for row in rows for answer in row.wrong])
        return np.split(losses, np.cumsum([len(row.wrong) for row in rows])[:-1])

    def _forgetting(self, subject: Subject) -> dict[str, float]:
        statistics = self._score(subject, [(row.question, row.answer) for row in self.forgotten])
        inner = tokens.without_last(statistics.mask)
        ratios = self.truth_ratios(subject, self.forgotten)
        scores = {
            "probability": float(np.exp(-answers.mean_nll(statistics.logprob, statistics.mask)).mean()),
            "ROUGE-L": float(np.mean([x.recall for x in self._rouge(subject, self.forgotten)])),
            "extraction": float(answers.extraction_strength(statistics.correct, inner).mean()),
            "memorized": float(np.nanmean(answers.exact_memorization(statistics.correct, inner))),
        }
        if ratios.size:
            retrained = self.truth_ratios(Subject(self.retrained), self.forgotten)
            scores["truth_ratio"] = float(np.minimum(ratios, 1 / (ratios + answers.TINY)).mean())
            scores["forget_quality"] = answers.forget_quality(ratios, retrained)
        return scores

    def _utility(self, subject: Subject) -> dict[str, float]:
        """The harmonic mean of probability, ROUGE-L recall and (where there are wrong answers) knowledge over all sets."""
        scores = []
        most = self.task.config.evaluation.rows
        for name, rows in (("", self.kept), *self.task.corpus.known.items()):
            rows = list(rows)[:most]
            own = self._nll(subject, [(row.question, row.answer) for row in rows])
            multiple_choice = bool(name) and all(row.wrong for row in rows)
            if multiple_choice:
                wrong = self._wrong(subject, rows)
                each = [answers.normalized_probability(r, w).item() for r, w in zip(own, wrong, strict=True)]
                scores.append(float(np.mean(each)))
            else:
                scores.append(float(np.exp(-own).mean()))
            scores.append(float(np.mean([x.recall for x in self._rouge(subject, rows)])))
            if (ratios := self.truth_ratios(subject, rows)).size:
                scores.append(answers.knowledge(ratios))
        return {"utility": answers.model_utility(scores)}

    def _membership(self, subject: Subject) -> dict[str, float]:
        if not self.unseen:
            return {}
        areas, reference = self._areas(subject), self._areas(Subject(self.retrained))
        return {**areas, "privleak": membership.privleak(areas["auc_min_k"], reference["auc_min_k"])}

    def _areas(self, subject: Subject) -> dict[str, float]:
        """The AUC of three membership attacks; 1 means that all forgotten rows look like members."""
        scores: dict[str, list[np.ndarray]] = {"auc_loss": [], "auc_min_k": [], "auc_zlib": []}
        for rows in (self.forgotten, self.unseen):
            statistics = self._score(subject, [(row.question, row.answer) for row in rows])
            nll = answers.mean_nll(statistics.logprob, statistics.mask)
            scores["auc_loss"].append(nll)
            scores["auc_min_k"].append(membership.min_k(statistics.logprob, tokens.without_last(statistics.mask)))
            scores["auc_zlib"].append(membership.zlib_ratio(nll, [row.answer for row in rows]))
        return {name: membership.auc(*pair) for name, pair in scores.items()}

    def _divergence(self, subject: Subject, rows: Sequence[QuestionRow]) -> float:
        """Mean over rows and tokens of KL(adapter || retrained adapter on the task's own base model)."""
        model, reference = self.task.model, self.task.model.loss()
        loss = model.loss(subject.base)
        blocks = [
            np.asarray(_divergences(loss, subject.adapter, reference, self.retrained, examples))[:count]
            for examples, count in self._blocks([(row.question, row.answer) for row in rows])
        ]
        return float(np.concatenate(blocks).mean())

    def _blocks(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        """Yields padded blocks of equal size and their numbers of real rows, so that one compiled program scores all sets."""
        size = self.task.config.erasure.micro_batch
        for begin in range(0, len(pairs), size):
            block = list(pairs[begin : begin + size])
            yield self.task.model.words.encode(block + [block[0]] * (size - len(block))), len(block)

    def _rouge(self, subject: Subject, rows: Sequence[QuestionRow]) -> list[text.RougeL]:
        rows = list(rows)[: self.task.config.evaluation.rows]
        generated = self.task.model.answers(subject.adapter, [row.question for row in rows], subject.base)
        return [text.rouge_l(x, row.answer) for x, row in zip(generated, rows, strict=True)]

    def _nll(self, subject: Subject, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        statistics = self._score(subject, pairs)
        return answers.mean_nll(statistics.logprob, statistics.mask)

    def _score(self, subject: Subject, pairs: Sequence[tuple[str, str]]) -> tokens.TokenStatistics:
        loss = self.task.model.loss(subject.base)
        blocks = [
            [x[:count] for x in tokens.score(loss, subject.adapter, examples, micro_batch=None)]
            for examples, count in self._blocks(pairs)
        ]
        return tokens.TokenStatistics(*(np.concatenate(x) for x in zip(*blocks, strict=True)))


@jax.jit
def _divergences(loss: Loss, params: Params, other: Loss, reference: Params, examples: Any) -> jax.Array:
    """Each example's mean over its tokens of KL(loss at params || other at reference), [n]."""

    def one(example: Any) -> jax.Array:
        kl, mask = tokens.token_kl(loss.z(params, example), other.z(reference, example)), example["loss_mask"]
        return jnp.sum(jnp.where(mask != 0, kl, 0.0)) / jnp.sum(mask != 0)

    return jax.vmap(one)(examples)


def evaluate(config: PeopleConfig, mesh: Mesh | None = None) -> dict[str, dict[str, float]]:
    """Scores the adapters after all requests of the log; returns {adapter: metrics} and writes it to `config.out`."""
    check_trained(config.directory, config.trained())
    if not (config.directory / LOG).exists():
        raise UserError(f"{config.out} holds no edit: run `unlearn-jax erase` with the same --config.out first")
    task = PeopleTask.of(config, mesh)
    state = State.of(task)
    weights = np.array([float(name in state.items) for name in state.first])
    retrained = task.retrain({**state.first, **state.items}, weights)
    scorer = ForgettingScorer.of(task, state, retrained.adapter)
    trained, edited = (task.load(path) for path in (task.directory / ADAPTER, state.adapter_path(task.directory)))
    reports = [read_json(folder(task.directory, entry.number) / REPORT) for entry in state.entries]
    spent = sum(report["example_gradients"] for report in reports)
    adapters = {"before": trained, "edited": edited, "retrained": retrained.adapter}
    costs = {"before": 0.0, "edited": spent, "retrained": retrained.gradients}
    rows: dict[str, dict[str, float]] = {}
    for name, adapter in adapters.items():
        with waiting(f"scoring the adapter {name}"):
            rows[name] = {"gradients": costs[name], **scorer(Subject(adapter))}
    for name in config.evaluation.baselines if spent else ():
        with waiting(f"the baseline {name}, at as many gradients as the edits took"):
            tried = _baseline(name, scorer, state, trained, spent)
        if tried:
            rows[name] = min(tried, key=lambda row: row["kl_forget"] + row["kl_retain"])
    for name, adapter in adapters.items():
        with waiting(f"scoring the adapter {name}, rounded to 4 bits and relearned"):
            rows[f"{name}, int4"] = scorer(Subject(silent(adapter), int4(merged(task.model.base, adapter))))
            if relearned := relearn(task, adapter):
                rows[f"{name}, relearned"] = scorer(Subject(relearned))
    if is_main_process():
        write_json(config.directory / EVALUATION, rows)
    say("\n" + table(rows) + "\n")
    return rows


def relearn(task: PeopleTask, adapter: Params) -> Params | None:
    """Trains an adapter for some steps on rows that were not trained on; None if there are no such rows."""
    rows = task.corpus.holdout[len(task.corpus.holdout) // 2 :]
    if not rows:
        return None
    examples = task.model.words.encode([(row.question, row.answer) for row in rows])
    steps, batch = task.config.evaluation.relearning, min(task.recipe.batch, len(rows))
    epochs = -(-steps * batch // len(rows))
    recipe: TrainingRecipe = dataclasses.replace(task.recipe, epochs=epochs, batch=batch)
    return train(recipe, task.model.loss(), beginning(recipe, adapter), examples, np.ones(len(rows)), steps=steps)


def _baseline(name: str, scorer: ForgettingScorer, state: State, start: Params, budget: float) -> list[dict[str, Any]]:
    """The metrics of a baseline, one mapping for every learning rate with which it does not diverge."""
    task, settings = scorer.task, scorer.task.config.evaluation
    change = Change.of(state.first, state.items, task.encode, "answer")
    rows = []
    for rate in settings.learning_rates:
        schedule = optax.cosine_decay_schedule(rate, max(1, int(budget / settings.batch)))
        training = Training(optax.adam(schedule), budget, settings.batch, seed=task.config.seed)
        try:
            trained = DESCENTS[name](task.model.loss(), start, change.dataset, change.edits, training)
        except FloatingPointError:
            continue
        rows.append({"gradients": trained.gradients, "learning_rate": rate, **scorer(Subject(trained.adapter))})
    return rows
