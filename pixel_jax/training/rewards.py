"""The reward: a weighted sum of terms, by default the curiosity reward (Pixel Reasoner §4.2)."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax import named
from pixel_jax.arrays import AnyArray
from pixel_jax.parallel.sharding import all_rows
from pixel_jax.terminal import brief
from pixel_jax.training.scorers import Reference, Scorer, ScorerConfig
from pixel_jax.training.stages import Collected, Scored
from pixel_jax.training.steps import check_rows
from pixel_jax.training.terms import RewardError, Row, Term, evaluate, field, of_batch, of_group, rows_of


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The paper's constants. Each switch names the released code's behaviour as its second value."""

    # (name, weight) of each term of the sum: built in (answer, curiosity, budget, length, overlap), or `module:function`,
    # a function of one's own (docs/your-own-reward.md).
    terms: tuple[tuple[str, float], ...] = (("answer", 1.0), ("curiosity", 1.0), ("budget", 1.0), ("length", 1.0))
    alpha: float = 0.5  # weight of curiosity
    beta: float = 0.05  # price of an operation beyond the budget
    threshold: float = 0.3  # H, the rate of pixel-space reasoning below which curiosity pays
    budget: int = 1  # N, operations that cost nothing
    form: Literal["paper", "released"] = "paper"  # of the sum: the paper's equation, or the released code's
    scorer: ScorerConfig = ScorerConfig()  # what makes an answer right
    unparsable: Literal[0, -1] = 0  # reward of a response without any answer
    count: Literal["executed", "requested"] = (
        "executed"  # operations that returned pixels, or every call, failed or not
    )
    zero_after_failure: bool = False  # no credit for an answer that directly follows a failed operation
    # DAPO's soft overlong punishment: nothing up to `length_limit - length_buffer` tokens that the policy chose, -1 from
    # `length_limit` on, a straight line between. 0: off.
    length_limit: int = 0
    length_buffer: int = 0  # tokens before `length_limit` from which on length costs
    box: str = "box"  # the field of an example with the reference box that the term "overlap" compares with

    def __post_init__(self):
        names = [name for name, _ in self.terms]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"terms are one or more (name, weight), each name once: {self.terms}")
        if unknown := [name for name in names if name not in BUILT_IN and not named.is_name(name)]:
            raise ValueError(
                f"no reward term is called {unknown[0]!r}; known are {', '.join(BUILT_IN)}, and module:function"
            )
        if not 0 <= self.length_buffer <= self.length_limit:
            raise ValueError(f"length_buffer {self.length_buffer} must lie in [0, length_limit = {self.length_limit}]")


def curiosity_reward(
    correct: AnyArray,
    num_ops: AnyArray,
    *,
    alpha: float = 0.5,
    beta: float = 0.05,
    threshold: float = 0.3,
    budget: int = 1,
    form: Literal["paper", "released"] = "paper",
    is_video: AnyArray | None = None,
) -> AnyArray:
    """The shaped reward of each rollout, float32 [groups, n], from its correctness and its number of visual operations.

        r' = r + alpha max(H - RaPR, 0) 1[n_vo > 0] + beta min(N - n_vo, 0)        RaPR: share of the group with n_vo > 0

    so among 8 rollouts a single one that looks closer gains .5 (.3 - 1/8) = .0875, and each operation beyond the first
    costs .05. The `released` code instead pays max(H - RaPR, 0) / RaPR x .25 / (1.5 for a video, 2 for an image), with
    alpha / 2 in the place of .25 here, so that the default is the same; it needs `is_video` bool [groups].
    Pure, for NumPy and (traced) JAX arrays.
    """
    xp = jnp if any(isinstance(x, jax.Array) for x in (correct, num_ops, is_video)) else np
    correct, num_ops = xp.asarray(correct, xp.float32), xp.asarray(num_ops)
    if correct.ndim != 2 or correct.shape != num_ops.shape:
        raise ValueError(f"correct {correct.shape} and num_ops {num_ops.shape} must both be [groups, n]")
    bonus = _bonus(num_ops, alpha, threshold, form, is_video)
    return (correct + bonus + _penalty(num_ops, beta, budget)).astype(np.float32)


