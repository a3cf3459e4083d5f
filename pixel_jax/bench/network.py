"""The network, the questions and the images of the cases, and the same network in transformers."""

import functools
import importlib.util
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pixel_jax
from pixel_jax.dialog import observations, template
from pixel_jax.dialog.tokenizer import Vocabulary, build_tokenizer
from pixel_jax.models import LanguageModel, Model, Qwen2_5_VLConfig, TextConfig, VisionConfig
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.prompts import Query, build_prompts, tables
from pixel_jax.rollouts.trajectory import HostPrompts
from pixel_jax.tools import RELEASED

HAS_TORCH = bool(importlib.util.find_spec("torch"))  # transformers' models need it
HAS_TRL = HAS_TORCH and bool(importlib.util.find_spec("trl"))

CROP = '<tool_call>\n{"name": "crop_image_normalized", "arguments": {"bbox_2d": ['
CLOSE = '], "target_image": 1}}\n</tool_call>'
BOX = ("0.10, ", "0.15, ", "0.60, ", "0.70")
THOUGHT, ANSWER, START, END = "I look closer. ", "answer.", "assistant\n", "<|im_end|>"
QUESTION = "Which digit is on the card that lies beside the tree? Look at the image closely, then answer."


@functools.cache
def vocabulary() -> Vocabulary:
    """A vocabulary in which every phrase of a dialog is one token or a few, because the tokenizer is not measured."""
    pieces = {CROP, CLOSE, *BOX, THOUGHT, START, "system\n", "user\n", template.GUIDELINES["vcot"]}
    pieces |= set(re.findall(r"\S+\s*", template.system_prompt() + QUESTION))
    for kind in observations.kinds_of(RELEASED):
        for stretch in re.split(r"<\|\w+\|>|\{\w+\}", template.flatten(template.CHATML.before) + kind.outcome.text):
            pieces |= {stretch} if len(stretch) > 1 else set()
    return Vocabulary.of(build_tokenizer(sorted(pieces)))


def model_config(quick: bool, layers: int = 8) -> Qwen2_5_VLConfig:
    """A network of 35 million parameters with 8 layers; `quick`: of a few thousand with two."""
    words = vocabulary()
    small = len(words.tokenizer)
    text = (
        TextConfig(-(-small // 64) * 64, 64, 96, 2, 4, 2, 1e-6, mrope_section=(2, 3, 3))
        if quick
        else TextConfig(8192, 512, 1408, layers, 8, 2, 1e-6, mrope_section=(8, 12, 12))
    )
    vision = (
        VisionConfig(2, 32, 48, 2, 64, fullatt_block_indexes=(1,))
        if quick
        else VisionConfig(8, 256, 704, 4, 512, fullatt_block_indexes=(3, 7))
    )
    return Qwen2_5_VLConfig(
        text, vision, words.image_pad, words.video_pad, words.vision_start, words.vision_end, tie_word_embeddings=False
    )


@functools.cache
def random_model(quick: bool, layers: int = 8) -> LanguageModel:
    """The network with random weights."""
    return jax.jit(LanguageModel, static_argnums=0)(model_config(quick, layers), jax.random.key(0))


@functools.cache
def zooming_model(quick: bool, answers: float = 0.0) -> LanguageModel:
    """The random model with a head that makes it write thoughts, zoom in, and start again.

    Turns are sampled, so that rows differ in length. It has four layers only, because the loops around transformers are slow.

    Args:
        quick: tiny shapes.
        answers: the share of turns that are an answer, which ends a row.
    """
    model = random_model(quick, layers=4)
    words, config = vocabulary(), model.config.text

    def token(text: str) -> int:
        return words.im_end if text == END else words.encode(text)[0]

    # The logits of the tokens that may follow each token. A thought follows a thought 7 times in 8.
    chain = {START: {THOUGHT: 30.0}, THOUGHT: {THOUGHT: 30.0, CROP: 30.0 - np.log(7.0)}, CLOSE: {END: 30.0}}
    if answers:
        chain[START][ANSWER], chain[ANSWER] = 30.0 + np.log(answers / (1 - answers)), {END: 30.0}
    chain |= {before: {after: 30.0} for before, after in zip((CROP, *BOX), (*BOX, CLOSE), strict=True)}
    # Embeddings are nearly orthogonal and far larger than what the layers add, so that the head can read the last token.
    embed = np.random.default_rng(0).normal(size=(config.vocab_size, config.hidden_size)).astype(np.float32)
    embed /= np.linalg.norm(embed, axis=1, keepdims=True)
    head = np.zeros_like(embed)
    for before, after in chain.items():
        for text, logit in after.items():
            head[token(text)] += logit * embed[token(before)] / config.hidden_size**0.5
    leaves, treedef = jax.tree.flatten(model)
    talking = jax.tree.unflatten(treedef, leaves)
    talking.language_model.embed_tokens.weight[...] = jnp.asarray(60 * embed)
    talking.lm_head.weight[...] = jnp.asarray(head)
    return talking


def rollout_config(quick: bool) -> RolloutConfig:
    """A rollout with two zooms and a last turn, images of 336 x 336 pixels and crops of up to 168 x 168."""
    side = 112 if quick else 336
    return RolloutConfig(
        group_size=2 if quick else 8,
        top_p=1.0,
        top_k=0,
        max_new_tokens=96,  # with 48 tokens one turn in 240 would end before its call
        max_calls=2,
        max_response=128 if quick else 320,
        max_tokens=4096,
        max_pixels=side**2,
        crop_max_pixels=side**2 // 4,
        max_side=side if quick else 364,  # the questions' images, 1024 x 768, are shown at 364 x 280
        pad=0.0,
        tail_rows=2 if quick else 16,
    )


def forget() -> None:
    """Frees the models that nothing uses any more: the functions that make them keep them for the next case."""
    random_model.cache_clear()
    zooming_model.cache_clear()


def images(count: int, height: int, width: int) -> np.ndarray:
    """Draws random images, uint8 [count, height, width, 3]."""
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def text_tokens(*shape: int) -> np.ndarray:
    """Draws tokens of random letters, int32 [*shape]."""
    letters = vocabulary().encode("abcdefghijklmnopqrstuvwxyz")
    return np.random.default_rng(0).choice(letters, shape).astype(np.int32)


def prompts(quick: bool) -> HostPrompts:
    """Prompts of 8 questions, each about an image of 1024 x 768 pixels."""
    shape = (2, 112, 112) if quick else (8, 768, 1024)
    queries = [Query(QUESTION, [image]) for image in images(*shape)]
    return build_prompts(queries, vocabulary(), tables(vocabulary()), rollout_config(quick))


def transformers_model(model: Model, attention: str = "sdpa") -> Any:  # the types of transformers lack `generate`
    """The same weights in transformers, in evaluation mode."""
    import transformers

    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        pixel_jax.save_pretrained(model, None, directory)
        return transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            directory, dtype="float32", attn_implementation=attention
        ).eval()
