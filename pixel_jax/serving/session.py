"""A rollout whose rows come and go: prompts are admitted, rows are read while they write, and let go.

session = Session(speaker, shape, slots=8)
place = session.admit(prompt, temperature=0.0)
while not (answer := session.read()[place]).done:
    session.advance(16)
"""

import codecs
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from pixel_jax.dialog.observations import observation_text
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.rollouts.images import ragged
from pixel_jax.rollouts.materialize import VisualRecord
from pixel_jax.rollouts.prompts import Query
from pixel_jax.rollouts.rollout import admit, advance, begin, call_host_tools, drop, finish
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.rollouts.trajectory import (
    STOP_ANSWER,
    STOP_REASONS,
    CallStatus,
    HostPrompts,
    Trajectories,
    take_prompts,
    to_host,
)
from pixel_jax.serving.conversation import Prompt, Speaker
from pixel_jax.tools.host import HostTools


class Progress(NamedTuple):
    """What a row has come to so far, on the host."""

    ids: np.ndarray  # int32 [n], what follows its prompt
    chosen: np.ndarray  # bool [n], the model wrote it; others are what it was shown
    failed: np.ndarray  # bool [N], calls that were answered with an error
    regions: np.ndarray  # int32 [N, V, 5], what calls looked at: the image, -1 for none, and x1 y1 x2 y2 in its pixels
    stop: int  # see `STOP_REASONS`; -1: it is not done


class Session:
    """Places in which rows of one model are written together.

    Args:
      speaker: the model, and how it is talked to.
      shape: what every prompt has to fit.
      slots: rows that are written at the same time. As many prompts again may wait on the device, so that a slot that gets
        free does not stand empty until the host is asked.
      host: carries out calls of tools that run on the host.
      seed: of what is sampled; rows also draw from their prompts' `uid`.
    """

    def __init__(
        self, speaker: Speaker, shape: BatchShape, *, slots: int, host: HostTools | None = None, seed: int = 0
    ):
        self.speaker, self.shape, self.host = speaker, shape, host
        config = dataclasses.replace(speaker.config, group_size=1, in_flight=slots)
        capacity = slots if slots == 1 else 2 * slots
        self.free = list(reversed(range(capacity)))
        self._images = ragged([()] * capacity)
        none = take_prompts(self._nothing(), slice(0, 0))
        self._state = begin(speaker.model, none, jax.random.key(seed), config, capacity=capacity)
        self.config = config

    def warm_up(self) -> None:
        """Compiles all that is called later, with a row of its own that is dropped again."""
        place = self.admit(self._nothing(), 1.0)
        self.advance(1)
        self.read()
        self.row(place)
        self.drop(place)

    def _nothing(self) -> HostPrompts:
        """A prompt of one letter."""
        prompt = Prompt(Query("", [], self.shape.video), self.speaker.vocabulary.encode("."))
        return prompt.placed(self.speaker, self.shape)

    def admit(self, prompts: HostPrompts, temperature: float) -> int:
        """The place that the one prompt is given. There must be a free one; its answer follows from its `uid` and no other."""
        place = self.free.pop()
        try:
            self._state = admit(self._state, [place], prompts, temperatures=[temperature])
        except Exception:
            self.free.append(place)
            raise
        self._images[place] = prompts.images[0]
        return place

    def advance(self, budget: int) -> None:
        """All rows go on, by at most `budget` tokens each; calls of tools that run on the host are answered."""
        self._state = advance(self.speaker.model, self._state, budget, donate=True)
        if self.host is not None:
            self._state = call_host_tools(
                self.speaker.model, self._state, self._images, self.host, self.speaker.vocabulary
            )

    def read(self) -> list[Progress]:
        """What the row of every place has come to."""
        rows, width = finish(self._state), self.shape.tokens
        tokens, valid, chosen = (np.asarray(x)[:, width:] for x in (rows.tokens, rows.valid, rows.loss_mask))
        status, stop = np.asarray(rows.calls.status), np.asarray(rows.stop)
        source = jax.tree.map(np.asarray, rows.calls.source)
        regions = np.concatenate([source.image[..., None], source.region], axis=-1)
        there = valid.sum(axis=1)
        return [
            Progress(
                tokens[i, : there[i]],
                chosen[i, : there[i]],
                status[i] == CallStatus.FAILED,
                regions[i],
                int(stop[i]),
            )
            for i in range(len(stop))
        ]

    def row(self, place: int) -> Trajectories[VisualRecord]:
        """The record of the row at a place, on the host, as `rollout` would return it."""
        return to_host(_row(finish(self._state), np.int32(place)))

    def drop(self, place: int) -> None:
        """Frees a place, whether its row is done or not."""
        self._state = drop(self._state, [place])
        self._images[place] = ragged([()])[0]
        self.free.append(place)


