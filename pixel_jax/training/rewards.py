"""The reward: a weighted sum of terms, by default the curiosity reward (Pixel Reasoner §4.2).

A term is a function of a row and of the example that its question is from:

    def brief(row, example):                 # for one row
        return -0.001 * len(row.tokens)

    @of_group                                # for all rows of a prompt together
    def rare(rows, example):
        looked = [bool(row.calls) for row in rows]
        return [0.1 * (x and sum(looked) == 1) for x in looked]

    @of_batch                                # for all rows at once, with an example for each
    def judged(rows, examples):
        return ask([(row.response, example.answer) for row, example in zip(rows, examples)])
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax import named
from pixel_jax.arrays import AnyArray
from pixel_jax.dialog.template import SPECIAL_TOKENS
from pixel_jax.parallel.sharding import all_rows
from pixel_jax.rollouts.trajectory import (
    STOP_REASONS,
    UNREADABLE,
    CallStatus,
    HostPrompts,
    Prompts,
    Tables,
    Trajectories,
)
from pixel_jax.terminal import brief
from pixel_jax.tools.calls import python_values
from pixel_jax.training.scorers import Reference, Scorer, ScorerConfig
from pixel_jax.training.stages import Collected, Scored
from pixel_jax.training.steps import check_rows

Decode = Callable[[Sequence[int]], str]  # token ids -> text


class Call(NamedTuple):
    """A call of a tool, which ends a turn."""

    tool: str  # its name; "": the call cannot be read
    arguments: Mapping[str, Any]  # as they were written: numbers, a box as four numbers, lists of integers, choices
    status: CallStatus
    outcome: str  # the name of one of the tool's `outcomes`: "shown", "too_small"; "": not carried out
    image: int = -1  # index of the example's image, from 0; -1: none, or an image that a tool returned
    box: tuple[float, float, float, float] | None = None  # x1, y1, x2, y2 in pixels of that image in its file
    frames: tuple[int, ...] = ()  # indices of the selected frames of the video, from 0

    @property
    def executed(self) -> bool:
        """Whether it was answered, possibly by an error."""
        return self.status >= CallStatus.FAILED

    @property
    def shown(self) -> bool:
        """Whether it succeeded."""
        return self.status == CallStatus.DONE


class Row(NamedTuple):
    """A row of a rollout, as reward terms read it."""

    response: str  # all that the policy wrote, without observations
    turns: tuple[str, ...]  # the same, turn by turn, without the token that ends a turn
    calls: tuple[Call, ...]  # in order, carried out or not
    stop: str  # the reason why it ended: one of `pixel_jax.rollouts.trajectory.STOP_REASONS`
    tokens: np.ndarray  # int32 [T], the ids that the policy chose
    is_video: bool = False  # the images of the example are the frames of one video

    @property
    def failed_last(self) -> bool:
        """Whether the last operation before the answer returned an error."""
        executed = [call for call in self.calls if call.executed]
        return bool(executed) and not executed[-1].shown


@dataclasses.dataclass(frozen=True)
class Term:
    """A function that returns numbers for rows, and the rows with which it is called.

    "row": (row, example) -> a number. "group": (rows of a prompt, example) -> [n]. "batch": (all rows, an example for each)
    -> [R].
    """

    function: Callable[..., Any]
    over: Literal["row", "group", "batch"] = "row"


def of_group(function: Callable[..., Any]) -> Term:
    """Decorates a function (rows of a prompt, example) -> a number for each row."""
    return Term(function, "group")


def of_batch(function: Callable[..., Any]) -> Term:
    """Decorates a function (rows, an example for each) -> a number for each row."""
    return Term(function, "batch")


class RewardError(ValueError):
    """A term of a reward that does not return numbers. The message has its name and the row."""


def evaluate(name: str, term: Term, rows: Sequence[Row], examples: Sequence[Any], n: int, first: int = 0) -> np.ndarray:
    """Applies a term to R rows; returns float32 [R], or float64 if the term does.

    Args:
      name: of the term, for messages.
      term: the function.
      rows: R rows, `n` for each prompt.
      examples: one for each prompt.
      n: rows of a prompt.
      first: number of the first row, for messages.

    Raises:
      RewardError: the term raises, or does not return a number for each row.
    """
    if term.over == "batch":
        spread = [example for example in examples for _ in range(n)]
        return _called(term, (rows, spread), len(rows), f"the reward term {name!r}")
    size = n if term.over == "group" else 1
    values = []
    for start in range(0, len(rows), size):
        example = examples[start // n]
        which = f"row {first + start}" if size == 1 else f"rows {first + start} to {first + start + size - 1}"
        where = f"the reward term {name!r}, {which} ({_about(example)})"
        group = rows[start] if size == 1 else rows[start : start + size]
        values.append(_called(term, (group, example), size, where, single=term.over == "row"))
    return np.concatenate(values)


def _called(term: Term, arguments: tuple, size: int, where: str, single: bool = False) -> np.ndarray:
    """Calls a term and checks that it returns numbers [size], or one number for a `single` row."""
    try:
        value = term.function(*arguments)
    except Exception as error:
        raise RewardError(f"{where}: raises {type(error).__name__}: {error}") from error
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        array = np.asarray(None)
    shape = () if single else (size,)
    if array.dtype.kind not in "fiub" or array.shape != shape:
        what = "a number" if single else f"{size} numbers"
        returned = " ".join(brief(value).split())
        raise RewardError(f"{where}: returns {returned} (shape {array.shape}), not {what}")
    array = array.reshape(size)
    return array if array.dtype in (np.float32, np.float64) and not single else array.astype(np.float32)


def field(example: Any, name: str) -> Any:
    """Returns the field `name` of an example's row in the data. KeyError: the row has no such field."""
    if name not in example.fields:
        raise KeyError(f"the example has no field {name!r}, only {', '.join(example.fields) or 'the usual ones'}")
    return example.fields[name]


