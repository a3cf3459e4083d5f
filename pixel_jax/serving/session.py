"""A rollout that prompts are admitted to, and rows are read and dropped from, while it runs.

session = Session(speaker, shape, slots=8)
slot = session.admit(prompt, temperature=0.0)
while session.read()[slot].stop < 0:
    session.advance(16)
session.drop(slot)
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
    """The text that a row has written and the images that it has seen so far, on the host."""

    ids: np.ndarray  # int32 [n], what follows its prompt
    by_model: np.ndarray  # bool [n], the model wrote it; others are what it was shown
    failed: np.ndarray  # bool [N], calls that were answered with an error
    regions: np.ndarray  # int32 [N, V, 5], what calls looked at: the image, -1 for none, and x1 y1 x2 y2 in its pixels
    stop: int  # see `STOP_REASONS`; -1: it is not done


class Session:
    """Slots in which rows of one model are written together.

    Args:
      speaker: the model, with the settings of its prompts.
      shape: the batch shape that every prompt has to fit.
      slots: rows that are written at the same time. As many prompts again may wait on the device, so that no slot is empty
        until the host next admits one.
      host: carries out calls of tools that run on the host.
      seed: the seed of the sampling; each row's random numbers also depend on the `uid` of its prompt.
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
        """Compiles all programs of a session, by a row that is dropped again."""
        slot = self.admit(self._nothing(), 1.0)
        self.advance(1)
        self.read()
        self.row(slot)
        self.drop(slot)

    def _nothing(self) -> HostPrompts:
        """A prompt of one letter."""
        prompt = Prompt(Query("", [], self.shape.video), self.speaker.vocabulary.encode("."))
        return prompt.placed(self.speaker, self.shape)

    def admit(self, prompts: HostPrompts, temperature: float) -> int:
        """Admits one prompt and returns its slot, of which one must be free. The answer depends on the prompt's `uid` alone."""
        slot = self.free.pop()
        try:
            self._state = admit(self._state, [slot], prompts, temperatures=[temperature])
        except Exception:
            self.free.append(slot)
            raise
        self._images[slot] = prompts.images[0]
        return slot

    def advance(self, budget: int) -> None:
        """Advances all rows by at most `budget` tokens each, and answers calls of tools that run on the host."""
        self._state = advance(self.speaker.model, self._state, budget, donate=True)
        if self.host is not None:
            self._state = call_host_tools(
                self.speaker.model, self._state, self._images, self.host, self.speaker.vocabulary
            )

    def read(self) -> list[Progress]:
        """The progress of the row of every slot."""
        rows, width = finish(self._state), self.shape.tokens
        tokens, valid, by_model = (np.asarray(x)[:, width:] for x in (rows.tokens, rows.valid, rows.loss_mask))
        status, stop = np.asarray(rows.calls.status), np.asarray(rows.stop)
        source = jax.tree.map(np.asarray, rows.calls.source)
        regions = np.concatenate([source.image[..., None], source.region], axis=-1)
        lengths = valid.sum(axis=1)
        return [
            Progress(
                tokens[i, : lengths[i]],
                by_model[i, : lengths[i]],
                status[i] == CallStatus.FAILED,
                regions[i],
                int(stop[i]),
            )
            for i in range(len(stop))
        ]

    def row(self, slot: int) -> Trajectories[VisualRecord]:
        """The record of the row in a slot, on the host, as `rollout` would return it."""
        return to_host(_row(finish(self._state), np.int32(slot)))

    def drop(self, slot: int) -> None:
        """Frees a slot, whether its row is done or not."""
        self._state = drop(self._state, [slot])
        self._images[slot] = ragged([()])[0]
        self.free.append(slot)


@jax.jit
def _row(rows: Trajectories, slot: jax.Array) -> Trajectories:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1), rows)


class Wrote(NamedTuple):
    """Text that the model has added to its present turn."""

    text: str


class Saw(NamedTuple):
    """The observation that answers a call, after which the model begins another turn."""

    text: str
    failed: bool
    regions: tuple[tuple[int, int, int, int, int], ...]  # image (from 0), x1, y1, x2, y2 in its pixels


class Reader:
    """Turns the tokens of a row into text while they are written. The text does not depend on how often it is read.

    Args:
      max_tokens: tokens of the model after which the answer is cut. None: no other limit than the rollout's.
      stop: texts that end the answer: it is cut in front of the one that is complete first.
    """

    def __init__(self, vocabulary: Vocabulary, *, max_tokens: int | None = None, stop: Sequence[str] = ()):
        self.vocabulary, self.max_tokens, self.stops = vocabulary, max_tokens, tuple(stop)
        self.written = self.shown = 0  # tokens of the model, and of what it was shown
        self.calls = 0
        self.ended: str | None = None  # the reason in OpenAI's words, "stop" or "length"; None: it has not ended
        self.reason = ""  # the reason in the words of the rollout
        self._held = ""  # text that may be the beginning of a stop text
        self._next_turn = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._opening: str | None = ""  # the text of the present turn, as long as it may be the layout's lead

    def read(self, progress: Progress) -> list[Wrote | Saw]:
        """The events since the last time; none once `ended` has the reason."""
        events: list[Wrote | Saw] = []
        ids, by_model = progress.ids, progress.by_model
        while self.ended is None and (at := self.written + self.shown) < len(ids):
            if by_model[at]:
                self._take(int(ids[at]), events)
                continue
            end = at + int(np.argmax(np.append(by_model[at:], True)))
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
        """Adds a token that the model wrote."""
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
        """Removes the lead of the layout from the beginning of a turn; text that may be the lead is held back."""
        if self._opening is None:
            return text
        lead, text = self.vocabulary.layout.lead, self._opening + text
        if len(text) < len(lead) and lead.startswith(text):
            self._opening = text
            return ""
        self._opening = None
        return text.removeprefix(lead)

    def _finish_turn(self, events: list[Wrote | Saw]) -> None:
        """Adds the text that was held back, at the end of a turn."""
        self._add((self._opening or "") + self._decoder.decode(b"", final=True), events)
        self._decoder.reset()
        self._opening = ""
        if self.ended is None and self._held:
            events.append(Wrote(self._held))
            self._held = ""

    def _add(self, text: str, events: list[Wrote | Saw]) -> None:
        """Adds text of the model, and holds back an end that may be the beginning of a stop text."""
        if self.ended is not None or not text:
            return
        text = self._held + text
        # The stop text that is complete first ends the answer, as it would if every character were a token.
        ends = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            text, self._held = text[: min(ends)[1]], ""
            self.ended, self.reason = "stop", "stop sequence"
        else:
            held_back = max((_overlap(text, stop) for stop in self.stops), default=0)
            text, self._held = text[: len(text) - held_back], text[len(text) - held_back :]
        if text:
            events.append(Wrote(text))


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _joined(events: list[Wrote | Saw]) -> list[Wrote | Saw]:
    """The events, with consecutive texts joined."""
    joined: list[Wrote | Saw] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Wrote) and isinstance(last, Wrote):
            joined[-1] = Wrote(last.text + event.text)
        else:
            joined.append(event)
    return joined