@jax.jit
def _row(rows: Trajectories, place: jax.Array) -> Trajectories:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, place, 1), rows)


class Wrote(NamedTuple):
    """Text that the model has added to its present turn."""

    text: str


class Saw(NamedTuple):
    """What came back from a call, after which the model begins another turn."""

    text: str
    failed: bool
    regions: tuple[tuple[int, int, int, int, int], ...]  # image (from 0), x1, y1, x2, y2 in its pixels


class Reader:
    """The text of a row as it comes, token by token: the same whichever pieces it is read in.

    Args:
      max_tokens: of the model's own; where they are reached the answer is cut. None: no other limit than the rollout's.
      stop: texts that end the answer: it is cut in front of the one that is complete first.
    """

    def __init__(self, vocabulary: Vocabulary, *, max_tokens: int | None = None, stop: Sequence[str] = ()):
        self.vocabulary, self.max_tokens, self.stops = vocabulary, max_tokens, tuple(stop)
        self.written = self.shown = 0  # tokens of the model, and of what it was shown
        self.calls = 0
        self.ended: str | None = None  # why: "stop" or "length", as OpenAI's protocol has it
        self.reason = ""  # the same as the rollout says it
        self._held = ""  # may be the beginning of a text that ends the answer
        self._next_turn = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._opening: str | None = ""  # of the present turn, while it may be what the layout begins turns with

    def read(self, progress: Progress) -> list[Wrote | Saw]:
        """What is new since the last time. Nothing follows once `ended` says why."""
        events: list[Wrote | Saw] = []
        ids, chosen = progress.ids, progress.chosen
        while self.ended is None and (at := self.written + self.shown) < len(ids):
            if chosen[at]:
                self._take(int(ids[at]), events)
                continue
            end = at + int(np.argmax(np.append(chosen[at:], True)))
            self._finish_turn(events)
            if self.ended is not None:
                break
            text = observation_text(ids[at:end], self.vocabulary)
            looked = [x for x in progress.regions[self.calls].tolist() if x[0] >= 0]
            regions = tuple((image, x1, y1, x2, y2) for image, x1, y1, x2, y2 in looked)
            events.append(Saw(text, bool(progress.failed[self.calls]), regions))
            self.shown += end - at
            self.calls += 1
            self._next_turn = True
        if self.ended is None and progress.stop >= 0:
            self._finish_turn(events)
            self.ended = self.ended or ("stop" if progress.stop == STOP_ANSWER else "length")
            self.reason = self.reason or STOP_REASONS[progress.stop]
        return _joined(events)

    def _take(self, token: int, events: list[Wrote | Saw]) -> None:
        """One token of the model's."""
        self.written += 1
        if self._next_turn:
            self._add("\n", events)
            self._next_turn = False
        if token not in (self.vocabulary.im_end, self.vocabulary.end_of_text):
            self._add(self._without_lead(self._decoder.decode(self.vocabulary.to_bytes([token]))), events)
        if self.ended is None and self.written == self.max_tokens:
            self._finish_turn(events)
            if self.ended is None:
                self.ended, self.reason = "length", "max_tokens"

    def _without_lead(self, text: str) -> str:
        """The text of a turn without the space that the layout begins turns with; it waits until that is decided."""
        if self._opening is None:
            return text
        lead, text = self.vocabulary.layout.lead, self._opening + text
        if len(text) < len(lead) and lead.startswith(text):
            self._opening = text
            return ""
        self._opening = None
        return text.removeprefix(lead)

    def _finish_turn(self, events: list[Wrote | Saw]) -> None:
        """What was held back is text after all."""
        self._add((self._opening or "") + self._decoder.decode(b"", final=True), events)
        self._decoder.reset()
        self._opening = ""
        if self.ended is None and self._held:
            events.append(Wrote(self._held))
            self._held = ""

    def _add(self, text: str, events: list[Wrote | Saw]) -> None:
        """Text of the model's, but for what may be the beginning of a text that ends the answer."""
        if self.ended is not None or not text:
            return
        text = self._held + text
        # Of several stop texts, the one that is complete first ends the answer, as it would if every character were a token.
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            text, self._held = text[: min(found)[1]], ""
            self.ended, self.reason = "stop", "stop sequence"
        else:
            keep = max((_overlap(text, stop) for stop in self.stops), default=0)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        if text:
            events.append(Wrote(text))


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _joined(events: list[Wrote | Saw]) -> list[Wrote | Saw]:
    """The same with texts that follow each other made one."""
    joined: list[Wrote | Saw] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Wrote) and isinstance(last, Wrote):
            joined[-1] = Wrote(last.text + event.text)
        else:
            joined.append(event)
    return joined
