"""A vision-language model with an adapter on its decoder. Each picture goes through the vision tower once."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from pixel_jax.config import ConfigError
from pixel_jax.dialog import template
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.models import Model, Visual
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.lora import add_lora, combine, split
from pixel_jax.models.model import encode_visual
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.prompts import Query, shown_media
from pixel_jax.rollouts.views import frame_patches
from pixel_jax.train_config import LoRAConfig
from unlearn_jax.arrays import Example, Params
from unlearn_jax.loss import MASK, CrossEntropy, Loss
from unlearn_jax.noisy_responses.questions import ChoiceQuestion
from unlearn_jax.studies.study import Arrays, digest_of

BLOCK = 16  # pictures or questions that are computed at a time


@dataclasses.dataclass(frozen=True)
class QuestionWriter:
    """Writes questions as examples: tokens, places of the answers, and patches of the pictures."""

    vocabulary: Vocabulary
    limits: RolloutConfig  # sizes of pictures
    length: int  # tokens of a question and its answer
    answer: int  # tokens of an answer

    def arrays(self, questions: Sequence[ChoiceQuestion]) -> Arrays:
        """Converts questions to examples: see `unlearn_jax.vision_language.examples`. Only answers carry loss.

        Raises:
            ConfigError: a question or an answer is too long.
            PromptError: a picture cannot be shown.
        """
        count = len(questions)
        tokens, valid = np.zeros((count, self.length), np.int32), np.zeros((count, self.length), bool)
        places, labels = np.zeros((2, count, self.answer), np.int32)
        mask = np.zeros((count, self.answer), bool)
        frames, grids = [], np.zeros((count, 1, 3), np.int32)
        for i, question in enumerate(questions):
            asked, said, patches, grids[i, 0] = self._written(question)
            if len(asked) + len(said) > self.length or len(said) > self.answer:
                raise ConfigError(
                    f"question {question.name!r} has {len(asked)} + {len(said)} tokens, over {self.length} or {self.answer}: "
                    f"raise config.data.length or config.data.answer"
                )
            tokens[i, : len(asked) + len(said)] = [*asked, *said]
            valid[i, : len(asked) + len(said)] = True
            places[i, : len(said)] = len(asked) - 1 + np.arange(len(said))
            labels[i, : len(said)], mask[i, : len(said)] = said, True
            frames.append(patches)
        patches = np.zeros((count, 1, max(map(len, frames)), self.limits.patch_bytes), np.uint8)
        for i, frame in enumerate(frames):
            patches[i, 0, : len(frame)] = frame
        visual = Visual(patches, np.zeros((count, 1, 2), np.int32), grids, np.zeros((count, 1), np.float32))
        written = {"tokens": tokens, "valid": valid, "places": places, "labels": labels, MASK: mask}
        return {**written, "visual": visual._asdict()}

    def _written(self, question: ChoiceQuestion) -> tuple[list[int], list[int], np.ndarray, tuple[int, int, int]]:
        """The tokens of a question and of its answer, and the patches of its picture with their grid."""
        text, image, limits = question.example.question, question.pixels(), self.limits
        media, pads = shown_media(Query(text, [image]), limits)
        content = [*({"type": item.kind, item.kind: item.value} for item in media), {"type": "text", "text": text}]
        pieces = template.render([{"role": "user", "content": content}], layout=self.vocabulary.layout)
        height, width = limits.sizes().of(*image.shape[:2])
        patches = frame_patches(image, (0, 0, image.shape[1], image.shape[0]), (height, width), limits)
        grid = (1, height // limits.patch_size, width // limits.patch_size)
        return template.to_ids(pieces, self.vocabulary, pads), self.said(question.answer), patches, grid

    def said(self, answer: str) -> list[int]:
        """The tokens of an answer."""
        return self.vocabulary.encode(self.vocabulary.layout.lead + answer)


@dataclasses.dataclass(frozen=True, eq=False)
class Answerer:
    """A model whose vision tower is fixed, and a fresh adapter's shape."""

    writer: QuestionWriter
    base: Model  # without the adapter
    shape: Params  # an adapter, of which only names, shapes and dtypes are used
    remat: bool
    known: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # features of pictures, by question

    @classmethod
    def of(cls, model: Model, writer: QuestionWriter, lora: LoRAConfig, *, remat: bool = False) -> "Answerer":
        """Puts an adapter on a model.

        Raises:
            ValueError: the model cannot be shown single pictures.
            ConfigError: the adapter would change the vision tower.
        """
        writer.limits.check_model(model.config, videos=False)
        adapter, base = split(add_lora(model, jax.random.key(0), **dataclasses.asdict(lora)), LoRAWeight)
        if inside := [name for name in adapter if name.startswith("visual.")]:
            raise ConfigError(f"config.adapter.targets match {inside[0]}: only the decoder has an adapter here")
        return cls(writer, base, adapter, remat)

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the model's weights."""
        return digest_of(self.base)

    @property
    def loss(self) -> Loss:
        """The loss of an example (`arrays`) as a function of the adapter."""
        return Loss(Partial(AnswerLogits(self.remat), self.base), CrossEntropy())

    def arrays(self, questions: Sequence[ChoiceQuestion]) -> Arrays:
        """Converts questions to examples, with features [n, 1, tokens, width] in the place of pictures."""
        rows = self.writer.arrays(questions)
        visual = rows.pop("visual")
        missing = [i for i, question in enumerate(questions) if question.name not in self.known]
        for at in range(0, len(missing), BLOCK):
            block = missing[at : at + BLOCK]
            padded = [*block, *block[:1] * (BLOCK - len(block))]
            features = np.asarray(_features(self.base, Visual(**{name: x[padded] for name, x in visual.items()})))
            self.known.update((questions[i].name, x) for i, x in zip(block, features, strict=False))
        found = [self.known[question.name] for question in questions]
        features = np.zeros((len(found), 1, max(x.shape[1] for x in found), found[0].shape[2]), found[0].dtype)
        for row, x in zip(features, found, strict=True):
            row[:, : x.shape[1]] = x
        return {**rows, "features": features, "grids": visual["grids"]}

    def choices(self, questions: Sequence[ChoiceQuestion]) -> np.ndarray:
        """The first tokens of the possible answers, int32 [n, most choices]; -1 where a question has fewer.

        Raises:
            ConfigError: two answers begin with the same token.
        """
        tokens = np.full((len(questions), max(len(x.choices) for x in questions)), -1, np.int32)
        for row, question in zip(tokens, questions, strict=True):
            first = [self.writer.said(x)[0] for x in question.choices]
            if len(set(first)) < len(first):
                raise ConfigError(f"two of the answers {question.choices} of {question.name!r} begin with one token")
            row[: len(first)] = first
        return tokens


