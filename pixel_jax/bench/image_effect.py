"""Whether a model sees: how far the log-probabilities of an answer move when the picture is greyed.

A model whose vision weights are zero, or whose picture tokens are never replaced by features, loads, writes and can be
trained like any other; only its answers do not depend on the picture.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.models.io import forward, patched
from pixel_jax.models.model import Model
from pixel_jax.models.processor import VISION_END, VISION_START, Processor

TOKENS = 256  # most tokens of a picture: a larger one takes longer and shows no more
SHIFT = 3  # tokens of padding on one side or the other
CLEAR = 10  # times the rounding: a larger change is caused by the picture
FAINT = 1e-3  # of the size of words' embeddings: smaller features are those of an untrained projector


class ImageEffect(NamedTuple):
    """The changes that greying a picture makes, of log-probabilities in nats, the largest among the tokens of the answer."""

    moved: float  # change of log-probabilities by the grey picture
    rounding: float  # change of log-probabilities by padding on the other side, which reorders sums
    changed: float  # largest change of the picture's features, relative to the largest feature
    size: float  # root mean square of the features, relative to that of the embeddings of words

    @property
    def sees(self) -> bool:
        """Whether the answer depends on the picture, by more than rounding can explain."""
        return self.moved > CLEAR * self.rounding

    @property
    def cause(self) -> str:
        """The likely fault of a model that does not see, judged by its features."""
        if self.size == 0:
            return (
                "the features of the picture are all zero: the last weights of the vision tower (merger, projector) are zero, "
                "so copy them from the checkpoint that the directory was made of"
            )
        if self.changed == 0:
            return (
                "the features are the same for every picture: weights of the vision tower (patch embedding, or another part "
                "that all must pass) are zero, so copy them from the checkpoint that the directory was made of"
            )
        if self.size < FAINT:
            return (
                f"the features are {self.size:.1e} times as large as the embeddings of words: the projector seems untrained, "
                "so tune it first (config.sft.trainable with visual)"
            )
        return (
            "the features change with the picture, and the answer does not: the tokens of pictures are not replaced by them "
            "(image_token_id in config.json, tokenizer), or the decoder passes over them"
        )


def measure_image_effect(
    model: Model, processor: Processor, image: np.ndarray, question: str, answer: str
) -> ImageEffect:
    """Asks the model about a picture and about its mean colour, in one call of `pixel_jax.forward`.

    Args:
        model: a model with a vision tower.
        processor: the processor of the model.
        image: uint8 [h, w, 3], of more than one colour.
        question: a question about it.
        answer: the text whose log-probabilities are compared.

    Raises:
        ValueError: the model has no vision tower, or the image is of one colour.
    """
    vision, (placeholder, *_) = model.config.vision, (*model.config.placeholders, None)
    if vision is None or placeholder is None:
        raise ValueError(f"a model of the family {model.config.model_type!r} sees no images")
    grey = np.broadcast_to(image.mean(axis=(0, 1)).round().astype(np.uint8), image.shape)
    if (grey == image).all():
        raise ValueError("the picture has one colour, and cannot be greyed")
    small = Processor(
        processor.tokenizer,
        family=processor.family,
        vision=vision,
        min_pixels=vision.factor**2,
        max_pixels=TOKENS * vision.factor**2,
    )
    vocabulary = processor.tokenizer.get_vocab()
    marks = (VISION_START, VISION_END) if {VISION_START, VISION_END} <= vocabulary.keys() else ("", "\n")
    prompt = small(f"{marks[0]}{placeholder}{marks[1]}{question}\n", images=[image])
    grey_pixels = small(placeholder, images=[grey])["pixel_values"]
    written = processor.tokenizer.encode(answer, add_special_tokens=False)
    row = np.concatenate([prompt["input_ids"][0], np.array(written, np.int32)])
    left, right = np.pad(row, (SHIFT, 0)), np.pad(row, (0, SHIFT))
    ones = np.ones(len(row), np.int32)
    inputs = {
        "input_ids": np.stack([right, right, left]),
        "attention_mask": np.stack([np.pad(ones, (0, SHIFT))] * 2 + [np.pad(ones, (SHIFT, 0))]),
        "pixel_values": np.concatenate([prompt["pixel_values"], grey_pixels, prompt["pixel_values"]]),
    }
    if "image_grid_thw" in prompt:
        inputs["image_grid_thw"] = np.tile(prompt["image_grid_thw"], (3, 1))
    logits = forward(model, **inputs)
    first, last = len(row) - len(written) - 1, len(row) - 1
    at = lambda i, start: _logprobs(logits[i, start + first : start + last], np.array(written))
    original, blank, shifted = at(0, 0), at(1, 0), at(2, SHIFT)
    features = _features(model, inputs["pixel_values"][: 2 * len(grey_pixels)], inputs.get("image_grid_thw"))
    size = float(np.sqrt(np.mean(features[0] ** 2)))
    words = np.asarray(model.embed(row[None, -len(written) :])[..., : model.config.text.hidden_size], np.float32)
    return ImageEffect(
        moved=float(np.abs(original - blank).max()),
        rounding=max(float(np.abs(original - shifted).max()), float(jnp.finfo(model.dtype).eps)),
        changed=float(np.abs(features[0] - features[1]).max() / max(np.abs(features[0]).max(), 1e-30)),
        size=size / max(float(np.sqrt(np.mean(words**2))), 1e-30),
    )


def _logprobs(logits: np.ndarray, written: np.ndarray) -> np.ndarray:
    """Logits [n, vocab] -> the log-probability of each of the n tokens."""
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))[np.arange(len(written)), written]


def _features(model: Model, pixels: np.ndarray, grids: np.ndarray | None) -> np.ndarray:
    """The features of two images of one size, float32 [2, tokens, F]."""
    patches, grids = patched(pixels, None if grids is None else grids[:2], model.config)
    encode = jax.jit(lambda model, *given: model.encode(*given))
    return np.asarray(encode(model, patches.reshape(2, len(patches) // 2, -1), np.asarray(grids)[:, 1:]), np.float32)
