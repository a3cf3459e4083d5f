r"""Edits of a LoRA adapter on Qwen2.5-VL: rows of `pixel_jax` as examples, and their loss as a function of the adapter alone.

    model = add_lora(model, key, rank=8, alpha=16.0, targets=r"model\.layers\..*")
    loss, adapter = adapter_loss(model)
    erasure = unlearn_jax.erase(loss, adapter, examples(batch), [unlearn_jax.Remove([3])])

The elements of an example are its learned tokens: logits exist at the positions that predict them, and nowhere else.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.tree_util import Partial

from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.models import Model, Visual, forward_hidden
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.lora import combine, split
from pixel_jax.training.batch import Batch
from unlearn_jax.arrays import Example
from unlearn_jax.dataset import ID
from unlearn_jax.loss import MASK, CrossEntropy, Loss

STEP = 16  # lengths are rounded up to its multiples, so that few shapes have to be compiled


def examples(batch: Batch, ids: Sequence[Any] | None = None) -> dict[str, Any]:
    """A host batch of n rows as a dataset, without padding that all rows share.

    tokens, valid: [n, L], as in `Batch`; visual: the fields of `Visual`, if any row has images
    places:        int32 [n, T], the positions that predict the learned tokens
    labels:        int32 [n, T], those tokens
    loss_mask:     bool [n, T], false beyond a row's last learned token
    id:            `ids`, or the number of the row
    """
    if batch.segments is not None:
        raise ValueError("packed rows hold several examples each: make examples of rows before they are packed")
    valid, loss_mask = np.asarray(batch.valid), np.asarray(batch.loss_mask)
    count, width = valid.shape
    length = min(width, _up(int(np.flatnonzero(valid.any(axis=0))[-1]) + 1))
    rows = [_predictions(*row) for row in zip(np.asarray(batch.tokens), valid, loss_mask, strict=True)]
    width = _up(max(len(places) for places, _ in rows))
    places, labels = np.zeros((2, count, width), np.int32)
    mask = np.zeros((count, width), bool)
    for i, (positions, targets) in enumerate(rows):
        places[i, : len(positions)], labels[i, : len(positions)], mask[i, : len(positions)] = positions, targets, True
    fields = {
        ID: np.arange(count) if ids is None else np.asarray(ids),
        "tokens": np.asarray(batch.tokens)[:, :length],
        "valid": valid[:, :length],
        "places": places,
        "labels": labels,
        MASK: mask,
    }
    visual = _trim(batch.visual)
    return fields if visual is None else {**fields, "visual": visual._asdict()}


@dataclasses.dataclass(frozen=True)
class Logits:
    """(base, adapter, example) -> logits [T, vocabulary] of the learned tokens, float32.

    base: the model without its adapter (`pixel_jax.models.lora.split`)

    Both implementations of attention differentiate twice; "chunked" does it in memory linear in the length.
    """

    remat: bool = True
    implementation: Literal["dense", "chunked"] = "chunked"

    def __call__(self, base: Model, adapter: dict[str, jax.Array], example: Example) -> jax.Array:
        """Logits [T, vocabulary] of the example's learned tokens, float32."""
        model = combine(adapter, base)
        row = jax.tree.map(lambda x: x[None], {k: example[k] for k in ("tokens", "valid", "visual") if k in example})
        visual = Visual(**row["visual"]) if "visual" in row else None
        options = {"remat": self.remat, "implementation": self.implementation}
        hidden = forward_hidden(model, row["tokens"], row["valid"], visual, **options)
        return model.logits(hidden[0][example["places"]])


def mask_text(tokens: np.ndarray, mask: np.ndarray, text: str, vocabulary: Vocabulary) -> None:
    """Takes the loss off the tokens that have a byte of `text`, in place.

    Args:
        tokens: int [T], the learned tokens of a row.
        mask: bool [T], whether each carries loss.
        text: a text that occurs in the tokens' text.
        vocabulary: of the tokens.
    """
    pieces = [vocabulary.to_bytes([int(token)]) for token in tokens]
    ends = np.cumsum([len(piece) for piece in pieces])
    encoded = text.encode()
    begin = b"".join(pieces).find(encoded)
    assert begin >= 0, "the caller has checked that the text occurs"
    starts = ends - [len(piece) for piece in pieces]
    mask[(starts < begin + len(encoded)) & (ends > begin)] = False


def adapter_loss(
    model: Model, *, remat: bool = True, implementation: Literal["dense", "chunked"] = "chunked"
) -> tuple[Loss, dict[str, jax.Array]]:
    """Returns (the loss of the learned tokens as a function of the adapter, the adapter of `model`: LoRA weights by path)."""
    adapter, base = split(model, LoRAWeight)
    return Loss(Partial(Logits(remat, implementation), base), CrossEntropy()), adapter


def _predictions(tokens: np.ndarray, valid: np.ndarray, loss_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For one row: the positions that predict its learned tokens (the valid position before each), and these tokens."""
    at = np.flatnonzero(valid)
    learned = loss_mask[at[1:]]
    return at[:-1][learned], tokens[at[1:]][learned]


def _trim(visual: Visual | None) -> Visual | None:
    """The visual input without frames, slices, items and patches that no row uses."""
    if visual is None:
        return None
    slices, grids = np.asarray(visual.slices), np.asarray(visual.grids)

    def used(x):  # bool [rows, n] -> the number of columns up to the last one with a true value
        return int(np.flatnonzero(x.any(axis=0))[-1]) + 1 if x.any() else 0

    frames, shown, items = int(slices.max(initial=-1)) + 1, used(slices[..., 0] >= 0), used(grids.any(axis=-1))
    if not shown:
        return None
    patches = int(grids[..., 1:].prod(axis=-1).max())
    host: dict[str, Any] = dict(
        patches=np.asarray(visual.patches)[:, :frames, :patches],
        slices=slices[:, :shown],
        grids=grids[:, :items],
        seconds=np.asarray(visual.seconds)[:, :items],
    )
    return Visual(**host)


def _up(length: int) -> int:
    """Rounds a length up to a multiple of `STEP`."""
    return -(-length // STEP) * STEP