def _about(example: Any) -> str:
    return f"example {getattr(example, 'id', None) or brief(getattr(example, 'question', example))}"


def rows_of(
    t: Trajectories,
    prompts: Prompts | HostPrompts,
    decode: Decode,
    sizes: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> list[Row]:
    """Converts host trajectories to the rows that reward terms read, in order.

    Args:
      t: the trajectories, of which every prompt has the same number.
      prompts: of the rows.
      decode: token ids -> text.
      sizes: (height, width) of the images of each prompt in their files, if the prompt has smaller ones.
    """
    n = len(t.stop) // len(prompts.length)
    rows = []
    for i in range(len(t.stop)):
        shown: list[tuple[int, int]] = [(h, w) for h, w in np.asarray(prompts.image_sizes[i // n]).tolist()]
        whole = shown if sizes is None else sizes[i // n]
        valid = np.asarray(t.valid[i])
        ids, loss_mask = np.asarray(t.tokens[i])[valid], np.asarray(t.loss_mask[i])[valid]
        runs = np.split(ids, np.flatnonzero(np.diff(loss_mask)) + 1)
        turns = [decode(run.tolist()).removesuffix(SPECIAL_TOKENS["im_end"]) for run in runs[not loss_mask[0] :: 2]]
        rows.append(
            Row(
                response=decode(ids[loss_mask].tolist()),
                turns=tuple(turns),
                calls=tuple(_call(t, prompts.tables, i, k, shown, whole) for k in range(int(t.num_calls[i]))),
                stop=STOP_REASONS[int(t.stop[i])],
                tokens=ids[loss_mask],
                is_video=bool(prompts.is_video[i // n]),
            )
        )
    return rows


def _call(
    t: Trajectories,
    tables: Tables,
    row: int,
    k: int,
    shown: Sequence[tuple[int, int]],
    whole: Sequence[tuple[int, int]],
) -> Call:
    """Describes call `k` of a row. Its box is in pixels of the image in its file (`whole`), not in the rollout (`shown`)."""
    call = jax.tree.map(lambda x: x[row, k], t.calls)
    tool = None if call.tool == UNREADABLE else tables.tools[int(call.tool)]
    outcome = "" if call.outcome < 0 else tables.observations.kinds[int(call.outcome)].outcome.name
    record = Call(
        tool="" if tool is None else tool.name,
        arguments={} if tool is None else python_values(tool, call.values),
        status=CallStatus(int(call.status)),
        outcome=outcome,
    )
    if tool is not None and tool.of_videos:
        return record._replace(frames=tuple(int(image) for image in call.source.image if image >= 0))
    image = int(call.source.image[0])
    if image < 0:
        return record
    (height, width), (full_height, full_width) = shown[image], whole[image]
    scale = np.array([full_width / width, full_height / height] * 2)
    return record._replace(image=image, box=tuple((call.source.region[0] * scale).tolist()))


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The reward, with the paper's constants. The second value of each switch is the released code's behaviour."""

    # (name, weight) of each term of the sum: built in (answer, curiosity, budget, length, overlap), or the user's own
    # `module:function` (docs/your-own-reward.md).
    terms: tuple[tuple[str, float], ...] = (("answer", 1.0), ("curiosity", 1.0), ("budget", 1.0), ("length", 1.0))
    alpha: float = 0.5  # weight of curiosity
    beta: float = 0.05  # penalty of an operation beyond the budget
    threshold: float = 0.3  # H, the rate of pixel-space reasoning below which there is a curiosity bonus
    budget: int = 1  # N, operations without a penalty
    form: Literal["paper", "released"] = "paper"  # of the sum: the paper's equation, or the released code's
    scorer: ScorerConfig = ScorerConfig()  # the rules by which an answer is right
    unparsable: Literal[0, -1] = 0  # reward of a response without any answer
    # The operations that count: those that returned pixels, or all calls, failed or not.
    count: Literal["executed", "requested"] = "executed"
    zero_after_failure: bool = False  # whether an answer directly after a failed operation scores 0
    # DAPO's soft overlong penalty of the tokens that the policy chose: 0 up to `length_limit - length_buffer` tokens, -1 from
    # `length_limit` on, and linear between them. 0: off.
    length_limit: int = 0
    length_buffer: int = 0  # the tokens before `length_limit` over which the penalty grows
    box: str = "box"  # the field of an example with the reference box of the term "overlap"

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
    """Computes the shaped reward of each rollout, float32 [groups, n], from its correctness and number of visual operations.

        r' = r + alpha max(H - RaPR, 0) 1[n_vo > 0] + beta min(N - n_vo, 0)        RaPR: share of the group with n_vo > 0

    With the defaults, the only one of 8 rollouts that uses an operation gains .5 (.3 - 1/8) = .0875, and each operation beyond
    the first costs .05. The bonus of the `released` code is max(H - RaPR, 0) / RaPR x .25 / (1.5 for a video, 2 for an image);
    here alpha / 2 replaces .25, which is the same by default. It needs `is_video` bool [groups].
    The function is pure and takes NumPy or (traced) JAX arrays.
    """
    xp = jnp if any(isinstance(x, jax.Array) for x in (correct, num_ops, is_video)) else np
    correct, num_ops = xp.asarray(correct, xp.float32), xp.asarray(num_ops)
    if correct.ndim != 2 or correct.shape != num_ops.shape:
        raise ValueError(f"correct {correct.shape} and num_ops {num_ops.shape} must both be [groups, n]")
    bonus = _bonus(num_ops, alpha, threshold, form, is_video)
    return (correct + bonus + _penalty(num_ops, beta, budget)).astype(np.float32)


def _bonus(num_ops, alpha, threshold, form, is_video) -> AnyArray:
    """The bonus of rows with an operation, in groups whose rate is below the threshold: [groups, n]."""
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
    """The penalty of operations beyond the budget, [groups, n]."""
    xp = jnp if isinstance(num_ops, jax.Array) else np
    return beta * xp.minimum(budget - num_ops, 0)


def overlong(lengths: AnyArray, *, limit: int, buffer: int) -> AnyArray:
    """The soft penalty of responses of `lengths` tokens, in [-1, 0], float32 (DAPO, arXiv:2503.14476, eq. 13)."""
    beyond = np.asarray(lengths, np.float32) - (limit - buffer)
    line = -beyond / max(buffer, 1)
    return np.where(beyond <= 0, 0.0, np.where(beyond > buffer, -1.0, line)).astype(np.float32)


# ---- built-in terms


def _operations(rows: Sequence[Row], config: RewardConfig) -> np.ndarray:
    """The operations of each row as `config.count` counts them, int [1, n]."""
    counted = [row.calls if config.count == "requested" else [x for x in row.calls if x.shown] for row in rows]
    return np.array([[len(calls) for calls in counted]])


def answer_term(config: RewardConfig) -> Term:
    """The score of the answer by the rules of `config.scorer`; `config.unparsable` if there is no answer."""
    scorer = Scorer(config.scorer)

    def answer(rows: Sequence[Row], examples: Sequence[Any]) -> np.ndarray:
        scores = scorer([row.response for row in rows], [Reference.of(example) for example in examples])
        return np.array([config.unparsable if x is None else x for x in scores], np.float32)

    return of_batch(answer)


def curiosity_term(config: RewardConfig) -> Term:
    """The curiosity bonus of rows with an operation: `alpha` times (`threshold` - their group's rate), if positive."""

    def curiosity(rows: Sequence[Row], example: Any) -> np.ndarray:
        is_video = np.array([rows[0].is_video])
        bonus = _bonus(_operations(rows, config), config.alpha, config.threshold, config.form, is_video)
        return np.asarray(bonus)[0]

    return of_group(curiosity)


def budget_term(config: RewardConfig) -> Term:
    """Minus `beta` for each operation beyond `budget`."""

    def penalty(rows: Sequence[Row], example: Any) -> np.ndarray:
        return np.asarray(_penalty(_operations(rows, config), config.beta, config.budget))[0]

    return of_group(penalty)


def length_term(config: RewardConfig) -> Term:
    """The penalty `overlong`, if there is a `length_limit`."""

    def length(rows: Sequence[Row], examples: Sequence[Any]) -> np.ndarray:
        lengths = np.array([len(row.tokens) for row in rows])
        if not config.length_limit:
            return np.zeros(len(rows), np.float32)
        return np.asarray(overlong(lengths, limit=config.length_limit, buffer=config.length_buffer))

    return of_batch(length)


def overlap_term(config: RewardConfig) -> Term:
    """The largest overlap of a row's crops with the reference box of the example.

    It is the intersection over the union, in [0, 1]; 0 without a crop. The example's field `config.box` has x1, y1, x2, y2 in
    pixels of its first image, or a list of such boxes, of which the nearest counts.
    """

    def overlap(row: Row, example: Any) -> float:
        boxes = np.atleast_2d(np.array(field(example, config.box), float))
        if boxes.ndim != 2 or boxes.shape[1:] != (4,) or not np.all(boxes[:, :2] < boxes[:, 2:]):
            raise ValueError(f"the field {config.box!r} must hold x1 < x2 and y1 < y2 as [x1, y1, x2, y2], not {boxes}")
        crops = [call.box for call in row.calls if call.box is not None and call.image == 0]
        return max((box_overlap(crop, box) for crop in crops for box in boxes), default=0.0)

    return Term(overlap)


def box_overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """The intersection over the union of two boxes x1, y1, x2, y2."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0.0) * max(height, 0.0)

    def area(box: Sequence[float]) -> float:
        return (box[2] - box[0]) * (box[3] - box[1])

    return float(both / (area(one) + area(other) - both))


BUILT_IN: Mapping[str, Callable[[RewardConfig], Term]] = {
    "answer": answer_term,
    "curiosity": curiosity_term,
    "budget": budget_term,
    "length": length_term,
    "overlap": overlap_term,
}


def find_term(name: str, config: RewardConfig) -> Term:
    """Finds the term of this name: built in, or the user's `module:function`, which is imported.

    Raises:
      NamedError: there is no such term.
      RewardError: the object of this name is neither a function nor a `Term`.
    """
    if name in BUILT_IN:
        return BUILT_IN[name](config)
    function = named.find(name)
    if isinstance(function, Term):
        return function
    if not callable(function):
        raise RewardError(f"the reward term {name!r} is {brief(function)}, not a function of a row and its example")
    return Term(function)


class Rewards:
    """The stage `score` (`pixel_jax.training.stages`): the weighted sum of terms, in their order.

    Args:
      config: names and weights of the terms.
      terms: {name: term} for all names of `config.terms`.
      decode: token ids -> text.
    """

    def __init__(self, config: RewardConfig, terms: Mapping[str, Term], decode: Decode):
        self.config, self.terms, self.decode = config, terms, decode

    @classmethod
    def of(cls, config: RewardConfig, decode: Decode, own: Mapping[str, Term] = {}) -> "Rewards":
        """Finds the terms that `config` names, unless they are in `own`. User code is imported here."""
        terms = {name: own[name] if name in own else find_term(name, config) for name, _ in config.terms}
        return cls(config, terms, decode)

    def __call__(self, learner, state, collected: Collected) -> Scored:
        """Scores the rows.

        Raises:
            RewardError: a term raises, or does not give a number for each row.
            NonFiniteError: a number is NaN or infinite.
        """
        questions, n, shard = collected.questions, learner.config.rollout.group_size, learner.shard
        rows = rows_of(collected.trajectories, questions.prompts, self.decode, questions.sizes)
        by_term = self.values(rows, questions.examples, n, first=shard.index * len(rows))
        by_term = all_rows(by_term, shard)
        for name, values in by_term.items():
            check_rows(values, f"iteration {questions.iteration}: the reward term {name!r}")
        correct = by_term.get("answer")
        if correct is not None and self.config.zero_after_failure:
            failed = all_rows(np.array([row.failed_last for row in rows]), shard)
            by_term["answer"] = np.where((correct > 0.5) & failed, 0.0, correct)
        weighted = {name: (weight * by_term[name]).reshape(-1, n) for name, weight in self.config.terms}
        return Scored(
            collected,
            total(weighted.values()),
            weighted,
            None if correct is None else correct.reshape(-1, n),
            rows,
        )

    def values(self, rows: Sequence[Row], examples: Sequence[Any], n: int, first: int = 0) -> dict[str, np.ndarray]:
        """Computes the values [R] of each term for all rows, without its weight."""
        return {name: evaluate(name, term, rows, examples, n, first) for name, term in self.terms.items()}


def total(terms: Iterable[np.ndarray]) -> np.ndarray:
    """Sums terms in their order and in their own types, and rounds the sum to float32."""
    return np.asarray(functools.reduce(np.add, terms)).astype(np.float32)
