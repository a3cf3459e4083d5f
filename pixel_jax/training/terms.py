"""The terms of a reward: functions of what a row did and of the example it was asked about.

def brief(row, example):                 # a row at a time, the usual way
    return -0.001 * len(row.tokens)

@of_group                                # all rows of a prompt together
def rare(rows, example):
    looked = [bool(row.calls) for row in rows]
    return [0.1 * (x and sum(looked) == 1) for x in looked]

@of_batch                                # all rows, with an example for each: one request, one array operation
def judged(rows, examples):
    return ask([(row.response, example.answer) for row, example in zip(rows, examples)])
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from pixel_jax.dialog.template import SPECIAL_TOKENS
from pixel_jax.rollouts.trajectory import STOP_REASONS, UNREADABLE, CallStatus, Prompts, Tables, Trajectories
from pixel_jax.terminal import brief
from pixel_jax.tools.calls import python_values


class Call(NamedTuple):
    """A call of a tool, in the turn that ends with it."""

    tool: str  # its name; "": the call cannot be read
    arguments: Mapping[str, Any]  # as it was written: numbers, a box as four of them, lists of integers, choices
    status: CallStatus
    outcome: (
        str  # the name of what it led to, as the tool's `outcomes` have it: "shown", "too_small"; "": not carried out
    )
    image: int = -1  # of the example, from 0, that was looked at; -1: none, or a picture that a tool had made
    box: tuple[float, float, float, float] | None = None  # x1, y1, x2, y2 in pixels of that image as its file has it
    frames: tuple[int, ...] = ()  # of the video, from 0, that were selected

    @property
    def executed(self) -> bool:
        """Whether it was answered, if only by an error."""
        return self.status >= CallStatus.FAILED

    @property
    def shown(self) -> bool:
        """Whether it returned what it asked for."""
        return self.status == CallStatus.DONE


class Row(NamedTuple):
    """What one rollout did."""

    response: str  # all that the policy wrote, what it was shown left out
    turns: tuple[str, ...]  # the same, turn by turn, without the token that ends a turn
    calls: tuple[Call, ...]  # in order, carried out or not
    stop: str  # why it ended: one of `pixel_jax.rollouts.trajectory.STOP_REASONS`
    tokens: np.ndarray  # int32 [T], the ids that the policy chose
    is_video: bool = False  # the images of the example are the frames of one video

    @property
    def failed_last(self) -> bool:
        """Whether the last operation before the answer returned an error."""
        executed = [call for call in self.calls if call.executed]
        return bool(executed) and not executed[-1].shown


@dataclasses.dataclass(frozen=True)
class Term:
    """A function, and what it is given at a time.

    "row": (row, example) -> a number. "group": (rows of a prompt, example) -> [n]. "batch": (all rows, an example for
    each) -> [R].
    """

    function: Callable[..., Any]
    over: Literal["row", "group", "batch"] = "row"


def of_group(function: Callable[..., Any]) -> Term:
    """Decorator: (rows of a prompt, example) -> a number for each row."""
    return Term(function, "group")


def of_batch(function: Callable[..., Any]) -> Term:
    """Decorator: (rows, an example for each) -> a number for each row."""
    return Term(function, "batch")


class RewardError(ValueError):
    """A term of a reward that gives no numbers; the message has its name and the row."""


def evaluate(name: str, term: Term, rows: Sequence[Row], examples: Sequence[Any], n: int, first: int = 0) -> np.ndarray:
    """What the term gives to each of R rows, float [R]: float32, or the term's own type where that is wider.

    Args:
      name: of the term, for messages.
      examples: one for every `n` rows, which are those of its prompt.
      first: number of the first row, for messages.

    Raises:
      RewardError: it raises, or returns something else than a number for each row.
    """
    if term.over == "batch":
        spread = [example for example in examples for _ in range(n)]
        return _called(term, (rows, spread), len(rows), f"the reward term {name!r}")
    size = n if term.over == "group" else 1
    found = []
    for start in range(0, len(rows), size):
        example = examples[start // n]
        which = f"row {first + start}" if size == 1 else f"rows {first + start} to {first + start + size - 1}"
        where = f"the reward term {name!r}, {which} ({_about(example)})"
        given = rows[start] if size == 1 else rows[start : start + size]
        found.append(_called(term, (given, example), size, where, single=term.over == "row"))
    return np.concatenate(found)


def _called(term: Term, arguments: tuple, size: int, where: str, single: bool = False) -> np.ndarray:
    """The numbers [size] that a call of the term gives; of one row alone, a number is meant."""
    try:
        value = term.function(*arguments)
    except Exception as error:
        raise RewardError(f"{where}: raises {type(error).__name__}: {error}") from error
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        array = np.asarray(None)
    wanted = () if single else (size,)
    if array.dtype.kind not in "fiub" or array.shape != wanted:
        what = "a number" if single else f"{size} numbers"
        given = " ".join(brief(value).split())
        raise RewardError(f"{where}: returns {given} (shape {array.shape}), not {what}")
    array = array.reshape(size)
    return array if array.dtype in (np.float32, np.float64) and not single else array.astype(np.float32)


def field(example: Any, name: str) -> Any:
    """What the line of a data file has under `name`. KeyError: it has no such field."""
    if name not in example.fields:
        raise KeyError(f"the example has no field {name!r}, only {', '.join(example.fields) or 'the usual ones'}")
    return example.fields[name]


def _about(example: Any) -> str:
    return f"example {getattr(example, 'id', None) or brief(getattr(example, 'question', example))}"


def rows_of(
    t: Trajectories,
    prompts: Prompts,
    decode: Callable[[Sequence[int]], str],
    sizes: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> list[Row]:
    """What the rows of host trajectories did, in order; every prompt has equally many.

    Args:
      decode: token ids -> text.
      sizes: (height, width) of the images of each prompt as their files have them, if they were made smaller for it.
    """
    n = len(t.stop) // len(prompts.length)
    rows = []
    for i in range(len(t.stop)):
        shown = [tuple(size) for size in np.asarray(prompts.image_sizes[i // n]).tolist()]
        whole = shown if sizes is None else sizes[i // n]
        ids, loss_mask = t.tokens[i][t.valid[i]], t.loss_mask[i][t.valid[i]]
        runs = np.split(ids, np.flatnonzero(np.diff(loss_mask)) + 1)
        turns = [decode(run).removesuffix(SPECIAL_TOKENS["im_end"]) for run in runs[not loss_mask[0] :: 2]]
        rows.append(
            Row(
                response=decode(ids[loss_mask]),
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
    """Call `k` of a row; its box in pixels of the image as it is (`whole`), not as the rollout has it (`shown`)."""
    call = jax.tree.map(lambda x: x[row, k], t.calls)
    tool = None if call.tool == UNREADABLE else tables.tools[int(call.tool)]
    outcome = "" if call.outcome < 0 else tables.observations.kinds[int(call.outcome)].outcome.name
    found = Call(
        tool="" if tool is None else tool.name,
        arguments={} if tool is None else python_values(tool, call.values),
        status=CallStatus(int(call.status)),
        outcome=outcome,
    )
    if tool is not None and tool.of_videos:
        return found._replace(frames=tuple(int(image) for image in call.source.image if image >= 0))
    image = int(call.source.image[0])
    if image < 0:
        return found
    (height, width), (full_height, full_width) = shown[image], whole[image]
    scale = np.array([full_width / width, full_height / height] * 2)
    return found._replace(image=image, box=tuple((call.source.region[0] * scale).tolist()))