def _bonus(num_ops, alpha, threshold, form, is_video) -> AnyArray:
    """Of a group that looks less often than the threshold, to the rows of it [groups, n] that do look."""
    xp = jnp if any(isinstance(x, jax.Array) for x in (num_ops, is_video)) else np
    looked = num_ops > 0
    rapr = xp.mean(looked.astype(xp.float32), axis=1, keepdims=True)
    bonus = xp.maximum(threshold - rapr, 0.0)
    if form == "paper":
        bonus = alpha * bonus
    elif form == "released":
        if is_video is None:
            raise ValueError("the released form of the reward needs is_video [groups]")
        divisor = xp.where(xp.asarray(is_video), 1.5, 2.0)[:, None]
        bonus = alpha / 2 * bonus / divisor / xp.maximum(rapr, 1e-6)
    else:
        raise ValueError(f"form must be 'paper' or 'released', not {form!r}")
    return xp.where(looked, bonus, 0.0)


def _penalty(num_ops, beta, budget) -> AnyArray:
    """Of operations beyond the budget, [groups, n]."""
    xp = jnp if isinstance(num_ops, jax.Array) else np
    return beta * xp.minimum(budget - num_ops, 0)


def overlong(lengths: AnyArray, *, limit: int, buffer: int) -> AnyArray:
    """The soft punishment of responses of `lengths` tokens, in [-1, 0], float32 (DAPO, arXiv:2503.14476, eq. 13)."""
    beyond = np.asarray(lengths, np.float32) - (limit - buffer)
    line = -beyond / max(buffer, 1)
    return np.where(beyond <= 0, 0.0, np.where(beyond > buffer, -1.0, line)).astype(np.float32)


# ---- the terms that have names


def _operations(rows: Sequence[Row], config: RewardConfig) -> np.ndarray:
    """As `config.count` counts them, int [1, n]."""
    counted = [row.calls if config.count == "requested" else [x for x in row.calls if x.shown] for row in rows]
    return np.array([[len(calls) for calls in counted]])


def answer_term(config: RewardConfig) -> Term:
    """How right the answer is, by the rules of `config.scorer`; without one `config.unparsable`."""
    scorer = Scorer(config.scorer)

    def answer(rows: Sequence[Row], examples: Sequence[Any]) -> np.ndarray:
        found = scorer([row.response for row in rows], [Reference.of(example) for example in examples])
        return np.array([config.unparsable if x is None else x for x in found], np.float32)

    return of_batch(answer)


def curiosity_term(config: RewardConfig) -> Term:
    """`alpha` times what a group lacks of `threshold`, to its rows that look."""

    def curiosity(rows: Sequence[Row], example: Any) -> np.ndarray:
        is_video = np.array([rows[0].is_video])
        return _bonus(_operations(rows, config), config.alpha, config.threshold, config.form, is_video)[0]

    return of_group(curiosity)


def budget_term(config: RewardConfig) -> Term:
    """Minus `beta` for each operation beyond `budget`."""
    return of_group(lambda rows, example: _penalty(_operations(rows, config), config.beta, config.budget)[0])


def length_term(config: RewardConfig) -> Term:
    """`overlong`, if there is a `length_limit`."""

    def length(rows: Sequence[Row], examples: Sequence[Any]) -> np.ndarray:
        lengths = np.array([len(row.tokens) for row in rows])
        if not config.length_limit:
            return np.zeros(len(rows), np.float32)
        return overlong(lengths, limit=config.length_limit, buffer=config.length_buffer)

    return of_batch(length)


