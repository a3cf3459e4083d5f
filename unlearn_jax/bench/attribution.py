"""The linear datamodelling score of an edit's predictions (Park et al. 2023, arXiv:2303.14186).

Random subsets of the training examples are removed. For each subset the test losses of the edited adapter are compared with the
mean test losses of adapters retrained without it, in the same order of batches and in others. The score of a test example is
Spearman's rank correlation over the subsets between the two; the mean over test examples is reported, with a bootstrap interval
over subsets and test examples.

The model is the small transformer of `unlearn_jax.people`, a LoRA adapter trained by AdamW and stopped early; test examples are
the learned facts in other words. Three more predictions are scored: an edit whose step is solved without a budget of epochs; the
gradient of the loss at a test example times the sum of those of the removed ones, without curvature (TracIn's last checkpoint,
with its sign); and one retraining, compared with those in the other orders. Where kronfluence or bergson are installed, their
influence scores on the same model are scored on the same subsets, too.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from pixel_jax.files import read_json
from pixel_jax.state_files import write_json
from pixel_jax.terminal import Waiting, say
from unlearn_jax.arrays import Params
from unlearn_jax.config import ErasureConfig
from unlearn_jax.dataset import Dataset
from unlearn_jax.edits import Remove
from unlearn_jax.erase import erase
from unlearn_jax.loss import Loss
from unlearn_jax.metrics import answers, tokens
from unlearn_jax.people.config import CorpusConfig, PeopleConfig, PeopleNetworkConfig
from unlearn_jax.people.task import PeopleTask
from unlearn_jax.requests.replay import TrainingRecipe, beginning, train
from unlearn_jax.solvers import cg

RESAMPLES = 500
DIGITS = 6  # of a loss in the file
METHODS = ("erase", "erase, solved", "gradient")
# One Newton step, solved to a relative residual of .01 without a budget.
SOLVED = {"newton_steps": 1, "damping_fraction": 1e-3, "solver": cg(rtol=0.01, max_steps=100)}
ONE = "one retrain"  # the prediction by one retraining, compared with the others
LIBRARIES = ("kronfluence", "bergson")  # functions of `unlearn_jax.bench.influences` by the package that they need
TRUTH = ("retrain", "before")  # what the losses of predictions are compared with


@dataclasses.dataclass(frozen=True)
class AttributionSetting:
    """The numbers of the measurement."""

    subsets: int = 60
    removed: float = 0.1  # share of the examples that each subset removes
    people: int = 30
    questions: int = 4
    width: int = 32
    rank: int = 4
    pretraining: int = 500
    epochs: int = 30
    batch: int = 20
    learning_rate: float = 3e-3
    orders: int = 3  # trainings without each subset, the first in the order of the training itself
    tests: int = 60  # test examples, at most
    seed: int = 0

    def config(self, out: str) -> PeopleConfig:
        """The configuration of the task."""
        return PeopleConfig(
            out=out,
            corpus=CorpusConfig(people=self.people, known=100, holdout=1, questions=self.questions),
            network=PeopleNetworkConfig(width=self.width, rank=self.rank, pretraining=self.pretraining),
            training=TrainingRecipe(
                epochs=self.epochs, batch=self.batch, learning_rate=self.learning_rate, seed=self.seed
            ),
            erasure=ErasureConfig(micro_batch=60, training_epochs=float(self.epochs)),
            seed=self.seed,
        )


def measure(setting: AttributionSetting, path: pathlib.Path) -> dict[str, Any]:
    """Computes the scores of all methods and writes them to the JSON file `path`; its subsets are not computed again.

    Returns:
        {"setting", "losses", "scores"}; losses: {method: [subsets, tests], "retrain": [subsets, orders, tests],
        "before": [tests]}; scores: {method: {"mean", "low", "high"}}.

    Raises:
        ValueError: the file has the results of another setting.
    """
    wanted = json.loads(json.dumps(dataclasses.asdict(setting)))
    result = {"setting": wanted, "losses": {name: [] for name in ("retrain", *METHODS)}}
    if path.exists():
        result = read_json(path)
        if {**result["setting"], "subsets": setting.subsets} != wanted:
            raise ValueError(f"{path} has results of the setting {result['setting']}, not of {wanted}")
        result["setting"] = wanted
    with tempfile.TemporaryDirectory() as directory:
        task = PeopleTask.of(setting.config(directory))
        _run(task, setting, result, path)
    return result


def _run(task: PeopleTask, setting: AttributionSetting, result: dict[str, Any], path: pathlib.Path) -> None:
    items = task.items()
    rows = list(items.values())[: setting.tests]
    tests = task.model.words.encode([(row.question, row.paraphrase) for row in rows])
    loss, data = task.model.loss(), task.encode(items)

    def losses(adapter: Params) -> np.ndarray:  # rounded, to keep the file small
        statistics = tokens.score(loss, adapter, tests, micro_batch=None)
        return np.round(answers.mean_nll(statistics.logprob, statistics.mask), DIGITS)

    examples = {name: x for name, x in data.items() if name != "id"}

    def learn(weights: np.ndarray, order: int = 0) -> Params:
        recipe = dataclasses.replace(task.recipe, seed=setting.seed + order)
        return train(recipe, loss, beginning(recipe, task.model.fresh), examples, weights)

    trained = learn(np.ones(len(items)))
    before = losses(trained)
    result["losses"]["before"] = before.tolist()
    slopes, test_slopes = (_gradients(loss, trained, x) for x in (examples, tests))

    def retrained(removed: np.ndarray) -> list:
        weights = np.ones(len(items))
        weights[removed] = 0
        return [losses(learn(weights, order)).tolist() for order in range(setting.orders)]

    def edited(removed: np.ndarray, **changes: Any) -> list[float]:
        edits = [Remove([list(items)[i] for i in removed])]
        config = dataclasses.replace(task.config.erasure, **changes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # limits do not matter here
            return losses(erase(loss, trained, Dataset.of(data), edits, config).adapter).tolist()

    def along_the_gradient(removed: np.ndarray) -> list[float]:
        """Predicts the losses after a gradient step of length 1 that ascends the loss of the removed examples."""
        predicted = before + np.asarray(test_slopes @ slopes[removed].sum(axis=0))
        return np.round(predicted.astype(float), DIGITS).tolist()

    def by_scores(influence: Callable[[], np.ndarray], removed: np.ndarray) -> list[float]:
        """Predicts the losses by the scores [tests, examples] of a library, which add up."""
        predicted = before + influence()[:, removed].sum(axis=1) / len(items)
        return np.round(predicted.astype(float), DIGITS).tolist()

    predictions: dict[str, Callable[[np.ndarray], list]] = {
        "retrain": retrained,
        "erase": edited,
        "erase, solved": functools.partial(edited, **SOLVED),
        "gradient": along_the_gradient,
    }
    for name, influence in influences(task, trained, examples, tests).items():
        predictions[name] = functools.partial(by_scores, influence)
    computed: dict[str, list] = result["losses"]
    for number in range(setting.subsets):
        begun, removed = time.perf_counter(), subset(setting, len(items), number)
        missing = [name for name in predictions if len(computed.setdefault(name, [])) <= number]
        for name in missing:
            with Waiting(f"subset {number + 1} of {setting.subsets}: {name}"):
                computed[name].append(predictions[name](removed))
        if missing:
            write_json(path, result)
            say(f"subset {number + 1} of {setting.subsets}, {time.perf_counter() - begun:.0f} s: {', '.join(missing)}")
    result["scores"] = scores(computed, setting.seed)
    write_json(path, result)
    say("\n".join(f"{name}: {x['mean']:.3f} [{x['low']:.3f}, {x['high']:.3f}]" for name, x in result["scores"].items()))


def influences(task: PeopleTask, adapter: Params, examples: Any, tests: Any) -> dict[str, Callable[[], np.ndarray]]:
    """The scores [tests, examples] by the libraries that are installed, each computed when it is first called.

    Others are named.
    """
    found: dict[str, Callable[[], np.ndarray]] = {}
    for package in LIBRARIES:
        if importlib.util.find_spec(package) is None or importlib.util.find_spec("torch") is None:
            say(f"{package} is not installed, or torch is not: left out")
            continue
        from unlearn_jax.bench import influences as libraries

        twin = libraries.LearnedFacts(task.model.base, adapter, task.config.network.heads, examples, tests)
        for name, score in getattr(twin, package)().items():
            found[f"{package}, {name}"] = functools.cache(score)
    return found


def subset(setting: AttributionSetting, count: int, number: int) -> np.ndarray:
    """Positions of the examples that subset `number` removes, int [k]."""
    size = max(1, round(setting.removed * count))
    return np.sort(np.random.default_rng([setting.seed, number]).permutation(count)[:size])


def scores(losses: Mapping[str, Any], seed: int = 0) -> dict[str, dict[str, float]]:
    """Computes the linear datamodelling score of each method, with a 95 % bootstrap interval; it needs three subsets.

    Args:
        losses: {method: [subsets, tests], "retrain": [subsets, orders, tests]}; a method that lacks subsets has no score.
        seed: of the resamples.
    """
    retrained = np.asarray(losses["retrain"], float)
    if len(retrained) < 3:
        return {}
    mean = retrained.mean(axis=1)
    complete = [name for name, x in losses.items() if name not in TRUTH and len(x) == len(mean)]
    pairs = {name: (np.asarray(losses[name], float), mean) for name in complete}
    if retrained.shape[1] > 1:
        pairs[ONE] = retrained[:, 0], retrained[:, 1:].mean(axis=1)
    return {name: _score(*pair, seed) for name, pair in pairs.items()}


def _score(predicted: np.ndarray, truth: np.ndarray, seed: int) -> dict[str, float]:
    random, means = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        rows, columns = (random.integers(0, n, n) for n in truth.shape)
        picked = rows[:, None], columns[None, :]
        means.append(_correlations(predicted[picked], truth[picked]).mean())
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": float(_correlations(predicted, truth).mean()), "low": float(low), "high": float(high)}


def _correlations(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each column, [tests]; zero for a constant column."""
    from scipy.stats import rankdata

    one, two = (rankdata(x, axis=0) for x in (predicted, truth))
    one, two = one - one.mean(axis=0), two - two.mean(axis=0)
    length = np.sqrt((one**2).sum(axis=0) * (two**2).sum(axis=0))
    return np.where(length > 0, (one * two).sum(axis=0) / np.where(length > 0, length, 1), 0.0)


@jax.jit
def _gradients(loss: Loss, params: Params, examples: Any) -> jax.Array:
    """The gradient of each example's mean loss, [n, parameters]."""

    def mean(params: Params, example: Any) -> jax.Array:
        total, weight = loss(params, example)
        return total / weight

    return jax.vmap(lambda example: ravel_pytree(jax.grad(mean)(params, example))[0])(examples)