@dataclasses.dataclass(frozen=True)
class AnswerLogits:
    """(base, adapter, example) -> logits [T, vocabulary] of the answer's tokens, float32."""

    remat: bool

    def __call__(self, base: Model, adapter: Params, example: Example) -> jax.Array:
        """Logits [T, vocabulary] of the answer's tokens."""
        model = combine(adapter, base)
        names = ("tokens", "valid", "features", "grids")
        tokens, valid, features, grids = (jnp.asarray(example[name])[None] for name in names)
        nothing = jnp.zeros(grids.shape[:2], jnp.float32)
        x = model.embed(tokens, features, grids)
        positions, _ = model.positions(tokens, valid, grids, nothing, jnp.zeros(1, jnp.int32))
        hidden = model.backbone(x, positions, valid, remat=self.remat, implementation="dense")
        return model.logits(hidden[0][example["places"]])


@jax.jit
def _features(base: Model, visual: Visual) -> jax.Array:
    return encode_visual(base, visual, implementation="dense")


@jax.jit
def first_logits(loss: Loss, params: Params, examples: Any, tokens: jax.Array) -> jax.Array:
    """Logits of `tokens` int32 [n, choices] as the first tokens of the answers, [n, choices]; -inf for -1."""

    def one(row: Any) -> jax.Array:
        example, chosen = row
        return jnp.where(chosen < 0, -jnp.inf, loss.z(params, example)[0][chosen])

    return jax.lax.map(one, (examples, tokens), batch_size=BLOCK)