def overlap_term(config: RewardConfig) -> Term:
    """How well the best of a row's crops meets the example's reference box: the intersection over the union of the two, in
    [0, 1]; 0 without a crop.

    The example's field `config.box` has x1, y1, x2, y2 in pixels of its first image, or a list of several such boxes, any
    of which will do.
    """

    def overlap(row: Row, example: Any) -> float:
        boxes = np.atleast_2d(np.array(field(example, config.box), float))
        if boxes.ndim != 2 or boxes.shape[1:] != (4,) or not np.all(boxes[:, :2] < boxes[:, 2:]):
            raise ValueError(f"the field {config.box!r} must hold x1 < x2 and y1 < y2 as [x1, y1, x2, y2], not {boxes}")
        crops = [call.box for call in row.calls if call.box is not None and call.image == 0]
        return max((box_overlap(crop, box) for crop in crops for box in boxes), default=0.0)

    return Term(overlap)


def box_overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0.0) * max(height, 0.0)
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    return float(both / (area(one) + area(other) - both))


BUILT_IN: Mapping[str, Callable[[RewardConfig], Term]] = {
    "answer": answer_term,
    "curiosity": curiosity_term,
    "budget": budget_term,
    "length": length_term,
    "overlap": overlap_term,
}


def find_term(name: str, config: RewardConfig) -> Term:
    """The term of this name: built in, or the user's `module:function`, which is imported.

    Raises:
      NamedError: there is none.
      RewardError: what is there is neither a function nor a `Term`.
    """
    if name in BUILT_IN:
        return BUILT_IN[name](config)
    found = named.find(name)
    if isinstance(found, Term):
        return found
    if not callable(found):
        raise RewardError(f"the reward term {name!r} is {brief(found)}, not a function of a row and its example")
    return Term(found)


class Rewards:
    """The stage `score` (`pixel_jax.training.stages`): the weighted sum of terms, in their order.

    Args:
      terms: by their names, all that `config.terms` mentions.
      decode: token ids -> text.
    """

    def __init__(self, config: RewardConfig, terms: Mapping[str, Term], decode: Callable[[Sequence[int]], str]):
        self.config, self.terms, self.decode = config, terms, decode

    @classmethod
    def of(
        cls, config: RewardConfig, decode: Callable[[Sequence[int]], str], given: Mapping[str, Term] = {}
    ) -> "Rewards":
        """Finds the terms that `config` names; those in `given` are taken as they are. User code is imported here."""
        terms = {name: given[name] if name in given else find_term(name, config) for name, _ in config.terms}
        return cls(config, terms, decode)

    def __call__(self, learner, state, collected: Collected) -> Scored:
        """Raises:
        RewardError: a term raises, or gives no number for each row.
        NonFiniteError: a number is NaN or infinite.
        """
        questions, n, part = collected.questions, learner.config.rollout.group_size, learner.part
        rows = rows_of(collected.trajectories, questions.prompts, self.decode, questions.sizes)
        found = self.values(rows, questions.examples, n, first=part.index * len(rows))
        found = all_rows(found, part)
        for name, values in found.items():
            check_rows(values, f"iteration {questions.iteration}: the reward term {name!r}")
        correct = found.get("answer")
        if correct is not None and self.config.zero_after_failure:
            failed = all_rows(np.array([row.failed_last for row in rows]), part)
            found["answer"] = np.where((correct > 0.5) & failed, 0.0, correct)
        weighted = {name: (weight * found[name]).reshape(-1, n) for name, weight in self.config.terms}
        return Scored(
            collected,
            total(weighted.values()),
            weighted,
            None if correct is None else correct.reshape(-1, n),
            rows,
        )

    def values(self, rows: Sequence[Row], examples: Sequence[Any], n: int, first: int = 0) -> dict[str, np.ndarray]:
        """What each term gives to each of the rows, [R], before its weight."""
        return {name: evaluate(name, term, rows, examples, n, first) for name, term in self.terms.items()}


def total(terms: Iterable[np.ndarray]) -> np.ndarray:
    """Their sum, float32: added up in their order and in their own types, rounded at the end."""
    return functools.reduce(np.add, terms).astype(np.float32)
